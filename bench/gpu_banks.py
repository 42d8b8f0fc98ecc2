"""Shapes of well-known models and random banks of memories on a device, for `bench.gpu`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wise_kernels import pack_bits, popcount_table

RHO = 0.2
# Value projections, (outputs, inputs).
SHAPES = {
    "Llama-2-7B": (4096, 11008),
    "Llama-3-8B": (4096, 14336),
    "GPT-J": (4096, 16384),
    "Gemma-3-270M": (640, 2048),
}


@dataclass(frozen=True)
class Place:
    """Where cases are built, in full size or, for a dry run, with every dimension a small share of the real one."""

    device: torch.device
    full: bool

    def shape(self, model: str) -> tuple[int, int]:
        outputs, width = SHAPES[model]
        return (outputs, width) if self.full else (outputs // 64, width // 64)

    def rows(self, rows: int) -> int:
        return rows if self.full else min(rows, 16)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=self.device) * scale).to(dtype)


@dataclass(frozen=True)
class Bank:
    """J memories of density rho in one layout; `dense` is what plain PyTorch keeps of them in the element layout,
    `popcounts` what ours does."""

    layout: str
    values: Tensor
    index: Tensor
    bounds: Tensor
    dense: Tensor | None
    popcounts: Tensor | None = None

    @property
    def keep(self) -> dict[str, Tensor]:
        """What a served bank keeps besides, as keywords of the ops that take it."""
        return {} if self.popcounts is None else {"popcounts": self.popcounts}

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.values, self.index, self.bounds

    @property
    def nbytes(self) -> int:
        """Bytes of one pass over all memories."""
        return self.values.nbytes + self.index.nbytes

    def respond(self, a: Tensor, j: int) -> Tensor:
        """a D_j^T in plain PyTorch: gathered columns and a small product, or a dense product."""
        if self.layout == "element":
            return a @ self.dense[j].t()
        size = self.values.shape[0] // (self.bounds.shape[0] - 1)
        return a[:, self.index[j * size : (j + 1) * size]] @ self.values[j * size : (j + 1) * size]


def make_bank(place: Place, layout: str, model: str, memories: int, dtype: torch.dtype, dense: bool = True) -> Bank:
    """A random bank; `dense` keeps the element layout's dense matrices for the plain arm."""
    outputs, width = place.shape(model)
    if layout == "neuron":
        size = round(RHO * width)
        index = torch.cat([torch.randperm(width, device=place.device)[:size].sort().values for _ in range(memories)])
        values = place.normal(memories * size, outputs, dtype=dtype, scale=0.02)
    else:
        # One mask for all memories: masks cost time to draw, and each memory has its own copy all the same.
        mask = torch.rand(outputs, width, device=place.device) < RHO
        index = pack_bits(mask)[None].repeat(memories, 1, 1)
        size = int(mask.sum())
        values = place.normal(memories * size, dtype=dtype, scale=0.02)
    bounds = torch.arange(memories + 1, device=place.device) * size
    full = None
    if layout == "element" and dense:
        full = torch.zeros(memories, outputs, width, dtype=dtype, device=place.device)
        for j in range(memories):
            full[j][mask] = values[j * size : (j + 1) * size]
    return Bank(layout, values, index, bounds, full, popcount_table(index) if layout == "element" else None)
