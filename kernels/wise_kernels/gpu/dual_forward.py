"""Neuron layout on the device: side_j = a[:, S_j] values_j [J, N, O], norms_j(t) = ||side_j,t||_2 [J, N] (eq. 3) and,
fused into the same launch if asked, y = a W^T + b [N, O]. a [N, F], W [O, F], values [R, O], columns and bounds as in
`wise_kernels.dual_forward`; everything accumulates in fp32.

Few rows (N <= 16), this file: bound by the bytes of `values` (and W), 2 R O (+ 2 O F) in 16 bits. The product is
computed transposed, values^T a_S^T, so that outputs fill the 64 rows that a Hopper matrix instruction has and tokens
its narrow side, and the summed dimension is split over programs until all SMs read. The parts are added in order by
`sum_splits`. More rows: `dual_tiles.py`, which was the faster of the two from 17 on (64 rows, H100: 25 and 44 us).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dual_tiles import tiles_forward
from .launch import AotCase, dependent, guard, interpreted, wait_for_inputs
from .row_sums import sum_splits
from .tile import EXPECT_OF, TARGETS_OF, Tile, family, kinds_of

FEW_ROWS = 16
TILES = {
    "wgmma": Tile(FEW_ROWS, 128, 64, 4, 4),
    "mma": Tile(FEW_ROWS, 128, 32, 4, 5),
    "amd": Tile(FEW_ROWS, 128, 64, 4, 2),
    "fp32": Tile(FEW_ROWS, 64, 16, 4, 4),
}
# Programs that keep a large device reading, a few for each of 132 SMs.
PROGRAMS = 512


@triton.jit
def _load_rows(p_a, o_k, m_k, o_n, N, s_an, s_ak):
    return tl.load(p_a + o_k.to(tl.int64)[:, None] * s_ak + o_n * s_an, mask=m_k[:, None] & (o_n < N), other=0.0)


@triton.jit
def _main_part(
    p_a, p_weight, N, O, F, s_an, s_af, s_wo, s_wf, first, last, o_o, o_n, b_acc,
    BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """b_acc [BO, BN] += W a^T over inputs first:last."""
    for k in range(first, min(last, F), BK):
        o_f = k + tl.arange(0, BK)
        p_w = p_weight + o_o.to(tl.int64)[:, None] * s_wo + o_f.to(tl.int64)[None, :] * s_wf
        b_w = tl.load(p_w, mask=(o_o < O)[:, None] & (o_f < F)[None, :], other=0.0)
        b_a = _load_rows(p_a, o_f, o_f < F, o_n, N, s_an, s_af)
        if UPCAST:
            b_w, b_a = b_w.to(tl.float32), b_a.to(tl.float32)
        b_acc = tl.dot(b_w, b_a, b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def _side_part(
    p_a, p_values, p_columns, N, O, s_an, s_af, first, last, o_o, o_n, b_acc, BK: tl.constexpr, UPCAST: tl.constexpr
):
    """b_acc [BO, BN] += values^T a_S^T over rows first:last of a memory's values and columns."""
    o_k = tl.arange(0, BK)
    # Gathered two and one steps ahead: 2-byte elements cannot go through an asynchronous copy, so nobody else would
    # hide these two latencies, one behind the other.
    b_col = tl.load(p_columns + first + o_k, mask=first + o_k < last, other=0)
    b_a = _load_rows(p_a, b_col, first + o_k < last, o_n, N, s_an, s_af)
    b_col = tl.load(p_columns + first + BK + o_k, mask=first + BK + o_k < last, other=0)
    for r in range(first, last, BK):
        o_r = r + o_k
        p_v = p_values + o_r.to(tl.int64)[:, None] * O + o_o[None, :]
        b_v = tl.load(p_v, mask=(o_r < last)[:, None] & (o_o < O)[None, :], other=0.0)
        b_next = _load_rows(p_a, b_col, o_r + BK < last, o_n, N, s_an, s_af)
        b_col = tl.load(p_columns + 2 * BK + o_r, mask=o_r + 2 * BK < last, other=0)
        if UPCAST:
            b_v, b_a = b_v.to(tl.float32), b_a.to(tl.float32)
        b_acc = tl.dot(tl.trans(b_v), b_a, b_acc, input_precision="ieee")
        b_a = b_next
    return b_acc


@triton.jit(do_not_specialize=["N", "y_splits", "side_splits"])
def split_fwd_kernel(
    p_a, p_weight, p_values, p_columns, p_bounds, p_y_parts, p_side_parts,
    N, O, F, s_an, s_af, s_wo, s_wf, y_splits, y_chunk, side_splits,
    BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Transposed parts of y, y_splits of them, then of each memory, side_splits each; a program has BO outputs of one.

    Bound by memory bandwidth: W and `values` are read once, with (stages - 1) BK BO elements a program in flight.
    """
    wait_for_inputs(PDL)
    tiles = tl.cdiv(O, BO)
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_o = tile * BO + tl.arange(0, BO)
    o_n = tl.arange(0, BN).to(tl.int64)[None, :]
    o_out = o_n * O + o_o[:, None]
    m_out = (o_o < O)[:, None] & (o_n < N)
    b_acc = tl.zeros([BO, BN], dtype=tl.float32)
    if part < y_splits:
        b_acc = _main_part(
            p_a, p_weight, N, O, F, s_an, s_af, s_wo, s_wf,
            part * y_chunk, (part + 1) * y_chunk, o_o, o_n, b_acc, BK, UPCAST,
        )  # fmt: skip
        tl.store(p_y_parts + part.to(tl.int64) * N * O + o_out, b_acc, mask=m_out)
    else:
        part -= y_splits
        j, split = part // side_splits, part % side_splits
        low = tl.load(p_bounds + j)
        rows = (tl.load(p_bounds + j + 1) - low).to(tl.int32)
        chunk = tl.cdiv(tl.cdiv(rows, side_splits), BK) * BK
        b_acc = _side_part(
            p_a, p_values + low * O, p_columns + low, N, O, s_an, s_af,
            split * chunk, min((split + 1) * chunk, rows), o_o, o_n, b_acc, BK, UPCAST,
        )  # fmt: skip
        tl.store(p_side_parts + part.to(tl.int64) * N * O + o_out, b_acc, mask=m_out)


def splits_of(depth: int, parts: int, tiles: int, tile: Tile) -> int:
    """How many programs share a sum over `depth` so that parts * tiles * splits of them are enough; one at least."""
    wanted = triton.cdiv(PROGRAMS, max(parts * tiles, 1))
    # A program with fewer than four steps never fills its pipeline.
    return max(1, min(wanted, depth // (4 * tile.depth)))


def _few_rows(a, weight, bias, values, columns, bounds, y, side, norms) -> None:
    rows, width = a.shape
    outputs, memories = values.shape[1], bounds.shape[0] - 1
    tile = TILES[family(a)]
    tiles = triton.cdiv(outputs, tile.outputs)
    y_splits = 0 if weight is None else splits_of(width, 1, tiles, tile)
    side_splits = splits_of(values.shape[0] // max(memories, 1), memories, tiles, tile)
    side_parts = torch.empty(memories, side_splits, rows, outputs, dtype=torch.float32, device=a.device)
    y_parts = None
    if weight is not None:
        y_parts = torch.empty(y_splits, rows, outputs, dtype=torch.float32, device=a.device)
    given = values if weight is None else weight
    split_fwd_kernel[((y_splits + memories * side_splits) * tiles,)](
        a, given, values, columns, bounds, side_parts if y_parts is None else y_parts, side_parts,
        rows, outputs, width, *a.stride(), *given.stride(),
        y_splits, triton.cdiv(triton.cdiv(width, max(y_splits, 1)), tile.depth) * tile.depth, side_splits,
        UPCAST=interpreted(), **tile.blocks, **tile.options, **dependent(a),
    )  # fmt: skip
    sum_splits(side_parts, y_parts, bias, side, norms, y)


def dual_forward(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    response: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """y [N, O] (None without `weight`), side [J, N, O] ([J, 0, O] without `response`) and norms [J, N] fp32.

    Shapes and dtypes as in `wise_kernels.dual_forward`, `bounds [J + 1] int64` on the device of `a`. `a` and `weight`
    may have any strides; `values` and `columns` are made contiguous, as banks are. Two to four launches, no sync.
    """
    values, columns = values.contiguous(), columns.contiguous()
    rows, outputs, memories = a.shape[0], values.shape[1], bounds.shape[0] - 1
    y = None if weight is None else torch.empty(rows, outputs, dtype=a.dtype, device=a.device)
    side = torch.empty(memories, rows if response else 0, outputs, dtype=a.dtype, device=a.device)
    norms = torch.empty(memories, rows, dtype=torch.float32, device=a.device)
    if rows and outputs and (memories or weight is not None):
        with guard(a):
            forward = _few_rows if rows <= FEW_ROWS else tiles_forward
            forward(a, weight, bias, values, columns, bounds, y, side, norms)
    return y, side, norms


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []
    sizes = ("N", "O", "F", "s_an", "s_wo", "y_splits", "y_chunk", "side_splits")
    for table, tile in TILES.items():
        for kind in kinds_of(table):
            types = dict.fromkeys(("p_a", "p_weight", "p_values"), f"*{kind}")
            types |= {"p_columns": "*i64", "p_bounds": "*i64", "p_y_parts": "*fp32", "p_side_parts": "*fp32"}
            meta = {"s_af": 1, "s_wf": 1, "UPCAST": False} | tile.blocks
            cases.append(
                AotCase(
                    f"split/{table}/{kind}", split_fwd_kernel,
                    types | dict.fromkeys(sizes, "i32") | dict.fromkeys(meta, "constexpr"), meta,
                    expect=EXPECT_OF[table], **tile.options,
                    divisible=(*types, "O", "F", "s_an", "s_wo", "y_chunk"), targets=TARGETS_OF[table],
                )
            )  # fmt: skip
    return cases
