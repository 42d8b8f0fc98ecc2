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
    """Thin `U` [K, rank] with `U U^T ~ P_0 - P`, by seeded subspace iteration; `||a U||^2 / ||a||^2` is the leverage.

    `origin` is P_0, the matrix before the first edit, so that unrelated text absorbed into it counts as not taught.
    """
    count = p.shape[0]
    rank = min(rank, count)
    generator = torch.Generator().manual_seed(0)
    taught = origin - p
    basis = torch.randn(count, min(rank + 8, count), generator=generator).to(p.device)
    for _ in range(3):
        basis = torch.linalg.qr(taught @ basis).Q
    values, vectors = torch.linalg.eigh(basis.t() @ taught @ basis)
    factor = basis @ vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
    return factor.half().float()  # half a precision is plenty for a share, and halves what is saved
