"""Argument checks shared by the public functions: a bank of J memories is `values`, its `columns [R]` (neuron layout)
or `bits [J, O, ceil(F/32)]` (element layout), and its `bounds [J + 1]`. They look at shapes, dtypes and devices only,
so they cost no host sync and vanish under torch.compile; what bounds hold is checked where they are read (`spans`).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .bits import words

PLAIN = (Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_bounds(bounds: Tensor, values: Tensor) -> int:
    """Return J, or raise ValueError unless `bounds` is int64 [J + 1], contiguous, on the device of `values`."""
    if not isinstance(bounds, Tensor):
        raise ValueError(f"bounds must be a tensor on {values.device}, got {bounds!r}: build it once, with the bank")
    if bounds.dim() != 1 or bounds.shape[0] < 1 or bounds.dtype != torch.int64 or bounds.device != values.device:
        given = f"{bounds.dtype} {tuple(bounds.shape)} on {bounds.device}"
        raise ValueError(f"bounds must be int64 [J + 1] on {values.device} like the bank, got {given}")
    if not bounds.is_contiguous():
        raise ValueError("bounds must be contiguous, since a device reads them as they lie; pass bounds.contiguous()")
    return bounds.shape[0] - 1


def spans(bounds: Tensor, rows: int) -> list[tuple[int, int]]:
    """The rows low:high of each memory, for implementations that loop over memories on the host.

    Reading them is free on CPU and would sync elsewhere, save for one memory, whose span is known.

    Rows behind the last bound belong to no memory: a bank may have room for more than it holds.

    Raises ValueError unless `bounds` run from 0 to at most `rows` without a step back.
    """
    if bounds.shape[0] == 2 and bounds.device.type != "cpu":
        return [(0, rows)]
    ends = bounds.tolist()
    if ends[0] != 0 or ends[-1] > rows:
        raise ValueError(f"bounds must run from 0 to at most the {rows} rows of values, got {ends}")
    found = list(zip(ends, ends[1:], strict=False))
    if any(low > high for low, high in found):
        raise ValueError(f"bounds must not decrease, got {ends}")
    return found


def check_activations(a: Tensor) -> None:
    """Raise ValueError unless `a` is a floating point matrix [N, F]."""
    if a.dim() != 2 or a.dtype not in FLOATS:
        raise ValueError(f"a must be a floating point [N, F], got {a.dtype} {tuple(a.shape)}; flatten batch and time")


def check_columns(columns: Tensor, rows: int) -> None:
    """Raise ValueError unless `columns` is int64 [rows]."""
    if columns.dim() != 1 or columns.shape[0] != rows or columns.dtype != torch.int64:
        raise ValueError(f"columns must be int64 [{rows}], got {columns.dtype} {tuple(columns.shape)}")


def check_neuron(a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor) -> int:
    """Check a bank in the neuron layout against `a [N, F]`; return J."""
    check_activations(a)
    if values.dim() != 2 or values.dtype != a.dtype:
        raise ValueError(f"values must be {a.dtype} [R, O] like a, got {values.dtype} {tuple(values.shape)}")
    check_columns(columns, values.shape[0])
    return check_bounds(bounds, values)


def check_element(a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor) -> int:
    """Check a bank in the element layout against `a [N, F]`; return J."""
    check_activations(a)
    if values.dim() != 1 or values.dtype != a.dtype:
        raise ValueError(f"values must be {a.dtype} [V] like a, got {values.dtype} {tuple(values.shape)}")
    memories, width = check_bounds(bounds, values), words(a.shape[1])
    if bits.dim() != 3 or bits.dtype != torch.int32 or bits.shape[0] != memories or bits.shape[2] != width:
        raise ValueError(f"bits must be int32 [{memories}, O, {width}], got {bits.dtype} {tuple(bits.shape)}")
    return memories


def check_weight(a: Tensor, weight: Tensor, bias: Tensor | None, outputs: int | None = None) -> None:
    """Raise ValueError unless `weight` is [O, F] and `bias` [O] or None, in the dtype of `a`, with O = `outputs`."""
    if weight.dim() != 2 or weight.shape[1] != a.shape[1] or weight.dtype != a.dtype:
        raise ValueError(
            f"weight must be {a.dtype} [O, {a.shape[1]}], got {weight.dtype} {tuple(weight.shape)}; pass weight.t() "
            "for a Conv1D"
        )
    if outputs is not None and weight.shape[0] != outputs:
        raise ValueError(f"weight has {weight.shape[0]} outputs, the memories have {outputs}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0] or bias.dtype != a.dtype):
        raise ValueError(f"bias must be {a.dtype} [{weight.shape[0]}], got {bias.dtype} {tuple(bias.shape)}")


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast floating point tensors to the active autocast dtype; return them unchanged where autocast is off.

    An op's fake only sees its inputs' dtypes, so what autocast would do inside of it has to happen before it.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op on these may be called as the function it is on the CPU: plain tensors without a gradient, and
    nobody who traces or intercepts. The way through the dispatcher takes 10 to 40 us, as long as small ops do."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    graded = torch.is_grad_enabled()
    return all(
        t is None or (type(t) in PLAIN and t.device.type == "cpu" and not (graded and t.requires_grad)) for t in tensors
    )


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on the device of `tensor`: it would round products that scores are measured by."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
