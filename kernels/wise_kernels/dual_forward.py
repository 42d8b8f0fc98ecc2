"""Main projection, side responses and routing norms of activations a [N, F] in one op: y = a W^T + b [N, O],
side_j = a D_j^T [J, N, O], norms_j(t) = ||a_t D_j^T||_2 [J, N] (eq. 3). y is exactly F.linear(a, W, b): a model with
memories that are out of scope answers bit for bit like the unedited one (unless told to fuse it, `exact_main`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import autocast, check_element, check_neuron, check_weight, direct
from .side_forward import (
    element_side,
    element_side_gpu,
    empty_side,
    neuron_side,
    neuron_side_gpu,
    side_backward,
    side_backward_element,
)

# Entries of responses that are kept for one of them to be added: 4 MB in fp32.
KEPT = 1 << 20


def keeps_response(memories: int, rows: int, outputs: int, device: torch.device) -> bool:
    """Whether to ask for responses [J, N, O] where at most one of them will be added.

    One memory's, yes. Of several on the CPU too, where they cost no time but their memory, as long as that is small; on
    a device they cost its bandwidth, and the product of the one that is chosen costs less.

    Args:
        memories, rows, outputs: J, N and O.
        device: of the bank.
    """
    if memories == 1 or device.type != "cpu" or torch.compiler.is_compiling():  # a guard on sizes would compile again
        return memories == 1
    return memories * rows * outputs <= KEPT


@torch.library.custom_op("wise::dual_forward", mutates_args=())
def _dual_forward(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    response: bool,
    exact_main: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    # The same call as the unedited layer's, on the same strides, is what makes y identical to the bit.
    return F.linear(a, weight, bias), *neuron_side(a, values, columns, bounds, response)


@torch.library.custom_op("wise::dual_forward_element", mutates_args=())
def _dual_forward_element(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    bits: Tensor,
    bounds: Tensor,
    response: bool,
    popcounts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(a, weight, bias), *element_side(a, values, bits, bounds, response)


@_dual_forward.register_kernel("cuda")
def _(a, weight, bias, values, columns, bounds, response, exact_main=True):
    if exact_main or a.dtype == torch.float64:
        return F.linear(a, weight, bias), *neuron_side_gpu(a, values, columns, bounds, response)
    from .gpu.dual_forward import dual_forward as launch

    return launch(a, weight, bias, values, columns, bounds, response)


@_dual_forward_element.register_kernel("cuda")
def _(a, weight, bias, values, bits, bounds, response, popcounts=None):
    return F.linear(a, weight, bias), *element_side_gpu(a, values, bits, bounds, response, popcounts)


@_dual_forward.register_fake
@_dual_forward_element.register_fake
def _fake(a, weight, bias, values, layout, bounds, response, option=None):
    y = a.new_empty(a.shape[0], weight.shape[0])
    return y, *empty_side(a, bounds.shape[0] - 1, weight.shape[0], response)


def _setup_context(ctx, inputs, output):
    a, weight, _, values, layout, bounds, ctx.response, _ = inputs
    ctx.save_for_backward(weight, a, values, layout, bounds, *output[1:])


def _linear_backward(ctx, grad_y: Tensor, weight: Tensor, a: Tensor):
    # A frozen projection is the rule: its [O, F] gradient must not be formed unless someone asks for it.
    grad_weight = grad_y.t() @ a if ctx.needs_input_grad[1] else None
    grad_bias = grad_y.sum(0) if ctx.needs_input_grad[2] else None
    return grad_y @ weight, grad_weight, grad_bias


def _backward(ctx, grad_y, grad_side, grad_norms):
    weight, *saved = ctx.saved_tensors
    grad_a, grad_weight, grad_bias = _linear_backward(ctx, grad_y, weight, saved[0])
    grad_side_a, grad_values = side_backward(grad_side, grad_norms, *saved, ctx.response)
    return grad_a + grad_side_a, grad_weight, grad_bias, grad_values, None, None, None, None


def _backward_element(ctx, grad_y, grad_side, grad_norms):
    weight, *saved = ctx.saved_tensors
    grad_a, grad_weight, grad_bias = _linear_backward(ctx, grad_y, weight, saved[0])
    grad_side_a, grad_values = side_backward_element(grad_side, grad_norms, *saved, ctx.response)
    return grad_a + grad_side_a, grad_weight, grad_bias, grad_values, None, None, None, None


_dual_forward.register_autograd(_backward, setup_context=_setup_context)
_dual_forward_element.register_autograd(_backward_element, setup_context=_setup_context)


def dual_forward(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    response: bool = True,
    exact_main: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Main output, side responses and routing norms (eq. 3), neuron layout; differentiable in every float input.

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        weight: [O, F] in the dtype of `a`, any strides (a Conv1D passes its transposed view).
        bias: [O] in the dtype of `a`, or None.
        values: [R, O] in the dtype of `a`; row r is column `columns[r]` of its memory's D.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of the bank; rows bounds[j]:bounds[j+1] belong to memory j.
        response: whether to keep the responses, not only their norms.
        exact_main: on a device, whether y comes from F.linear's own kernel, in a launch of its own. Otherwise one
            launch gives y and the responses. It reads as many bytes and multiplies as often. On an H100 it took
            3 % less time for one row and some 6 % more for 2048, whose matrix product F.linear does better. And y
            differs from F.linear in the last bits: a model whose memories are all out of scope no longer repeats the
            unedited one exactly. On CPU y is always exact.

    Returns:
        y [N, O], with `exact_main` bit-identical to F.linear(a, weight, bias); side [J, N, O] in the dtype of `a`
        ([J, 0, O] without `response`); norms [J, N] fp32.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not lie in `values`.
    """
    a, weight, bias, values = autocast(a, weight, bias, values)
    check_neuron(a, values, columns, bounds)
    check_weight(a, weight, bias, values.shape[1])
    if direct(a, weight, bias, values, columns, bounds):
        return F.linear(a, weight, bias), *neuron_side(a, values, columns, bounds, response)
    return _dual_forward(a, weight, bias, values, columns, bounds, response, exact_main)


def dual_forward_element(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    bits: Tensor,
    bounds: Tensor,
    response: bool = True,
    popcounts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Main output, side responses and routing norms (eq. 3), element layout; differentiable in every float input.

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        weight: [O, F] in the dtype of `a`, any strides (a Conv1D passes its transposed view).
        bias: [O] in the dtype of `a`, or None.
        values: [V] in the dtype of `a`, packed row-major over each memory's mask.
        bits: [J, O, ceil(F/32)] int32, see `bits.py`.
        bounds: [J + 1] int64 on the device of the bank; values[bounds[j]:bounds[j+1]] belong to memory j, one to each
            of its set bits.
        response: whether to keep the responses, not only their norms.
        popcounts: popcount_table(bits), to spare a device computing it in every call; not used on CPU.

    Returns:
        y [N, O], bit-identical to F.linear(a, weight, bias); side [J, N, O] in the dtype of `a` ([J, 0, O] without
        `response`); norms [J, N] fp32.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not lie in `values`.
    """
    a, weight, bias, values = autocast(a, weight, bias, values)
    check_element(a, values, bits, bounds)
    check_weight(a, weight, bias, bits.shape[1])
    if direct(a, weight, bias, values, bits, bounds):
        return F.linear(a, weight, bias), *element_side(a, values, bits, bounds, response)
    return _dual_forward_element(a, weight, bias, values, bits, bounds, response, popcounts)
