"""Side memories: compact deltas of the value projection, in one of two mask layouts with one interface.

A memory is `W'_j = W + D_j` with `D_j` zero outside its mask (paper, section 2). Only the masked values exist. In the
"neuron" layout the mask is a subset S of the d_ff inputs and `values` is `D_S^T`, [|S|, d_out]; in the "element"
layout it is a bit per weight and `values` packs the weights row by row, [nnz].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

import wise_kernels as kernels
from wise_fast import scope
from wise_fast.errors import ConfigError
from wise_fast.subjects import Names, places, together

_HELD = 0.03  # of an activation's square: directions that are freer than that are let go of where an edit is forgotten


@dataclass(frozen=True)
class Taught:
    """What a memory was taught, for merging.

    Attributes:
        information: [K, K] fp32, `P^-1 - P_0^-1`: the covariance of its edits' activations over lambda.
        origin: `P_0`, of the memory before its first edit.
        keys: of a sample of its edits that hold, (index of the edit, prompt activations [n, K]), for thresholds.
    """

    information: Tensor
    origin: Tensor
    keys: tuple[tuple[int, Tensor], ...]


@dataclass(frozen=True)
class SideMemory:
    """One side memory as a value: editing makes a new one, so old states can be kept and restored.

    Attributes:
        layout: "neuron" or "element".
        values: fp32, [K, d_out] (neuron) or [nnz] (element).
        index: [K] int64 sorted columns (neuron), or [d_out, ceil(d_ff/32)] int32 mask bits (element).
        shape: (d_out, d_ff) of the projection.
        threshold: eps of the routing rule, in score units; infinite while the memory holds no edit.
        z_threshold: the same where scores are over the root of their leverage.
        last_limit: how new the last token of a prompt may be before it has to be louder (`wise_fast.scope`); infinite
            where there is no limit.
        factor: [K, r] fp32 thin factor of what it has not been taught (`protection.untaught_factor`), for leverage;
            None without the protected update.
        names: what its edits are about (`wise_fast.subjects`); None where scope does not ask.
        edits: indices of the edits it holds, in the editor's order.
        taught: what a covariance-weighted merge needs to know of it; None where none will come.
    """

    layout: str
    values: Tensor
    index: Tensor
    shape: tuple[int, int]
    threshold: float = float("inf")
    z_threshold: float = float("inf")
    last_limit: float = float("inf")
    factor: Tensor | None = None
    names: Names | None = None
    edits: tuple[int, ...] = ()
    taught: Taught | None = None

    @classmethod
    def blank(cls, layout: str, shape: tuple[int, int], ratio: float, generator: torch.Generator, device) -> SideMemory:
        """A memory of zeros under a random mask of density `ratio` (Theorem 2.1), drawn from `generator` (CPU)."""
        d_out, d_ff = shape
        if layout == "neuron":
            count = max(1, round(ratio * d_ff))
            index = torch.randperm(d_ff, generator=generator)[:count].sort().values
            values = torch.zeros(count, d_out)
        else:
            mask = torch.rand(d_out, d_ff, generator=generator) < ratio
            index, values = kernels.pack_bits(mask), torch.zeros(int(mask.sum()))
        return cls(layout, values.to(device), index.to(device), (d_out, d_ff))

    def select(self, a: Tensor) -> Tensor:
        """The part of activations that the memory reads, fp32: [N, K] (neuron) or [N, d_ff] (element). Where that is
        all of them, fp32 ones are not copied."""
        part = self.layout == "neuron" and len(self.index) < self.shape[1]
        return (a[:, self.index] if part else a).float()

    def spread(self, selected: Tensor) -> float:
        """Root of a prompt's mean leverage, activations from `select`: what its score is measured by."""
        return float((selected @ self.factor).square().sum(-1).mean().sqrt())

    def newness(self, selected: Tensor) -> float:
        """How new the last token of a prompt is, activations from `select` (`wise_fast.scope`)."""
        last = selected[-1:]
        return float(scope.newness((last @ self.factor).square().sum(), self.respond(last).norm()))

    def respond(self, selected: Tensor, values: Tensor | None = None) -> Tensor:
        """Side response `a D^T`, [N, d_out] fp32, of activations from `select`; `values` stand in for the memory's."""
        values = self.values if values is None else values
        if self.layout == "neuron":
            return selected @ values
        bounds = torch.arange(2, device=values.device) * values.numel()  # made there: nothing is copied to the device
        side, _ = kernels.side_forward_element(selected, values, self.index[None], bounds)
        return side[0]

    def forget(self, edit: int, a: Tensor | None) -> SideMemory:
        """The memory that is no longer asked for one of its edits: it loses the edit's name. Given the prompt's
        activations [n, d_ff] it also loses of its response to them what can be taken without moving others much,

            D <- D - P A^T (A P A^T + r)^-1 A D

        with `P` as the leverage factor knows it: where all of a prompt's directions were taught, next to nothing is
        left to take it from. The element layout keeps it.
        """
        names = None if self.names is None else self.names.without([self.edits.index(edit)])
        if self.layout == "element" or a is None:
            return self.replace(names=names)
        selected = self.select(a)
        reached = selected if self.factor is None else selected @ self.factor
        gram = (reached @ reached.t()).double()
        gram.diagonal().add_(_HELD * selected.square().sum(-1).mean())
        share = torch.linalg.solve(gram, self.respond(selected).double()).float()
        moved = reached.t() @ share
        moved = moved if self.factor is None else self.factor @ moved
        return self.replace(names=names, values=storable(self.values - moved))

    def dense(self) -> Tensor:
        """`D` as [d_out, d_ff], for export and tests."""
        if self.layout == "neuron":
            out = self.values.new_zeros(self.shape[1], self.shape[0])
            out[self.index] = self.values
            return out.t()
        out = self.values.new_zeros(self.shape)
        out[kernels.unpack_bits(self.index, self.shape[1])] = self.values
        return out

    def replace(self, **changes) -> SideMemory:
        return replace(self, **changes)


def alike(memories: Iterable[SideMemory], route_by: str) -> list[SideMemory]:
    """Those that hold an edit, with one kind of score: without leverage factors unless `route_by` is "leverage" and all
    have theirs. Scores of memories that compete to be the right one of one editor are compared.
    """
    memories = [m for m in memories if m.edits]
    if route_by == "leverage" and all(m.factor is not None for m in memories):
        return memories
    return [m.replace(factor=None) for m in memories]


def storable(values: Tensor) -> Tensor:
    """Values rounded so that half precision holds them exactly, in fp32; untouched where its range does not reach.

    A delta's last bits do nothing, and a saved memory is half the size without them.
    """
    rounded = values.half().float()
    close = torch.allclose(rounded, values, rtol=2**-10, atol=2**-12 * float(values.abs().max()) if len(values) else 0)
    return rounded if close else values


@dataclass(frozen=True)
class Bank:
    """Side memories packed for serving: the arguments of the `wise_kernels` ops.

    Attributes:
        values, index: concatenated over memories (element bits are stacked, [J, d_out, words]).
        bounds: [J + 1] int64 into `values`, on its device: a change of bank is a change of data, not of code.
        thresholds: [J] fp32.
        factors: [sum K, r] fp32, or None when no score is over the root of its leverage.
        leveraged: [J] bool, whose scores are; None when all of them or none.
        limits: [R, J] fp32, thresholds by what a sequence asks for; None when all ask for the same (see `packs`).
        last_limits: [J] fp32, of the last tokens' newness (`wise_fast.scope`); None when no memory has one.
        names, about, endings, alike, owners: what sequences have to name, and how to end (`subjects.named`); None when
            no memory asks for it.
    """

    values: Tensor
    index: Tensor
    bounds: Tensor
    thresholds: Tensor
    factors: Tensor | None
    leveraged: Tensor | None = None
    limits: Tensor | None = None
    last_limits: Tensor | None = None
    names: Tensor | None = None
    about: Tensor | None = None
    endings: Tensor | None = None
    alike: Tensor | None = None
    owners: Tensor | None = None

    @classmethod
    def join(cls, memories: Sequence[SideMemory], dtype: torch.dtype) -> Bank | None:
        """Pack memories, each scored over the root of its leverage if it has a factor; None when there are none.

        Raises:
            ConfigError: the memories differ in layout or shape.
        """
        if not memories:
            return None
        if len({(m.layout, m.shape) for m in memories}) > 1:
            raise ConfigError("a bank holds memories of one layout and one projection shape")
        layout = memories[0].layout
        bounds = list(accumulate((m.values.shape[0] for m in memories), initial=0))
        joined = torch.cat if layout == "neuron" else torch.stack
        thresholds = [m.threshold if m.factor is None else m.z_threshold for m in memories]
        factors, leveraged = None, [m.factor is not None for m in memories]
        if any(leveraged):
            rank = max(m.factor.shape[1] for m in memories if m.factor is not None)
            thin = [m.values.new_zeros(len(m.values), 0) if m.factor is None else m.factor for m in memories]
            factors = torch.cat([torch.nn.functional.pad(f, (0, rank - f.shape[1])) for f in thin])
        last = [float("inf") if m.factor is None else m.last_limit for m in memories]
        named = {}
        if any(m.names is not None for m in memories):
            each = [m.names or Names.open(1, m.shape[1], m.values.device) for m in memories]
            counts = torch.tensor([len(names.endings) for names in each], device=memories[0].values.device)
            limits = torch.tensor([names.limit for names in each], device=counts.device)
            tokens, about, endings = together(each)
            unit = torch.nn.functional.normalize(endings, dim=-1)
            named = dict(names=places(tokens), about=about, endings=unit)
            named |= dict(alike=limits.repeat_interleave(counts))
            named |= dict(owners=torch.arange(len(each), device=counts.device).repeat_interleave(counts))
        values = torch.cat([m.values for m in memories]).to(dtype)
        if layout == "element":
            # One more in the storage, so that kernels may read them in pairs.
            values = torch.cat([values, values.new_zeros(1)])[:-1]
        return cls(
            values,
            joined([m.index for m in memories]),
            torch.tensor(bounds, device=values.device),
            torch.tensor(thresholds, device=values.device),
            factors,
            torch.tensor(leveraged, device=values.device) if any(leveraged) and not all(leveraged) else None,
            last_limits=torch.tensor(last, device=values.device) if any(leveraged) else None,
            **named,
        )
