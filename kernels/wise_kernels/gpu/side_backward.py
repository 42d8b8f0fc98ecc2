"""Gradients of the responses and norms of J memories, neuron layout: with G_j [N, O] the gradient to a_S V_j,

    grad_values[r] = sum_n a[n, c_r] G_j[n]    and    grad_a[n, c] = sum over r with c_r = c of <G_j[n], values[r]>

for r in memory j and c_r its column. Which rows are whose is read on the device, so nothing waits for the host: `a` is
packed by `dual_tiles.pack`, whose chunks of 64 columns each lie in one memory; `values_bwd` and `active_bwd` are a
program for each chunk; a table of where memory j has column c, [J, F], lets `spread_bwd` add what a column gets from
its memories, in their order and in fp32, so that equal inputs give equal bits.

Bound by the matrix units, 2 N R O operations for each gradient (4 where responses were not kept), and by G, J N O.
Not run on a device yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dual_forward import dual_forward
from .dual_tiles import ALIGN, COMPACT_BOUNDS, chunk_rows, pack
from .gated_add import POINTERS
from .launch import AotCase, guard, interpreted

# The other block of a product and its depth, warps, stages.
WIDE, WIDE_FP32 = (128, 64, 4, 3), (64, 16, 4, 3)
SPREAD_N, SPREAD_F = 16, 128


@triton.jit(do_not_specialize=["N", "memories"])
def values_bwd_kernel(
    p_packed, p_grad, p_bounds, p_out, N, O, memories, s_packed,
    UPCAST: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """grad_values of the rows of a chunk, BO outputs of them: packed^T G_j, summed over tokens."""
    chunk = tl.program_id(0)
    j, first, high = chunk_rows(p_bounds, chunk, memories, ALIGN, BJ)
    if first < high:
        o_c = tl.arange(0, ALIGN)
        o_o = tl.program_id(1) * BO + tl.arange(0, BO)
        m_o = (o_o < O)[None, :]
        p_grad += j.to(tl.int64) * N * O
        p_rows = p_packed + chunk.to(tl.int64) * ALIGN + o_c[None, :]
        b_acc = tl.zeros([ALIGN, BO], tl.float32)
        for n in range(0, N, BK):
            o_n = (n + tl.arange(0, BK)).to(tl.int64)[:, None]
            b_a = tl.load(p_rows + o_n * s_packed, mask=o_n < N, other=0.0)
            b_g = tl.load(p_grad + o_n * O + o_o[None, :], mask=(o_n < N) & m_o, other=0.0)
            if UPCAST:
                b_a, b_g = b_a.to(tl.float32), b_g.to(tl.float32)
            b_acc = tl.dot(tl.trans(b_a), b_g, b_acc, input_precision="ieee")
        o_r = first + o_c
        p_tile = p_out + o_r[:, None] * O + o_o[None, :]
        tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=(o_r < high)[:, None] & m_o)


@triton.jit(do_not_specialize=["N", "memories"])
def active_bwd_kernel(
    p_grad, p_values, p_bounds, p_out, N, O, memories, s_packed,
    UPCAST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The gradient to a chunk of packed activations, BN tokens of it: G_j values^T, summed over outputs."""
    chunk = tl.program_id(0)
    j, first, high = chunk_rows(p_bounds, chunk, memories, ALIGN, BJ)
    if first < high:
        o_c = tl.arange(0, ALIGN)
        o_r = first + o_c
        o_n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
        p_grad += j.to(tl.int64) * N * O
        b_acc = tl.zeros([BN, ALIGN], tl.float32)
        for o in range(0, O, BK):
            o_o = (o + tl.arange(0, BK))[None, :]
            b_g = tl.load(p_grad + o_n * O + o_o, mask=(o_n < N) & (o_o < O), other=0.0)
            b_v = tl.load(p_values + o_r[:, None] * O + o_o, mask=(o_r < high)[:, None] & (o_o < O), other=0.0)
            if UPCAST:
                b_g, b_v = b_g.to(tl.float32), b_v.to(tl.float32)
            b_acc = tl.dot(b_g, tl.trans(b_v), b_acc, input_precision="ieee")
        p_tile = p_out + o_n * s_packed + chunk.to(tl.int64) * ALIGN + o_c[None, :]
        tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=o_n < N)


@triton.jit(do_not_specialize=["N", "memories"])
def spread_bwd_kernel(
    p_packed, p_place, p_out, N, F, memories, s_packed, s_on, s_of, BN: tl.constexpr, BF: tl.constexpr
):
    """grad_a of BN tokens and BF inputs: what each memory that has the input gives. Bound by bandwidth."""
    o_f = tl.program_id(0) * BF + tl.arange(0, BF)
    o_n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    b_acc = tl.zeros([BN, BF], tl.float32)
    for _ in range(memories):
        b_at = tl.load(p_place + o_f, mask=o_f < F, other=-1)[None, :]
        p_place += F
        b_acc += tl.load(p_packed + o_n * s_packed + b_at, mask=(o_n < N) & (b_at >= 0), other=0.0).to(tl.float32)
    p_tile = p_out + o_n * s_on + o_f.to(tl.int64)[None, :] * s_of
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=(o_n < N) & (o_f < F)[None, :])


def places(columns: Tensor, bounds: Tensor, width: int) -> Tensor:
    """[J, F] int64: where packed activations have column c of memory j, -1 where the memory has no such column."""
    memories, rows = bounds.shape[0] - 1, torch.arange(columns.shape[0], device=columns.device)
    owner = torch.searchsorted(bounds, rows, right=True) - 1
    at = (bounds // ALIGN * ALIGN - bounds).index_select(0, owner) + owner * ALIGN + rows
    # Rows behind the last bound are no memory's: they go to a row of their own.
    table = columns.new_full((memories + 1, width), -1)
    return table.index_put_((owner, columns), at).narrow(0, 0, memories)


def side_backward(grad: Tensor, a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to a [N, F] and values [R, O] from G [J, N, O], all in one dtype up to fp32."""
    values, columns, grad = values.contiguous(), columns.contiguous(), grad.contiguous()
    (rows, width), outputs, memories = a.shape, values.shape[1], bounds.shape[0] - 1
    grad_a, grad_values = torch.zeros_like(a), values.new_zeros(values.shape)
    if not (grad.numel() and values.numel() and width):
        return grad_a, grad_values
    block, depth, num_warps, num_stages = WIDE_FP32 if a.dtype == torch.float32 else WIDE
    options = {"UPCAST": interpreted(), "BK": depth, "ALIGN": ALIGN, "BJ": COMPACT_BOUNDS}
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    with guard(a):
        packed = pack(a, columns, bounds)
        chunks = packed.shape[1] // ALIGN
        values_bwd_kernel[(chunks, triton.cdiv(outputs, block))](
            packed, grad, bounds, grad_values, rows, outputs, memories, packed.stride(0), BO=block, **options
        )
        # What was packed has been read: its place takes the gradient.
        active_bwd_kernel[(chunks, triton.cdiv(rows, block))](
            grad, values, bounds, packed, rows, outputs, memories, packed.stride(0), BN=block, **options
        )
        spread_bwd_kernel[(triton.cdiv(width, SPREAD_F), triton.cdiv(rows, SPREAD_N))](
            packed, places(columns, bounds, width), grad_a, rows, width, memories, packed.stride(0), *grad_a.stride(),
            BN=SPREAD_N, BF=SPREAD_F,
        )  # fmt: skip
    return grad_a, grad_values


def responses(a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor) -> Tensor:
    """a_S V_j [J, N, O] again, where the forward kept none."""
    return dual_forward(a, None, None, values, columns, bounds)[1]


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []

    def case(name, kernel, types, meta, num_warps=4, num_stages=3, expect=None):
        signature = {n: "constexpr" if n in meta else types.get(n, "i32") for n in kernel.arg_names}
        divisible = (n for n, t in signature.items() if t.startswith("*") or n in ("O", "F", "s_packed", "s_on"))
        cases.append(AotCase(name, kernel, signature, meta, num_warps, num_stages, expect, tuple(divisible)))

    for dtype, kind in POINTERS.items():
        block, depth, num_warps, num_stages = WIDE_FP32 if dtype == torch.float32 else WIDE
        types = dict.fromkeys(("p_packed", "p_grad", "p_values", "p_out"), kind) | {"p_bounds": "*i64"}
        meta = {"UPCAST": False, "BK": depth, "ALIGN": ALIGN, "BJ": COMPACT_BOUNDS}
        expect = None if dtype == torch.float32 else "wgmma"
        for name, kernel, size in (("values", values_bwd_kernel, "BO"), ("active", active_bwd_kernel, "BN")):
            case(f"{name}/{kind[1:]}", kernel, types, meta | {size: block}, num_warps, num_stages, expect)
        types |= {"p_place": "*i64"}
        case(f"spread/{kind[1:]}", spread_bwd_kernel, types, {"s_of": 1, "BN": SPREAD_N, "BF": SPREAD_F})
    return cases
