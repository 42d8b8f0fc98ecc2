"""Closing shards: k compact shards become one side memory, by TIES (paper, section 3.3) or weighted by covariances."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import wise_kernels as kernels
from wise_fast.calibration import Keys, calibrated
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory, Taught, storable
from wise_fast.state import EditorState, Shard
from wise_fast.subjects import Names

_RIDGE = 0.03  # of a merge by covariances, in units of lambda: what unrelated text may still hold against the edits
_SAMPLE = 100  # edits whose prompts a merged memory's thresholds are taken from


def close_shard(state: EditorState, config: WiseConfig) -> EditorState:
    """The state with its open shard closed; in mode "merge", full groups become one memory."""
    memory = state.shard.memory
    if config.mode == "retrieve":
        return state.replace(merged=(*state.merged, memory), shard=None)
    if config.merging == "regmean":
        memory = memory.replace(taught=_taught(state.shard, {i for i, r in enumerate(state.reports) if r.success}))
    state = state.replace(closed=(*state.closed, memory), shard=None)
    return state if len(state.closed) < config.shards else merge_closed(state, config)


def merge_closed(state: EditorState, config: WiseConfig) -> EditorState:
    """The state with all closed shards, and what was merged before, in one memory (mode "merge")."""
    memories = (*state.merged, *state.closed)
    merge = merge_by_covariance if config.merging == "regmean" else _merge_by_ties
    merged = merge(memories, config)
    return state.replace(merged=merged, closed=(), merges=state.merges + (len(merged) < len(memories)))


def _merge_by_ties(memories: Sequence[SideMemory], config: WiseConfig) -> tuple[SideMemory, ...]:
    return (merge_memories(memories, config.density),)


def merge_memories(memories: Sequence[SideMemory], density: float) -> SideMemory:
    """TIES-merge memories of one layout; each weighs as many edits as it holds.

    Every entry of the disjoint mean is an average over the memories that agree, weighted by their edits, so a memory
    that was merged before is not diluted by later ones (no fixed 0.4 / 0.6). The threshold is the least of theirs.
    """
    weights = [float(max(len(m.edits), 1)) for m in memories]
    first = memories[0]
    values, index = kernels.ties_merge([_rows(m) for m in memories], [_places(m) for m in memories], density, weights)
    if first.layout == "element":
        mask = torch.zeros(first.shape[0] * first.shape[1], dtype=torch.bool, device=index.device)
        mask[index] = True
        values, index = values[:, 0], kernels.pack_bits(mask.view(first.shape))
    return first.replace(
        values=values,
        index=index,
        threshold=min(m.threshold for m in memories),
        z_threshold=float("inf"),
        last_limit=float("inf"),
        factor=None,
        names=_names(memories),
        taught=None,
        edits=tuple(e for m in memories for e in m.edits),
    )


def merge_by_covariance(memories: Sequence[SideMemory], config: WiseConfig) -> tuple[SideMemory, ...]:
    """One memory of those that were taught here: what answers all their edits with the least squared error, weighted by
    how often each direction was taught (RegMean; Jin et al. 2023). Loaded ones stay as they are: nobody knows theirs.

        D = (sum C_j + mu P_0^-1)^-1 sum C_j D_j,  C_j = P_j^-1 - P_0^-1

    It is as protected as if all edits had been written into it, P = (sum C_j + P_0^-1)^-1, and no larger than each.
    """
    known = [m for m in memories if m.taught is not None]
    if len(known) < 2:
        return tuple(memories)
    first, origin = known[0], known[0].taught.origin
    before = torch.linalg.inv(origin.double())
    parts = [(m.taught.information.double(), m.values.double()) for m in known]
    information = torch.stack([c for c, _ in parts]).sum(0)
    values = torch.linalg.solve(information + _RIDGE * before, torch.stack([c @ d for c, d in parts]).sum(0))
    keys = [key for m in known for key in m.taught.keys]
    merged = first.replace(
        values=storable(values.float().contiguous()),
        names=_names(known),
        edits=tuple(e for m in known for e in m.edits),
        taught=Taught(information.float().contiguous(), origin, ()),
    )
    merged, _ = recalibrated(merged, protection_of(merged.taught), keys, (), config)
    return (*(m for m in memories if m.taught is None), merged)


def protection_of(taught: Taught) -> Tensor:
    """`P` of a merged memory: as protected as if all that it was taught had been written into it."""
    return torch.linalg.inv(taught.information.double() + torch.linalg.inv(taught.origin.double())).float()


def recalibrated(
    memory: SideMemory, p: Tensor, keys: Keys, holds: Collection[int], config: WiseConfig
) -> tuple[SideMemory, dict[int, float]]:
    """A merged memory with the thresholds that a sample of these keys gives, and the routing scores of that sample.

    Args:
        p: its `P`.
        holds: the edits that hold; empty where nobody knows.
    """
    keys = _sampled([key for key in keys if key[0] in holds] or keys)
    memory = memory.replace(taught=replace(memory.taught, keys=keys))
    return calibrated(memory, p, keys, holds, config)


def _taught(shard: Shard, holds: set[int]) -> Taught:
    information = torch.linalg.inv(shard.p.double()) - torch.linalg.inv(shard.origin.double())
    keys = [key for key in shard.keys if key[0] in holds] or list(shard.keys)
    # An inverse comes by columns, and sums over those round otherwise than over what a checkpoint gives back.
    return Taught(information.float().contiguous(), shard.origin, _sampled(keys))


def _names(memories: Sequence[SideMemory]) -> Names | None:
    """The subjects of all; None if one does not ask for any."""
    first, *others = (m.names for m in memories)
    return None if first is None or None in others else first.join(*others)


def _sampled(keys: Keys) -> tuple[tuple[int, Tensor], ...]:
    """At most so many of them, evenly spread."""
    count = min(len(keys), _SAMPLE)
    return tuple(keys[i * len(keys) // count] for i in range(count))


def _rows(memory: SideMemory) -> Tensor:
    return memory.values if memory.layout == "neuron" else memory.values[:, None]


def _places(memory: SideMemory) -> Tensor:
    if memory.layout == "neuron":
        return memory.index
    return kernels.unpack_bits(memory.index, memory.shape[1]).flatten().nonzero()[:, 0]
