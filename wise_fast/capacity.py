"""Room in a bank: buffers that are larger than what they hold, so that a new memory is a change of data, not of shapes.

A slot that is free is a memory of no rows whose threshold is infinite: it is never in scope and costs nothing to score.
Graphs that were compiled or captured over the buffers go on with what is put into them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from wise_fast import subjects
from wise_fast.config import WiseConfig
from wise_fast.errors import ConfigError
from wise_fast.memory import Bank
from wise_fast.pack_rows import ROWS
from wise_fast.protection import RANK
from wise_kernels.bits import words

_EDITS, _MERGED = 64, 512  # in a memory where nothing says how many, and in one that all shards are merged into


class Size(NamedTuple):
    """What a bank takes, or has room for: memories, rows of values, columns of the factors, rows of `names`, of
    `endings` and of `limits`."""

    memories: int
    rows: int
    rank: int
    names: int = 0
    edits: int = 0
    packs: int = 0


NOTHING = Size(0, 0, 0)


def blank(layout: str, shape: tuple[int, int], size: Size, factors: bool, like: torch.Tensor) -> Bank:
    """A bank of free slots.

    Args:
        layout: "neuron" or "element".
        shape: (d_out, d_ff) of the projection.
        size: that fits; every memory may be a pack of its own.
        factors: whether scores are over the root of their leverage.
        like: has the device and the dtype of the values.
    """
    (d_out, d_ff), (memories, rows, rank, names, edits, packs) = shape, size
    whole, real = (dict(dtype=kind, device=like.device) for kind in (torch.int64, torch.float32))
    if layout == "neuron":
        values, index = like.new_zeros(rows, d_out), torch.zeros(rows, **whole)
    else:
        values = like.new_zeros(rows + 1)[:-1]  # kernels may read them in pairs
        index = torch.zeros(memories, d_out, words(d_ff), dtype=torch.int32, device=like.device)
    return Bank(
        values,
        index,
        torch.zeros(memories + 1, **whole),
        torch.full((memories,), torch.inf, **real),
        torch.zeros(rows, rank, **real) if factors else None,
        torch.ones(memories, dtype=torch.bool, device=like.device) if factors else None,
        torch.full((max(packs, memories + len(ROWS)), memories), torch.inf, **real),
        torch.full((memories,), torch.inf, **real) if factors else None,
        subjects.free(max(names, memories), like.device),
        torch.zeros(max(names, memories), **whole),
        torch.zeros(max(edits, memories), d_ff, **real),
        torch.full((max(edits, memories),), -1.0, **real),
        torch.zeros(max(edits, memories), **whole),
    )


def require_sizes(**sizes: int) -> None:
    """Raise ConfigError unless every size is a whole number from 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name} is {size!r}, expected a whole number from 1")


def planned(config: WiseConfig, projection: nn.Module, memories: int) -> tuple[int, int | None, str, int]:
    """Rows, columns of the factors, layout and edits that so many memories take: those being served, and new ones of a
    config.

    Args:
        projection: the `DualMemoryLinear` that serves them.

    Raises:
        ConfigError: `memories` is not a positive number.
    """
    require_sizes(memories=memories)
    d_out, d_ff = projection.out_features, projection.in_features
    if config.layout == "neuron":
        each = max(1, round(config.mask_ratio * d_ff))
    else:  # each weight is drawn by itself: six standard deviations more than are to be expected
        count = d_out * d_ff
        each = min(count, round(config.mask_ratio * count + 6 * (config.mask_ratio * count) ** 0.5))
    # What TIES merges into has the columns or weights of all that it was merged from, in the end all there are.
    ties = config.mode == "merge" and config.merging == "ties"
    more = (d_ff if config.layout == "neuron" else d_out * d_ff) - each if ties else 0
    leveraged = config.route_by == "leverage" and config.protect and config.layout == "neuron"
    rank = min(RANK, each) if leveraged else None
    served, rows, columns, _, edits, _ = projection.size
    new = max(0, memories - served)
    if config.by_subject:
        edits += new * (config.shard_size or _EDITS) + _MERGED * (config.mode == "merge")
    if not served:
        return new * each + more, rank, config.layout, edits
    return rows + new * each + more, max(columns, rank or 0) or None, projection.layout, edits


def size_of(bank: Bank) -> Size:
    """What a bank takes, or has room for."""
    rank = 0 if bank.factors is None else bank.factors.shape[1]
    more = (0 if tensor is None else len(tensor) for tensor in (bank.names, bank.endings, bank.limits))
    return Size(bank.thresholds.shape[0], bank.values.shape[0], rank, *more)


def fits(room: Bank, bank: Bank) -> bool:
    """Whether a bank can be put into the room of another: kind and dtype are the same, and it is not larger."""
    same = room.index.ndim == bank.index.ndim and (room.factors is not None or bank.factors is None)
    same = same and room.values.shape[1:] == bank.values.shape[1:] and room.values.dtype == bank.values.dtype
    return same and all(there >= needed for there, needed in zip(size_of(room), size_of(bank), strict=True))


@torch.no_grad()
def put(room: Bank, bank: Bank | None) -> None:
    """Copy a bank that fits into the tensors of `room`; None frees every slot."""
    room.thresholds.fill_(torch.inf)  # nothing is in scope while values and index disagree
    room.limits.fill_(torch.inf)
    if bank is None:
        room.bounds.zero_()
        return
    memories, rows, rank, names, _, packs = size_of(bank)
    room.names.copy_(subjects.free(len(room.names), room.names.device))
    for name in ("about", "endings", "owners"):
        getattr(room, name).zero_()
    room.alike.fill_(-1.0)
    if names:
        for name in ("names", "about", "endings", "alike", "owners"):
            given = getattr(bank, name)
            getattr(room, name)[: len(given)].copy_(given)
    else:  # none asks for any
        room.names[:memories].fill_(subjects.ANY)
        for name in ("about", "owners"):
            getattr(room, name)[:memories].copy_(torch.arange(memories))
    room.values[:rows].copy_(bank.values)
    room.values[rows:].zero_()  # one memory alone is read to the end
    room.index[: len(bank.index)].copy_(bank.index)
    room.index[len(bank.index) :].zero_()
    if room.factors is not None:
        room.factors.zero_()
        room.leveraged.fill_(bank.factors is not None)
        room.last_limits.fill_(torch.inf)
    if bank.factors is not None:
        room.factors[:rows, :rank].copy_(bank.factors)
    if bank.leveraged is not None:
        room.leveraged[:memories].copy_(bank.leveraged)
    if bank.last_limits is not None:
        room.last_limits[:memories].copy_(bank.last_limits)
    if bank.limits is not None:
        room.limits[:packs, :memories].copy_(bank.limits)
    room.bounds[: memories + 1].copy_(bank.bounds)
    room.bounds[memories + 1 :].fill_(rows)
    room.thresholds[:memories].copy_(bank.thresholds)


def grown(room: Bank, bank: Bank, like: torch.Tensor) -> Bank:
    """Free slots for a bank that does not fit, each size doubled until it does, so that growth is rare."""
    neuron = bank.index.ndim == 1
    d_out = bank.values.shape[1] if neuron else bank.index.shape[1]
    d_ff = room.endings.shape[1]
    same = room.index.ndim == bank.index.ndim
    doubled = tuple(
        _doubled(there if same else needed, needed) for there, needed in zip(size_of(room), size_of(bank), strict=True)
    )
    factors = room.factors is not None or bank.factors is not None
    return blank("neuron" if neuron else "element", (d_out, d_ff), Size(*doubled), factors, like)


def taken(room: Bank, size: Size) -> Bank:
    """A copy of the part of a room that holds something: what is put into the room later is not in it."""
    memories, rows, rank, names, edits, packs = size
    values, neuron = room.values[:rows].clone(), room.index.ndim == 1
    if not neuron:  # kernels may read them in pairs
        values = torch.cat([values, values.new_zeros(1)])[:-1]
    leveraged = None if room.leveraged is None else room.leveraged[:memories]
    factors = None if room.factors is None or not rank else room.factors[:rows, :rank]
    if leveraged is not None and (factors is None or bool(leveraged.all())):
        leveraged = None
    return Bank(
        values,
        room.index[: rows if neuron else memories].clone(),
        room.bounds[: memories + 1].clone(),
        room.thresholds[:memories].clone(),
        None if factors is None else factors.clone(),
        None if leveraged is None else leveraged.clone(),
        room.limits[:packs, :memories].clone() if packs else None,
        None if factors is None else room.last_limits[:memories].clone(),
        *(getattr(room, name)[:names].clone() if names else None for name in ("names", "about")),
        *(getattr(room, name)[:edits].clone() if names else None for name in ("endings", "alike", "owners")),
    )


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size = max(2 * size, 1)
    return size
