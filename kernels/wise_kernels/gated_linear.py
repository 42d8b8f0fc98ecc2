"""A decode step's projection with the chosen side response in one op (eq. 6): y_n = W a_n + b + D_j a_n for
j = choice[n // T], or W a_n + b where the choice is -1; a [N, F], W [O, F], choice [B], N = B T. A prompt, whose choice
is not known yet, takes `dual_forward`, `route` and `gated_add_` instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import autocast, check_neuron, check_weight
from .gated_add import check_gate, differentiable, gated_add_

# Rows up to which a device takes the weight and the values in one launch; more are bound by the matrix units.
FEW_ROWS = 16


def _gated_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    choice: Tensor,
) -> Tensor:
    y = F.linear(a, weight, bias)
    gated_add_(y, a, values, columns, bounds, choice)
    return y


_gated_linear_op = torch.library.custom_op("wise::gated_linear", _gated_linear, mutates_args=())


@_gated_linear_op.register_kernel("cuda")
def _(a, weight, bias, values, columns, bounds, choice):
    if a.shape[0] > FEW_ROWS or a.dtype == torch.float64:
        return _gated_linear(a, weight, bias, values, columns, bounds, choice)
    from .gpu.gated_linear import gated_linear as launch

    return launch(a, weight, bias, values, columns, bounds, choice)


@_gated_linear_op.register_fake
def _(a, weight, bias, values, columns, bounds, choice):
    return a.new_empty(a.shape[0], weight.shape[0])


def gated_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    choice: Tensor,
    exact_main: bool = True,
) -> Tensor:
    """Main output and the chosen side responses (eq. 6), neuron layout; differentiable in every float input.

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        weight: [O, F] in the dtype of `a`, any strides (a Conv1D passes its transposed view).
        bias: [O] in the dtype of `a`, or None.
        values: [R, O] in the dtype of `a`; row r is column `columns[r]` of its memory's D.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of the bank; rows bounds[j]:bounds[j+1] belong to memory j.
        choice: [B] int64 in {-1, ..., J - 1}, B dividing N; row n belongs to sequence n // (N / B).
        exact_main: whether rows out of scope are bit for bit F.linear's. Otherwise up to 16 rows on a device are one
            launch that reads W and the chosen values together, and y differs from F.linear in the last bits. On CPU,
            for more rows, in fp64, without memories and where a gradient is wanted, y is always exact.

    Returns:
        y [N, O] in the dtype of `a`.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for a choice that is not in the bank
    or bounds that do not lie in `values`.
    """
    a, weight, bias, values = autocast(a, weight, bias, values)
    memories = check_neuron(a, values, columns, bounds)
    check_weight(a, weight, bias, values.shape[1])
    check_gate(a, choice)
    given = a, weight, bias, values, columns, bounds, choice
    fused = not exact_main and a.device.type == "cuda" and a.shape[0] <= FEW_ROWS and a.dtype != torch.float64
    if fused and memories and not differentiable(a, weight, bias, values):
        return _gated_linear_op(*given)
    return _gated_linear(*given)
