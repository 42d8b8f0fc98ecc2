"""Side response and routing norms of J memories over activations a [N, F]: side_j = a D_j^T [N, O] and
norms_j(t) = ||a_t D_j^T||_2 (eq. 3). Neuron layout: a D_j^T = a[:, columns_j] values_j with values_j [|S_j|, O];
element layout: D_j [O, F] is unpacked one memory at a time. For projections whose weight is not a plain matrix
(quantised); `dual_forward` adds the main projection to the same pass.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import check_count, scatter_packed, sparse_rows, unpack_bits, unpack_dense
from .checks import autocast, check_element, check_neuron, direct, spans, without_autocast

# Rows of 16-bit activations up to which the element layout is multiplied sparsely on the CPU.
FEW_ROWS = 32


def neuron_side(a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, response: bool):
    """Side [J, N or 0, O] and norms [J, N] of a bank in the neuron layout."""
    side, norms = empty_side(a, bounds.shape[0] - 1, values.shape[1], response)
    for j, (low, high) in enumerate(spans(bounds, values.shape[0])):
        if low == high:
            _store_nothing(j, side, norms)
            continue
        active = a.index_select(1, columns[low:high])
        # Straight to its place: a copy of a response costs as much as its norm.
        response_j = torch.mm(active, values[low:high], out=side[j] if response else None)
        _store_norms(response_j, j, norms)
    return side, norms


def element_side(a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor, response: bool):
    """Side [J, N or 0, O] and norms [J, N] of a bank in the element layout."""
    side, norms = empty_side(a, bits.shape[0], bits.shape[1], response)
    for j, (low, high) in enumerate(spans(bounds, values.shape[0])):
        if low == high:
            _store_nothing(j, side, norms)
            continue
        response_j = element_response(a, values[low:high], bits, j)
        _store_norms(response_j, j, norms)
        if response:
            side[j] = response_j
    return side, norms


def element_response(a: Tensor, values: Tensor, bits: Tensor, j: int) -> Tensor:
    """a D_j^T [N, O] of memory j of `bits [J, O, words]`, whose values these are."""
    # A fifth of the dense product's operations at rho 0.2, and its time for hundreds of rows; for fewer, less. 16-bit
    # products are faster dense, and only few rows do not pay for unpacking D.
    rows = a.shape[0] if a.element_size() < 4 else 1
    sparse = a.device.type == "cpu" and torch.backends.mkl.is_available() and a.numel() and rows <= FEW_ROWS
    if not sparse:
        return F.linear(a, unpack_dense(values, bits[j], a.shape[1]))
    before, columns = sparse_rows(bits, a.shape[1], j)
    check_count(len(columns), len(values))
    wider = torch.promote_types(a.dtype, torch.float32)
    shape = (bits.shape[1], a.shape[1])
    _hear_of_beta()
    with without_autocast(a):
        matrix = torch.sparse_csr_tensor(before, columns, values.to(wider), size=shape, check_invariants=False)
        if a.shape[0] == 1:  # a product with a vector takes half of the time
            return (matrix @ a[0].to(wider))[None].to(a.dtype)
        return (matrix @ a.to(wider).t()).t().to(a.dtype)


@cache
def _hear_of_beta() -> None:
    """PyTorch says once that compressed rows are in beta; not to the user, who did not ask for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def neuron_side_gpu(a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, response: bool):
    """`neuron_side` by the kernels of gpu/dual_forward.py, which have no float64."""
    if a.dtype == torch.float64:
        return neuron_side(a, values, columns, bounds, response)
    from .gpu.dual_forward import dual_forward

    return dual_forward(a, None, None, values, columns, bounds, response)[1:]


def element_side_gpu(
    a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor, response: bool, popcounts: Tensor | None = None
):
    """`element_side` by the kernels of gpu/dual_forward_element.py, which have no float64."""
    if a.dtype == torch.float64:
        return element_side(a, values, bits, bounds, response)
    from .gpu.dual_forward_element import element_forward

    return element_forward(a, values, bits, bounds, response, popcounts)


def empty_side(a: Tensor, memories: int, outputs: int, response: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs; also what the fakes return."""
    side = a.new_empty(memories, a.shape[0] if response else 0, outputs)
    return side, a.new_empty(memories, a.shape[0], dtype=torch.float32)


def _store_norms(response_j: Tensor, j: int, norms: Tensor) -> None:
    # dtype: sum the squares in fp32 at least, fp16 would overflow where the response is fine.
    wide = torch.promote_types(response_j.dtype, torch.float32)
    norms[j] = torch.linalg.vector_norm(response_j, dim=1, dtype=wide)


def _store_nothing(j: int, side: Tensor, norms: Tensor) -> None:
    """An empty memory, such as a slot that is free, costs no product."""
    norms[j], side[j] = 0.0, 0.0


@torch.library.custom_op("wise::side_backward", mutates_args=())
def side_backward(
    grad_side: Tensor,
    grad_norms: Tensor,
    a: Tensor,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    side: Tensor,
    norms: Tensor,
    response: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to a [N, F] and values [R, O] from those to side and norms; an op, for it reads the bounds."""
    return _span_by_span(grad_side, grad_norms, a, values, columns, bounds, side, norms, response)


def _span_by_span(grad_side, grad_norms, a, values, columns, bounds, side, norms, response):
    """Memory by memory, whose rows the host knows: on the CPU, or of one memory."""
    grad_a, grad_values = torch.zeros_like(a), torch.zeros_like(values)
    for j, (low, high) in enumerate(spans(bounds, values.shape[0])):
        taken, active = columns[low:high], a.index_select(1, columns[low:high])
        response_j = side[j] if response else active @ values[low:high]
        grad = _grad_response(response_j, norms[j], grad_side[j] if response else None, grad_norms[j])
        # The same input column may be in several memories, so gradients add up.
        grad_a.index_add_(1, taken, grad @ values[low:high].t())
        grad_values[low:high] = active.t() @ grad
    return grad_a, grad_values


@side_backward.register_kernel("cuda")
def _(grad_side, grad_norms, a, values, columns, bounds, side, norms, response):
    if bounds.shape[0] == 2 or a.dtype == torch.float64:
        return _span_by_span(grad_side, grad_norms, a, values, columns, bounds, side, norms, response)
    from .gpu import side_backward as gpu

    given = side if response else gpu.responses(a, values, columns, bounds)
    grad = _grad_response(given, norms, grad_side if response else None, grad_norms)
    return gpu.side_backward(grad, a, values, columns, bounds)


@torch.library.custom_op("wise::side_backward_element", mutates_args=())
def side_backward_element(
    grad_side: Tensor,
    grad_norms: Tensor,
    a: Tensor,
    values: Tensor,
    bits: Tensor,
    bounds: Tensor,
    side: Tensor,
    norms: Tensor,
    response: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to a [N, F] and values [V] from those to side and norms; an op, for it reads the bounds."""
    on_host = a.device.type == "cpu" or bounds.shape[0] == 2
    found = spans(bounds, values.shape[0]) if on_host else None
    return element_backward(grad_side, grad_norms, a, values, bits, bounds, side, norms, response, found)


def element_backward(grad_side, grad_norms, a, values, bits, bounds, side, norms, response, found):
    """The gradients, where values lie known by `found`, a (low, high) each, or read on the device."""
    grad_a, packed = torch.zeros_like(a), values.new_zeros(values.shape[0] + 1)
    start = torch.zeros((), dtype=torch.int64, device=a.device)
    for j in range(bits.shape[0]):
        bits_j, norms_j, grad_norms_j = (t.select(0, j) for t in (bits, norms, grad_norms))
        # Unpacked again: keeping every memory's D from the forward would cost J dense matrices.
        if found is None:
            dense = unpack_dense(values, bits_j, a.shape[1], bounds.select(0, j))
        else:
            dense = unpack_dense(values[slice(*found[j])], bits_j, a.shape[1])
        response_j = side.select(0, j) if response else F.linear(a, dense)
        grad = _grad_response(response_j, norms_j, grad_side.select(0, j) if response else None, grad_norms_j)
        grad_a += grad @ dense
        start = scatter_packed(packed, grad.t() @ a, unpack_bits(bits_j, a.shape[1]), start)
    # clone: the gradient must not keep the spill slot's storage alive or alias it.
    return grad_a, packed[:-1].clone()


@side_backward.register_fake
@side_backward_element.register_fake
def _(grad_side, grad_norms, a, values, layout, bounds, side, norms, response):
    return torch.empty_like(a), torch.empty_like(values)


def _grad_response(response_j: Tensor, norm: Tensor, grad_side: Tensor | None, grad_norm: Tensor) -> Tensor:
    """The gradient to responses [..., N, O] from that to their norms [..., N], and to themselves if they were kept."""
    # A zero response has norm 0; its subgradient is taken as 0, as torch.linalg.vector_norm does.
    scale = torch.where(norm > 0, grad_norm / norm, 0.0)
    grad = response_j * scale[..., None]
    return (grad if grad_side is None else grad + grad_side).to(response_j.dtype)


@torch.library.custom_op("wise::side_forward", mutates_args=())
def _side_forward(a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, response: bool) -> tuple[Tensor, Tensor]:
    return neuron_side(a, values, columns, bounds, response)


@torch.library.custom_op("wise::side_forward_element", mutates_args=())
def _side_forward_element(
    a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor, response: bool, popcounts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return element_side(a, values, bits, bounds, response)


_side_forward.register_kernel("cuda")(neuron_side_gpu)
_side_forward_element.register_kernel("cuda")(element_side_gpu)


@_side_forward.register_fake
def _(a, values, columns, bounds, response):
    return empty_side(a, bounds.shape[0] - 1, values.shape[1], response)


@_side_forward_element.register_fake
def _(a, values, bits, bounds, response, popcounts=None):
    return empty_side(a, bits.shape[0], bits.shape[1], response)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.response = inputs[:5]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_side, grad_norms):
    return *side_backward(grad_side, grad_norms, *ctx.saved_tensors, ctx.response), None, None, None


def _backward_element(ctx, grad_side, grad_norms):
    return *side_backward_element(grad_side, grad_norms, *ctx.saved_tensors, ctx.response), None, None, None, None


_side_forward.register_autograd(_backward, setup_context=_setup_context)
_side_forward_element.register_autograd(_backward_element, setup_context=_setup_context)


def side_forward(
    a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, response: bool = True
) -> tuple[Tensor, Tensor]:
    """Side responses and routing norms (eq. 3), neuron layout; differentiable in `a` and `values`.

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        values: [R, O] in the dtype of `a`; row r is column `columns[r]` of its memory's D.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of the bank; rows bounds[j]:bounds[j+1] belong to memory j.
        response: whether to keep the responses, not only their norms.

    Returns:
        side [J, N, O] in the dtype of `a` ([J, 0, O] without `response`) and norms [J, N] fp32.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not lie in `values`.
    """
    a, values = autocast(a, values)
    check_neuron(a, values, columns, bounds)
    run = neuron_side if direct(a, values, columns, bounds) else _side_forward
    return run(a, values, columns, bounds, response)


def side_forward_element(
    a: Tensor,
    values: Tensor,
    bits: Tensor,
    bounds: Tensor,
    response: bool = True,
    popcounts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Side responses and routing norms (eq. 3), element layout; differentiable in `a` and `values`.

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        values: [V] in the dtype of `a`, packed row-major over each memory's mask.
        bits: [J, O, ceil(F/32)] int32, see `bits.py`.
        bounds: [J + 1] int64 on the device of the bank; values[bounds[j]:bounds[j+1]] belong to memory j, one to each
            of its set bits.
        response: whether to keep the responses, not only their norms.
        popcounts: popcount_table(bits), to spare a device computing it in every call; not used on CPU.

    Returns:
        side [J, N, O] in the dtype of `a` ([J, 0, O] without `response`) and norms [J, N] fp32.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not lie in `values`.
    """
    a, values = autocast(a, values)
    check_element(a, values, bits, bounds)
    if direct(a, values, bits, bounds):
        return element_side(a, values, bits, bounds, response)
    return _side_forward_element(a, values, bits, bounds, response, popcounts)
