"""Leverage of tokens a [N, F] under J memories in the neuron layout (after DESIGN section 6): 1 - a_S P_j a_S^T / c_j
with a_S = a[:, columns_j]. P_j says what memory j has not been taught, c_j how much of it a prompt in its scope may
hold. P_j ~ U_j U_j^T with U_j [|S_j|, r] the rows bounds[j]:bounds[j+1] of `factors` [R, r].
"""

import torch
from torch import Tensor

from .checks import check_activations, check_bounds, check_columns, spans


@torch.library.custom_op("wise::leverage", mutates_args=())
def _leverage(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor, ceilings: Tensor) -> Tensor:
    out = a.new_empty(bounds.shape[0] - 1, a.shape[0], dtype=torch.float32)
    # Autocast would round the products that this ratio exists to compare.
    with torch.autocast(a.device.type, enabled=False):
        for j, (low, high) in enumerate(spans(bounds, columns.shape[0])):
            # Squares of fp16 activations overflow at 256: go up before squaring, not after.
            active = a.index_select(1, columns[low:high]).float()
            out[j] = 1 - (active @ factors[low:high].float()).square().sum(1) / ceilings[j].float()
    return out


@_leverage.register_kernel("cuda")
def _(a, columns, bounds, factors, ceilings):
    from .gpu import leverage

    return leverage.leverage(a, columns, bounds, factors, ceilings)


@_leverage.register_fake
def _(a, columns, bounds, factors, ceilings):
    return a.new_empty(bounds.shape[0] - 1, a.shape[0], dtype=torch.float32)


def leverage(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor, ceilings: Tensor) -> Tensor:
    """Leverage of each token under each memory, 1 - ||a_S U_j||^2 / ceiling_j in fp32 (after DESIGN section 6).

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of `columns`; its rows and those of `factors` from bounds[j] to bounds[j+1]
            belong to memory j.
        factors: [R, r] floating point; r is common to the memories, thinner factors are padded with zero columns. On a
            device, 16-bit activations are multiplied with 11 significant bits of them: all that fp16 holds.
        ceilings: [J] floating point above 0, in squares of activations; infinity makes every leverage 1.

    Returns:
        [J, N] fp32: 1 where a memory has been taught all of a token's activation, below 0 beyond its ceiling.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not cover `columns`.
    """
    check_activations(a)
    if factors.dim() != 2 or not factors.is_floating_point():
        raise ValueError(f"factors must be a floating point [R, r], got {factors.dtype} {tuple(factors.shape)}")
    check_columns(columns, factors.shape[0])
    check_bounds(bounds, factors)
    memories = bounds.shape[0] - 1
    if ceilings.shape != (memories,) or not ceilings.is_floating_point():
        raise ValueError(
            f"ceilings must be a floating point [{memories}], got {ceilings.dtype} {tuple(ceilings.shape)}"
        )
    return _leverage(a, columns, bounds, factors, ceilings)
