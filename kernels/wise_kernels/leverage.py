"""Leverage of tokens a [N, F] under J memories in the neuron layout: a_S P_j a_S^T with a_S = a[:, columns_j], how much
of an activation memory j has not been taught (its ridge leverage score to the edits, Alaoui & Mahoney 2015, in units of
lambda). P_j ~ U_j U_j^T with U_j [|S_j|, r] the rows bounds[j]:bounds[j+1] of `factors` [R, r].
"""

import torch
from torch import Tensor

from .checks import check_activations, check_bounds, check_columns, direct, spans, without_autocast


def _thin(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor) -> Tensor:
    out = a.new_empty(bounds.shape[0] - 1, a.shape[0], dtype=torch.float32)
    with without_autocast(a):
        for j, (low, high) in enumerate(spans(bounds, columns.shape[0])):
            if low == high:  # a slot that is free
                out[j] = 0.0
                continue
            # Squares of fp16 activations overflow at 256: go up before squaring, not after.
            active = a.index_select(1, columns[low:high]).float()
            out[j] = (active @ factors[low:high].float()).square_().sum(1)
    return out


_leverage = torch.library.custom_op("wise::leverage", _thin, mutates_args=())


@_leverage.register_kernel("cuda")
def _(a, columns, bounds, factors):
    from .gpu import leverage

    return leverage.leverage(a, columns, bounds, factors)


@_leverage.register_fake
def _(a, columns, bounds, factors):
    return a.new_empty(bounds.shape[0] - 1, a.shape[0], dtype=torch.float32)


def leverage(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor) -> Tensor:
    """Leverage of each token under each memory, ||a_S U_j||^2 in fp32.

    It is the variance of what ridge regression on the edits predicts at a_S, so the norm of a side response over its
    root says how far the response is from chance (`route`).

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of `columns`; its rows and those of `factors` from bounds[j] to bounds[j+1]
            belong to memory j.
        factors: [R, r] floating point; r is common to the memories, thinner factors are padded with zero columns. On a
            device, 16-bit activations are multiplied with 11 significant bits of them: all that fp16 holds.

    Returns:
        [J, N] fp32, in squares of activations; 0 where a memory has been taught all of a token's activation.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds outside of `columns`.
    """
    check_activations(a)
    if factors.dim() != 2 or not factors.is_floating_point():
        raise ValueError(f"factors must be a floating point [R, r], got {factors.dtype} {tuple(factors.shape)}")
    check_columns(columns, factors.shape[0])
    check_bounds(bounds, factors)
    run = _thin if direct(a, columns, bounds, factors) else _leverage
    return run(a, columns, bounds, factors)
