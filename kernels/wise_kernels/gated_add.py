"""Adds each sequence's chosen side response to the main output, in place (eq. 6): y_n += a_n D_j^T for
j = choice[n // T], with y [N, O], a [N, F], choice [B] int64 in {-1, ..., J - 1} and N = B T. Rows whose choice is -1
keep their bits. A `side` [J, N, O] computed before (`dual_forward`) is used in place of the product.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import autocast, check_element, check_neuron, direct, spans
from .side_forward import element_response, element_side, neuron_side, side_forward, side_forward_element


def _by_row(y: Tensor, choice: Tensor) -> Tensor:
    # output_size: without it repeat_interleave reads the sum back from the device.
    return choice.repeat_interleave(y.shape[0] // max(1, choice.shape[0]), output_size=y.shape[0])


def _in_scope(y: Tensor, choice: Tensor, memories: int) -> Iterator[tuple[int, slice | Tensor | None]]:
    """(j, rows) of the memories that were chosen: None for all rows, a slice where sequences are neighbours (CPU)."""
    sequences: dict[int, list[int]] = {}
    for b, j in enumerate(choice.tolist() if memories and y.shape[0] else ()):
        if j >= memories:
            raise ValueError(f"choice names memory {j}, the bank has {memories}")
        if j >= 0:
            sequences.setdefault(j, []).append(b)
    for j, chosen in sequences.items():
        tokens = y.shape[0] // choice.shape[0]
        if len(chosen) == choice.shape[0]:
            yield j, None
        elif chosen[-1] - chosen[0] + 1 == len(chosen):
            yield j, slice(chosen[0] * tokens, (chosen[-1] + 1) * tokens)
        else:
            yield j, (_by_row(y, choice) == j).nonzero().squeeze(1)


def _take(x: Tensor, rows: slice | Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _add(y: Tensor, rows: slice | Tensor | None, response: Tensor) -> None:
    if isinstance(rows, Tensor):
        y.index_add_(0, rows, response)
    else:
        _take(y, rows).add_(response)


def _add_chosen(y: Tensor, choice: Tensor, side: Tensor) -> None:
    """y += side[choice], differentiable and without a host sync: every row is summed, the wrong ones are masked out."""
    if side.shape[0] == 0 or y.shape[0] == 0:
        return
    by_row = _by_row(y, choice)[:, None]
    chosen = side.gather(0, by_row.clamp_min(0).expand(y.shape)[None]).squeeze(0)
    y.copy_(torch.where(by_row >= 0, y + chosen, y))


def _add_neuron(
    y: Tensor, a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, choice: Tensor, side: Tensor | None
) -> None:
    if y.device.type != "cpu":
        return _add_chosen(y, choice, neuron_side(a, values, columns, bounds, True)[0] if side is None else side)
    found = spans(bounds, values.shape[0])
    for j, rows in _in_scope(y, choice, len(found)):
        if side is not None:
            _add(y, rows, _take(side[j], rows))
            continue
        own, theirs = columns, values
        if found[j] != (0, len(values)):
            own, theirs = (x[slice(*found[j])] for x in (columns, values))
        active = _take(a, rows).index_select(1, own)
        if isinstance(rows, Tensor):
            _add(y, rows, active @ theirs)
        else:
            _take(y, rows).addmm_(active, theirs)


def _add_element(
    y: Tensor,
    a: Tensor,
    values: Tensor,
    bits: Tensor,
    bounds: Tensor,
    choice: Tensor,
    side: Tensor | None,
    popcounts: Tensor | None = None,
) -> None:
    if y.device.type != "cpu":
        return _add_chosen(y, choice, element_side(a, values, bits, bounds, True)[0] if side is None else side)
    found = spans(bounds, values.shape[0])
    for j, rows in _in_scope(y, choice, len(found)):
        if side is None:
            response = element_response(_take(a, rows), values[slice(*found[j])], bits, j)
        else:
            response = _take(side[j], rows)
        _add(y, rows, response)


_gated_add_ = torch.library.custom_op("wise::gated_add_", _add_neuron, mutates_args=("y",))
_gated_add_element_ = torch.library.custom_op("wise::gated_add_element_", _add_element, mutates_args=("y",))


@_gated_add_.register_kernel("cuda")
def _(y, a, values, columns, bounds, choice, side):
    from .gpu import gated_add, gated_rows

    if y.dtype == torch.float64:
        return _add_chosen(y, choice, neuron_side(a, values, columns, bounds, True)[0] if side is None else side)
    if side is not None:
        return gated_rows.add_side(y, side, choice)
    gated_add.gated_add(y, a, values, columns, bounds, choice)


@_gated_add_element_.register_kernel("cuda")
def _(y, a, values, bits, bounds, choice, side, popcounts=None):
    from .gpu import gated_add_element, gated_rows

    if y.dtype == torch.float64:
        return _add_chosen(y, choice, element_side(a, values, bits, bounds, True)[0] if side is None else side)
    if side is not None:
        return gated_rows.add_side(y, side, choice)
    gated_add_element.gated_add_element(y, a, values, bits, bounds, choice, popcounts)


@_gated_add_.register_fake
@_gated_add_element_.register_fake
def _fake(y, a, values, layout, bounds, choice, side, popcounts=None):
    return None


def check_gate(a: Tensor, choice: Tensor) -> None:
    """Raise ValueError unless `choice` is int64 [B] and B divides the rows of `a`."""
    tokens = a.shape[0]
    if choice.dim() != 1 or choice.dtype != torch.int64:
        raise ValueError(f"choice must be int64 [B], got {choice.dtype} {tuple(choice.shape)}")
    if tokens and (choice.shape[0] == 0 or tokens % choice.shape[0]):
        raise ValueError(f"{tokens} tokens do not divide into {choice.shape[0]} sequences (N = B T)")


def _check_sum(y: Tensor, a: Tensor, outputs: int, memories: int, choice: Tensor, side: Tensor | None) -> None:
    tokens = a.shape[0]
    if y.dim() != 2 or y.shape[0] != tokens or y.shape[1] != outputs or y.dtype != a.dtype:
        raise ValueError(f"y must be {a.dtype} [{tokens}, {outputs}], got {y.dtype} {tuple(y.shape)}")
    check_gate(a, choice)
    if side is not None and (tuple(side.shape) != (memories, tokens, outputs) or side.dtype != y.dtype):
        raise ValueError(
            f"side must be {y.dtype} [{memories}, {tokens}, {outputs}], got {side.dtype} {tuple(side.shape)}; pass "
            "None where no response was kept"
        )


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gated_add_(
    y: Tensor,
    a: Tensor,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    choice: Tensor,
    side: Tensor | None = None,
) -> None:
    """Add the chosen side responses to `y` in place (eq. 6), neuron layout.

    A mutating op cannot carry a gradient: where one is wanted, the same sum is made from the responses of all memories.

    Args:
        y: [N, O] main output in the dtype of `a`, changed in place; rows out of scope keep their bits.
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        values: [R, O] in the dtype of `a`; row r is column `columns[r]` of its memory's D.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of the bank; rows bounds[j]:bounds[j+1] belong to memory j.
        choice: [B] int64 in {-1, ..., J - 1}, B dividing N; row n belongs to sequence n // (N / B).
        side: [J, N, O] responses in the dtype of `y` if they are known already, else None.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for a choice that is not in the bank
    or bounds that do not lie in `values`.
    """
    a, values, side = autocast(a, values, side)
    _check_sum(y, a, values.shape[1], check_neuron(a, values, columns, bounds), choice, side)
    if direct(y, a, values, columns, bounds, choice, side):
        return _add_neuron(y, a, values, columns, bounds, choice, side)
    # No custom op can be in place and differentiable at once; the op would drop the gradient silently.
    if not differentiable(y, a, values, side):
        return _gated_add_(y, a, values, columns, bounds, choice, side)
    _add_chosen(y, choice, side_forward(a, values, columns, bounds)[0] if side is None else side)


def gated_add_element_(
    y: Tensor,
    a: Tensor,
    values: Tensor,
    bits: Tensor,
    bounds: Tensor,
    choice: Tensor,
    side: Tensor | None = None,
    popcounts: Tensor | None = None,
) -> None:
    """Add the chosen side responses to `y` in place (eq. 6), element layout.

    A mutating op cannot carry a gradient: where one is wanted, the same sum is made from the responses of all memories.

    Args:
        y: [N, O] main output in the dtype of `a`, changed in place; rows out of scope keep their bits.
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        values: [V] in the dtype of `a`, packed row-major over each memory's mask.
        bits: [J, O, ceil(F/32)] int32, see `bits.py`.
        bounds: [J + 1] int64 on the device of the bank; values[bounds[j]:bounds[j+1]] belong to memory j, one to each
            of its set bits.
        choice: [B] int64 in {-1, ..., J - 1}, B dividing N; row n belongs to sequence n // (N / B).
        side: [J, N, O] responses in the dtype of `y` if they are known already, else None.
        popcounts: popcount_table(bits), to spare a device counting the bank in every call; not used on CPU.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for a choice that is not in the bank
    or bounds that do not lie in `values`.
    """
    a, values, side = autocast(a, values, side)
    _check_sum(y, a, bits.shape[1], check_element(a, values, bits, bounds), choice, side)
    if direct(y, a, values, bits, bounds, choice, side):
        return _add_element(y, a, values, bits, bounds, choice, side)
    if not differentiable(y, a, values, side):
        return _gated_add_element_(y, a, values, bits, bounds, choice, side, popcounts)
    _add_chosen(y, choice, side_forward_element(a, values, bits, bounds)[0] if side is None else side)
