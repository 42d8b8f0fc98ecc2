"""Protected update: earlier edits of a shard are moved as little as possible.

With `C = sum a_S^T a_S` over the token activations of the edits already in the shard, the update of the next edit is
`D_S^T += P Z`, `P = (I + C / lambda)^-1`, and training `Z` needs the features `a_S P` alone. After each edit, recursive
least squares: `P <- P - P a^T (lambda I + a P a^T)^-1 a P`.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANK = 128  # of the leverage factor: a token's share is known to within an eighth, a prompt's mean far better


def identity(count: int, device: torch.device | str) -> Tensor:
    """`P` of an untouched shard, [K, K] fp32."""
    return torch.eye(count, device=device)


def absorb(p: Tensor, a: Tensor, strength: float) -> Tensor:
    """`P` after an edit with token activations `a` [N, K] has been written.

    `strength` is lambda in units of the mean of `a P a^T` over the tokens, so it falls as the columns fill.
    """
    pa = a @ p
    scale = weight(a, pa, strength)
    half = gain(scale * pa, scale * a)
    return torch.addmm(p, half.t(), half, alpha=-1.0)


def weight(a: Tensor, pa: Tensor, strength: float) -> Tensor:
    """What activations `a` [N, K] with products `pa = a P` are multiplied by to hold all that `P` takes from them:
    `1 / sqrt(lambda)`, lambda being 1 for the result."""
    return (strength * (pa * a).sum(-1).mean().clamp_min(torch.finfo(a.dtype).tiny)).rsqrt()


def gain(pa: Tensor, a: Tensor) -> Tensor:
    """`H` [N, K] such that `P - H^T H` is the matrix once `a` [N, K], weighted, has been written; `pa = a P`."""
    gram = pa @ a.t()
    gram.diagonal().add_(1.0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), pa, upper=False)


def untaught_factor(p: Tensor, rank: int = RANK) -> Tensor:
    """Thin `U` [K, rank] with `E[U U^T] = P`, so that `||a U||^2` says how much of an activation was not taught: its
    ridge leverage score `a P a^T` to the edits, unrelated text included. A random projection of P's Cholesky factor.
    """
    count = p.shape[0]
    generator = torch.Generator().manual_seed(0)  # one for all memories: what chance does to their leverages is alike
    chance = torch.randn(count, min(rank, count), generator=generator).to(p.device)
    factor = _cholesky(p) @ chance / chance.shape[1] ** 0.5
    return factor.half().float()  # half a precision is plenty for a share, and half to save


def _cholesky(p: Tensor) -> Tensor:
    """`L` with `L L^T = P` but for a small multiple of I that makes up for the rounding errors of many updates."""
    eye = torch.eye(len(p), device=p.device)
    for power in range(-6, -1):
        factor, failed = torch.linalg.cholesky_ex(p + 10**power * eye)
        if not failed:
            return factor
    raise ValueError("P is not positive, or not finite")
