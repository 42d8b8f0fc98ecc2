"""gated_linear on a device, up to 16 rows (decode), neuron layout: y_n = W a_n + b + D_j a_n for j = choice[n // T] in
one launch; a [N, F], W [O, F], values [R, O], bounds [J + 1], choice [B], N = B T, y [N, O]. fp32 accumulation.

Bound by bandwidth: 2 O F bytes of W in 16 bits and, in scope, 2 |S_j| O of values. A launch of its own for the values
(`gated_add`) waits for choice, bounds, columns and activations, one behind the other, before it multiplies. Here these
are read before the sum over W begins, and are there when it ends. Out of scope no value is read.

On an H100, Llama-2-7B at rho 0.2, 1 row / 8 rows, where the projection alone takes 39.2 us: out of scope 39.6 / 39.6,
in scope 51.8 / 55.1 before anything was read ahead; predicted with it 49 / 52, not run. A step of the columns beside
every step of W was predicted at 46 and took 61: every step then waits for a gather.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gated_linear import FEW_ROWS
from .gated_rows import active_at, columns_at, rows_of
from .launch import SIZES, AotCase, dependent, guard, interpreted, wait_for_inputs
from .tile import TARGETS_OF, family, kinds_of

# outputs of a program, inputs and columns of a step, num_warps, num_stages
TILES = {
    "wgmma": (32, 256, 256, 4, 4),
    "mma": (32, 256, 256, 4, 4),
    "amd": (32, 128, 128, 4, 2),
    "fp32": (32, 32, 32, 4, 4),
}


@triton.jit
def _dot(b_left, b_right, b_acc, UPCAST: tl.constexpr):
    if UPCAST:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_acc, input_precision="ieee")


@triton.jit
def _open(p_rows, p_columns, p_bounds, b_j, j, o_c, s_af, BLOCK_K: tl.constexpr):
    """The rows of memory j, a at its first columns, the columns of its second step, and its bounds; -1 has no rows."""
    b_mine = (b_j == j) & (j >= 0)
    low = tl.load(p_bounds + j, mask=j >= 0, other=0)
    high = tl.load(p_bounds + j + 1, mask=j >= 0, other=0)
    o_k = low + o_c
    b_next = active_at(p_rows, columns_at(p_columns, o_k, high), b_mine, o_k, high, s_af)
    return b_mine, b_next, columns_at(p_columns, o_k + BLOCK_K, high), low, high


@triton.jit
def _respond(
    opened, p_rows, p_columns, values, o_out, m_o, o_c, s_af,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a_S values [BLOCK_N, BLOCK_O] of the memory that `_open` began."""
    b_mine, b_next, b_column, low, high = opened
    p_values, s_vr = values
    b_side = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for k in range(low, high, BLOCK_K):
        o_k = k + o_c
        b_a = b_next
        b_next = active_at(p_rows, b_column, b_mine, o_k + BLOCK_K, high, s_af)
        b_column = columns_at(p_columns, o_k + 2 * BLOCK_K, high)
        p_tile = p_values + (o_k * s_vr)[:, None] + o_out[None, :]
        b_v = tl.load(p_tile, mask=(o_k < high)[:, None] & m_o[None, :], other=0.0)
        b_side = _dot(b_a, b_v, b_side, UPCAST)
    return b_side


@triton.jit(do_not_specialize=SIZES)
def linear_fwd_kernel(
    p_y, p_a, p_weight, p_bias, p_values, p_columns, p_bounds, p_choice, rows, tokens, memories, outputs, width,
    s_an, s_af, s_wo, s_wf, s_vr, s_vo,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of up to BLOCK_N rows; bound by the bandwidth of W and values."""
    wait_for_inputs(PDL)
    o_p = tl.arange(0, BLOCK_N)
    m_n = o_p < rows
    b_n, b_j = rows_of(p_choice, p_choice, o_p, rows, tokens, memories, False)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    m_o = o_o < outputs
    p_rows, p_w = p_a + (b_n * s_an)[:, None], p_weight + (o_o * s_wo)[:, None]
    o_f, o_c = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    j = tl.max(b_j, 0)
    # What a memory's first step needs, read while W streams; masked where no row is in scope.
    opened = _open(p_rows, p_columns, p_bounds, b_j, j, o_c, s_af, BLOCK_K)
    b_y = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for f in range(0, width, BLOCK_F):
        m_f = f + o_f < width
        b_w = tl.load(p_w + (f + o_f).to(tl.int64)[None, :] * s_wf, mask=m_o[:, None] & m_f[None, :], other=0.0)
        b_a = tl.load(p_rows + (f + o_f).to(tl.int64)[None, :] * s_af, mask=m_n[:, None] & m_f[None, :], other=0.0)
        b_y = _dot(b_a, tl.trans(b_w), b_y, UPCAST)
    o_out, values = o_o * s_vo, (p_values, s_vr)
    b_side = _respond(opened, p_rows, p_columns, values, o_out, m_o, o_c, s_af, UPCAST, BLOCK_N, BLOCK_O, BLOCK_K)
    # Selected, not multiplied: a value that is not finite stays in the rows that chose it.
    b_y = tl.where(opened[0][:, None], b_y + b_side, b_y)
    # Other memories, where rows chose several.
    b_left = tl.where(b_j < j, b_j, -1)
    j = tl.max(b_left, 0)
    while j >= 0:
        more = _open(p_rows, p_columns, p_bounds, b_j, j, o_c, s_af, BLOCK_K)
        b_side = _respond(more, p_rows, p_columns, values, o_out, m_o, o_c, s_af, UPCAST, BLOCK_N, BLOCK_O, BLOCK_K)
        b_y = tl.where(more[0][:, None], b_y + b_side, b_y)
        b_left = tl.where(b_left < j, b_left, -1)
        j = tl.max(b_left, 0)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + (b_n * outputs)[:, None] + o_o[None, :], b_y.to(p_y.dtype.element_ty), mask=m_n[:, None] & m_o)


def gated_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    choice: Tensor,
) -> Tensor:
    """y [N, O] for N up to FEW_ROWS; shapes, dtypes and strides as in `wise_kernels.gated_linear`. One launch."""
    (rows, width), outputs = a.shape, weight.shape[0]
    if rows > FEW_ROWS:
        raise ValueError(f"a has {rows} rows, and this launch takes up to {FEW_ROWS}")
    y = torch.empty(rows, outputs, dtype=a.dtype, device=a.device)
    if y.numel() == 0:
        return y
    block_o, block_f, block_k, num_warps, num_stages = TILES[family(a)]
    bias, columns, choice = (t if t is None else t.contiguous() for t in (bias, columns, choice))
    with guard(a):
        linear_fwd_kernel[(triton.cdiv(outputs, block_o),)](
            y, a, weight, weight if bias is None else bias, values, columns, bounds, choice,
            rows, rows // choice.shape[0], bounds.shape[0] - 1, outputs, width,
            *a.stride(), *weight.stride(), *values.stride(),
            HAS_BIAS=bias is not None, UPCAST=interpreted(), BLOCK_N=FEW_ROWS, BLOCK_O=block_o, BLOCK_F=block_f,
            BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages, **dependent(a),
        )  # fmt: skip
    return y


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []
    for table, (block_o, block_f, block_k, num_warps, num_stages) in TILES.items():
        for kind in kinds_of(table):
            types = dict.fromkeys(("p_y", "p_a", "p_weight", "p_bias", "p_values"), f"*{kind}")
            types |= dict.fromkeys(("p_columns", "p_bounds", "p_choice"), "*i64")
            meta = {"s_af": 1, "s_wf": 1, "s_vo": 1, "HAS_BIAS": True, "UPCAST": False, "PDL": False}
            meta |= {"BLOCK_N": FEW_ROWS, "BLOCK_O": block_o, "BLOCK_F": block_f, "BLOCK_K": block_k}
            names = linear_fwd_kernel.arg_names
            signature = {name: "constexpr" if name in meta else types.get(name, "i32") for name in names}
            cases.append(
                AotCase(
                    f"gated_linear/{table}/{kind}", linear_fwd_kernel, signature, meta, num_warps, num_stages,
                    expect=None if table == "fp32" else "mma",
                    divisible=(*types, "outputs", "width", "s_an", "s_wo", "s_vr"), targets=TARGETS_OF[table],
                )
            )  # fmt: skip
    return cases
