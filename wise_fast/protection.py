"""Protected update: earlier edits of a shard are moved as little as possible (DESIGN section 2).

With `C = sum a_S^T a_S` over the token activations of the edits already in the shard, the update of the next edit is
`D_S^T += P Z`, `P = (I + C / lambda)^-1`, and training `Z` needs the features `a_S P` alone. After each edit, recursive
least squares: `P <- P - P a^T (lambda I + a P a^T)^-1 a P`.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANK = 128  # of the leverage factor


def identity(count: int, device: torch.device | str) -> Tensor:
    """`P` of an untouched shard, [K, K] fp32."""
    return torch.eye(count, device=device)


def absorb(p: Tensor, a: Tensor, strength: float) -> Tensor:
    """`P` after an edit with token activations `a` [N, K] has been written.

    `strength` is lambda in units of the mean of `a P a^T` over the tokens, so it falls as the columns fill.
    """
    half = gain(p, weighted(p, a, strength))
    return torch.addmm(p, half.t(), half, alpha=-1.0)


def weighted(p: Tensor, a: Tensor, strength: float) -> Tensor:
    """`a / sqrt(lambda)` [N, K], which holds all that `P` takes from these activations: lambda is 1 for them."""
    scale = strength * ((a @ p) * a).sum(-1).mean().clamp_min(torch.finfo(p.dtype).tiny)
    return a / scale.sqrt()


def gain(p: Tensor, a: Tensor) -> Tensor:
    """`H` [N, K] such that `P - H^T H` is the matrix once `a` [N, K], `weighted`, has been written."""
    pa = a @ p
    gram = pa @ a.t()
    gram.diagonal().add_(1.0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), pa, upper=False)


def taught_factor(p: Tensor, origin: Tensor, rank: int = RANK) -> Tensor:
    """Thin `U` [K, rank] with `a U U^T a^T ~ a (P_0 - P) a^T`; `||a U||^2 / ||a||^2` is the leverage.

    Half of the columns are the largest directions, by seeded subspace iteration; the others a random projection of the
    rest, so that `E[U U^T] = P_0 - P`. The largest are of words that many prompts share, the rest tells memories apart.
    Chance may put a leverage a little above 1.

    `origin` is P_0, the matrix before the first edit, so that unrelated text absorbed into it counts as not taught.
    """
    count = p.shape[0]
    rank = min(rank, count)
    generator = torch.Generator().manual_seed(0)  # one for all memories: what chance does to their leverages is alike
    taught = origin - p
    largest = _largest(taught, rank if rank == count else rank // 2, generator)
    if largest.shape[1] == rank:
        return largest.half().float()
    factor = _cholesky(torch.addmm(taught, largest, largest.t(), alpha=-1.0), taught.diagonal().max())
    chance = torch.randn(count, rank - largest.shape[1], generator=generator).to(p.device)
    rest = factor @ chance / chance.shape[1] ** 0.5
    return torch.cat([largest, rest], 1).half().float()  # half a precision is plenty for a share, and half to save


def _largest(taught: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """`U` [K, rank] with `U U^T` the part of a positive matrix [K, K] in its largest directions, by Nystrom's formula:
    unlike by its own, what is left is positive too."""
    count = taught.shape[0]
    basis = torch.randn(count, min(rank + 8, count), generator=generator).to(taught.device)
    for _ in range(3):
        basis = torch.linalg.qr(taught @ basis).Q
    reached = taught @ basis
    values, vectors = torch.linalg.eigh(basis.t() @ reached)
    least = (1e-6 * values[-1]).clamp_min(torch.finfo(values.dtype).tiny)
    return reached @ vectors[:, -rank:] / values[-rank:].clamp_min(least).sqrt()


def _cholesky(matrix: Tensor, scale: Tensor) -> Tensor:
    """`L` with `L L^T` a matrix [K, K] that is positive but for rounding errors of numbers as large as `scale`, which a
    small multiple of I makes up for."""
    eye = scale.clamp_min(torch.finfo(scale.dtype).eps) * torch.eye(len(matrix), device=matrix.device)
    for power in range(-6, -1):
        factor, failed = torch.linalg.cholesky_ex(matrix + 10**power * eye)
        if not failed:
            return factor
    raise ValueError("P_0 - P is not positive: P is not of that P_0, or is not finite")
