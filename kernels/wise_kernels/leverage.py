"""Leverage of tokens a [N, F] under J memories in the neuron layout (DESIGN section 6): the share of the activation
that lies in what the memory has been taught, 1 - a_S P_j a_S^T / ||a_S||^2 = ||a_S U_j||^2 / ||a_S||^2 with
a_S = a[:, columns_j], P_j = I - U_j U_j^T and U_j [|S_j|, r] the rows bounds[j]:bounds[j+1] of `factors` [R, r].
"""

import torch
from torch import Tensor

from .checks import check_activations, check_bounds, check_columns, spans


@torch.library.custom_op("wise::leverage", mutates_args=())
def _leverage(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor) -> Tensor:
    out = a.new_empty(bounds.shape[0] - 1, a.shape[0], dtype=torch.float32)
    # Autocast would round the products that this ratio exists to compare.
    with torch.autocast(a.device.type, enabled=False):
        for j, (low, high) in enumerate(spans(bounds, columns.shape[0])):
            # Squares of fp16 activations overflow at 256: go up before squaring, not after.
            active = a.index_select(1, columns[low:high]).float()
            taught = (active @ factors[low:high].float()).square().sum(1)
            total = active.square().sum(1)
            # A token with no activation on S has been taught nothing, and 0 / 0 would be NaN.
            out[j] = torch.where(total > 0, taught / total, 0.0)
    return out


@_leverage.register_kernel("cuda")
def _(a, columns, bounds, factors):
    from .gpu import leverage

    return leverage.leverage(a, columns, bounds, factors)


@_leverage.register_fake
def _(a, columns, bounds, factors):
    return a.new_empty(bounds.shape[0] - 1, a.shape[0], dtype=torch.float32)


def leverage(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor) -> Tensor:
    """Leverage of each token under each memory, ||a_S U_j||^2 / ||a_S||^2 in fp32 (DESIGN section 6).

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of `columns`; its rows and those of `factors` from bounds[j] to bounds[j+1]
            belong to memory j.
        factors: [R, r] floating point; r is common to the memories, thinner factors are padded with zero columns. On a
            device, 16-bit activations are multiplied with 11 significant bits of them: all that fp16 holds.

    Returns:
        [J, N] fp32; 0 where a_S is 0, in [0, 1] where U_j U_j^T <= I.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not cover `columns`.
    """
    check_activations(a)
    if factors.dim() != 2 or not factors.is_floating_point():
        raise ValueError(f"factors must be a floating point [R, r], got {factors.dtype} {tuple(factors.shape)}")
    check_columns(columns, factors.shape[0])
    check_bounds(bounds, factors)
    return _leverage(a, columns, bounds, factors)
