"""Neuron layout, many rows (N > 16): bound by the matrix units, 2 N O (R + F if fused) operations.

Single columns of `a` in a matmul's main loop would be 2-byte loads that keep the matrix units waiting, so `compact`
first copies a_S = a[:, columns] of all memories to [N, P], N R elements: `a` comes from memory once, in the order of
its rows, and memory j begins at a multiple of 64, start_j = 64 (bounds[j] // 64 + j), with zeros behind its last column
(a closed form: no scan over the memories). Then one grouped launch: tiles of y (depth F) first, as the heaviest, then
tiles of every memory (depth |S_j|), a few rows of tiles at a time so that they share both operands in the L2 cache.
Its epilogue leaves sums of squares by row and tile of outputs, which `finish_norms` adds in order. Without `response`
nothing else is written. Predicted for 2048 rows of Llama-2-7B (4096 x 11008, rho 0.2, one memory, bf16) on an H100:
compaction 54 MB, 16 us; side 37 GFLOP, 62 us at 600 TFLOP/s; y 185 GFLOP, 284 us at 650; 1.27x plain.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, dependent, interpreted, wait_for_inputs
from .row_sums import finish_norms
from .tile import EXPECT_OF, TARGETS_OF, Tile, family, kinds_of

ALIGN = 64
# Rows of a program of the compaction, its warps, and the memories whose bounds it looks at together.
COMPACT_ROWS, COMPACT_WARPS, COMPACT_BOUNDS = 16, 4, 64
# Rows of tiles that are walked before the next column of them.
GROUP = 8
SHORT = Tile(64, 64, 64, 4, 4)
# Large tiles first.
TILES = {
    "wgmma": (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), SHORT),
    "mma": (Tile(128, 128, 32, 4, 4), SHORT),
    "amd": (Tile(128, 128, 64, 4, 2), Tile(64, 64, 64, 4, 2)),
    "fp32": (Tile(64, 64, 16, 4, 3),),
}
SMS = 132


def many_rows_tile(a: Tensor, outputs: int, products: int) -> Tile:
    """The largest tile that still gives `products` products [N, outputs] about one program an SM, else the smallest."""
    for tile in TILES[family(a)]:
        if triton.cdiv(a.shape[0], tile.rows) * triton.cdiv(outputs, tile.outputs) * products >= SMS - GROUP:
            break
    return tile


@triton.jit
def chunk_rows(p_bounds, chunk, memories, ALIGN: tl.constexpr, BJ: tl.constexpr):
    """The memory that a chunk of packed columns belongs to, the first of its rows there, and where the memory ends."""
    j = -1
    for first in range(0, memories, BJ):
        o_j = first + tl.arange(0, BJ)
        b_start = tl.load(p_bounds + o_j, mask=o_j < memories, other=0) // ALIGN + o_j
        j += tl.sum(((b_start <= chunk) & (o_j < memories)).to(tl.int32), 0)
    low, high = tl.load(p_bounds + j), tl.load(p_bounds + j + 1)
    return j, low + (chunk - (low // ALIGN + j)) * ALIGN, high


@triton.jit(do_not_specialize=["N", "memories"])
def compact_fwd_kernel(
    p_a, p_columns, p_bounds, p_packed, N, memories, s_an, s_af, s_packed,
    BN: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """packed [N, P]: BK columns of a_S for BN rows. Bound by bandwidth: N F + N P elements of memory traffic, the rest
    from the L2 cache, as programs of the same rows run side by side."""
    wait_for_inputs(PDL)
    chunk = tl.program_id(0)
    j, first, high = chunk_rows(p_bounds, chunk, memories, BK, BJ)
    o_k = tl.arange(0, BK)
    o_r = first + o_k
    m_r = o_r < high
    b_col = tl.load(p_columns + o_r, mask=m_r, other=0)
    o_n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    b_a = tl.load(p_a + o_n * s_an + b_col[None, :] * s_af, mask=(o_n < N) & m_r[None, :], other=0.0)
    tl.store(p_packed + o_n * s_packed + chunk * BK + o_k[None, :], b_a, mask=o_n < N)


@triton.jit(do_not_specialize=["N"])
def tiles_fwd_kernel(
    p_a, p_weight, p_bias, p_packed, p_values, p_bounds, p_y, p_side, p_squares,
    N, O, F, s_an, s_af, s_wo, s_wf, s_packed,
    HAS_MAIN: tl.constexpr, HAS_BIAS: tl.constexpr, RESPONSE: tl.constexpr, UPCAST: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: a tile [BN, BO] of y (HAS_MAIN, the first ones) or of a memory's response. Bound by the matrix units."""
    wait_for_inputs(PDL)
    tiles_n, tiles_o = tl.cdiv(N, BN), tl.cdiv(O, BO)
    part, tile = tl.program_id(0) // (tiles_n * tiles_o), tl.program_id(0) % (tiles_n * tiles_o)
    group_first = tile // (GROUP * tiles_o) * GROUP
    group_rows = min(tiles_n - group_first, GROUP)
    tile_n = group_first + tile % (GROUP * tiles_o) % group_rows
    tile_o = tile % (GROUP * tiles_o) // group_rows
    o_n, o_o, o_k = tile_n * BN + tl.arange(0, BN), tile_o * BO + tl.arange(0, BO), tl.arange(0, BK)
    m_out = (o_n < N)[:, None] & (o_o < O)[None, :]
    o_out = o_n.to(tl.int64)[:, None] * O + o_o[None, :]
    # Rows past the end repeat the last one: unmasked loads, and what they give is not stored.
    o_row = tl.minimum(o_n, N - 1).to(tl.int64)[:, None]
    b_acc = tl.zeros([BN, BO], dtype=tl.float32)
    if HAS_MAIN and part == 0:
        p_a_row, p_w_row = p_a + o_row * s_an, p_weight + tl.minimum(o_o, O - 1).to(tl.int64)[None, :] * s_wo
        for k in range(0, F, BK):
            o_f = (k + o_k).to(tl.int64)
            b_a = tl.load(p_a_row + o_f[None, :] * s_af, mask=(o_f < F)[None, :], other=0.0)
            b_w = tl.load(p_w_row + o_f[:, None] * s_wf, mask=(o_f < F)[:, None], other=0.0)
            if UPCAST:
                b_a, b_w = b_a.to(tl.float32), b_w.to(tl.float32)
            b_acc = tl.dot(b_a, b_w, b_acc, input_precision="ieee")
        if HAS_BIAS:
            b_acc += tl.load(p_bias + o_o, mask=o_o < O, other=0.0).to(tl.float32)[None, :]
        tl.store(p_y + o_out, b_acc.to(p_y.dtype.element_ty), mask=m_out)
    else:
        j = part - 1 if HAS_MAIN else part
        low = tl.load(p_bounds + j)
        depth = (tl.load(p_bounds + j + 1) - low).to(tl.int32)
        p_a_row = p_packed + o_row * s_packed + (low // ALIGN + j) * ALIGN
        for k in range(0, depth, BK):
            b_a = tl.load(p_a_row + k + o_k[None, :])
            m_v = (k + o_k < depth)[:, None] & (o_o < O)[None, :]
            b_v = tl.load(p_values + (low + k + o_k)[:, None] * O + o_o[None, :], mask=m_v, other=0.0)
            if UPCAST:
                b_a, b_v = b_a.to(tl.float32), b_v.to(tl.float32)
            b_acc = tl.dot(b_a, b_v, b_acc, input_precision="ieee")
        row = (j * tiles_o + tile_o).to(tl.int64)
        tl.store(p_squares + row * N + o_n, tl.sum(b_acc * b_acc, 1), mask=o_n < N)
        if RESPONSE:
            tl.store(p_side + j.to(tl.int64) * N * O + o_out, b_acc.to(p_side.dtype.element_ty), mask=m_out)


def pack(a: Tensor, columns: Tensor, bounds: Tensor) -> Tensor:
    """The columns of all memories as [N, P]; `columns` contiguous."""
    rows, memories = a.shape[0], bounds.shape[0] - 1
    chunks = columns.shape[0] // ALIGN + memories
    packed = torch.empty(rows, chunks * ALIGN, dtype=a.dtype, device=a.device)
    if memories:
        compact_fwd_kernel[(chunks, triton.cdiv(rows, COMPACT_ROWS))](
            a, columns, bounds, packed, rows, memories, *a.stride(), packed.stride(0),
            BN=COMPACT_ROWS, BK=ALIGN, BJ=COMPACT_BOUNDS, num_warps=COMPACT_WARPS, **dependent(a),
        )  # fmt: skip
    return packed


def tiles_forward(a, weight, bias, values, columns, bounds, y, side, norms) -> None:
    """Fill y [N, O] (if not None), side [J, N or 0, O] and norms [J, N]."""
    (rows, width), outputs, memories = a.shape, values.shape[1], bounds.shape[0] - 1
    packed = pack(a, columns, bounds)
    products = memories + (weight is not None)
    tile = many_rows_tile(a, outputs, products)
    tiles_n, tiles_o = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    squares = torch.empty(memories, tiles_o, rows, dtype=torch.float32, device=a.device)
    given = values if weight is None else weight
    tiles_fwd_kernel[(products * tiles_n * tiles_o,)](
        a, given, given if bias is None else bias, packed, values, bounds, side if y is None else y, side, squares,
        rows, outputs, width, *a.stride(), *given.stride(), packed.stride(0),
        HAS_MAIN=weight is not None, HAS_BIAS=bias is not None, RESPONSE=side.shape[1] == rows,
        UPCAST=interpreted(), GROUP=GROUP, ALIGN=ALIGN, **tile.blocks, **tile.options, **dependent(a),
    )  # fmt: skip
    finish_norms(squares, norms)


def _compact_case(kind: str) -> AotCase:
    types = {"p_a": f"*{kind}", "p_columns": "*i64", "p_bounds": "*i64", "p_packed": f"*{kind}"}
    sizes = dict.fromkeys(("N", "memories", "s_an", "s_packed"), "i32")
    meta = {"s_af": 1, "BN": COMPACT_ROWS, "BK": ALIGN, "BJ": COMPACT_BOUNDS}
    signature = types | sizes | dict.fromkeys(meta, "constexpr")
    divisible = (*types, "s_an", "s_packed")
    return AotCase(f"compact/{kind}", compact_fwd_kernel, signature, meta, COMPACT_WARPS, divisible=divisible)


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = [_compact_case(kind) for kind in ("bf16", "fp16", "fp32")]
    sizes = dict.fromkeys(("N", "O", "F", "s_an", "s_wo", "s_packed"), "i32")
    for table, tiles in TILES.items():
        for kind, tile, fused in product(kinds_of(table), tiles, (True, False)):
            # The sides alone are the fused launch with less: one tile of a table proves that they compile.
            if not fused and tile is not tiles[0]:
                continue
            names = ("p_a", "p_weight", "p_bias", "p_packed", "p_values", "p_y", "p_side")
            types = dict.fromkeys(names, f"*{kind}") | {"p_bounds": "*i64", "p_squares": "*fp32"}
            meta = {"s_af": 1, "s_wf": 1, "HAS_MAIN": fused, "HAS_BIAS": fused, "RESPONSE": True, "UPCAST": False}
            meta |= {"GROUP": GROUP, "ALIGN": ALIGN} | tile.blocks
            cases.append(
                AotCase(
                    f"tiles/{table}/{tile.rows}x{tile.outputs}/{kind}/{'fused' if fused else 'side'}", tiles_fwd_kernel,
                    types | sizes | dict.fromkeys(meta, "constexpr"), meta,
                    expect=EXPECT_OF[table], **tile.options,
                    divisible=(*types, "O", "F", "s_an", "s_wo", "s_packed"), targets=TARGETS_OF[table],
                )
            )  # fmt: skip
    return cases
