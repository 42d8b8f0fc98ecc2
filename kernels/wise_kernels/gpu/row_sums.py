"""The second, small half of a forward: what many programs left in pieces is added up in a fixed order, so that a launch
gives the same bits every time. `sum_splits` adds the split-K parts of y and of the side responses and takes their row
norms; `finish_norms` turns the sums of squares by tile of outputs into norms. Both are bound by launch latency: their
inputs are in the L2 cache, where the launch before has just put them.

Rows, memories and splits are not specialised on, here and in the forwards: a new length or bank compiles nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, dependent, wait_for_inputs

SPLITS_BLOCK, SPLITS_WARPS = 2048, 8
NORMS_TILES, NORMS_BLOCK, NORMS_WARPS = 32, 32, 4


@triton.jit
def _sum_parts(p_parts, first, splits, n, N, O, o_o, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for s in range(splits):
        row = ((first + s) * N + n).to(tl.int64)
        b_sum += tl.load(p_parts + row * O + o_o, mask=o_o < O, other=0.0)
    return b_sum


@triton.jit(do_not_specialize=["N", "memories", "side_splits", "y_splits"])
def sum_splits_kernel(
    p_side_parts, p_y_parts, p_bias, p_side, p_norms, p_y, N, O, memories, side_splits, y_splits,
    RESPONSE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (n, i): row n of memory i over all outputs, or of block i - J of y. Reads (J splits + y_splits) N O
    floats."""
    wait_for_inputs(PDL)
    n, i = tl.program_id(0), tl.program_id(1)
    if i < memories:
        b_squares = tl.zeros([BLOCK], dtype=tl.float32)
        row = (i * N + n).to(tl.int64)
        for start in range(0, O, BLOCK):
            o_o = start + tl.arange(0, BLOCK)
            b_side = _sum_parts(p_side_parts, i * side_splits, side_splits, n, N, O, o_o, BLOCK)
            b_squares += b_side * b_side
            if RESPONSE:
                tl.store(p_side + row * O + o_o, b_side.to(p_side.dtype.element_ty), mask=o_o < O)
        tl.store(p_norms + row, tl.sqrt(tl.sum(b_squares, 0)))
    else:
        o_o = (i - memories) * BLOCK + tl.arange(0, BLOCK)
        b_y = _sum_parts(p_y_parts, 0, y_splits, n, N, O, o_o, BLOCK)
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_o, mask=o_o < O, other=0.0).to(tl.float32)
        tl.store(p_y + n.to(tl.int64) * O + o_o, b_y.to(p_y.dtype.element_ty), mask=o_o < O)


@triton.jit(do_not_specialize=["N", "tiles"])
def finish_norms_kernel(p_squares, p_norms, N, tiles, TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """norms [J, N] = sqrt of the sum over tiles of squares [J, tiles, N]; program (block of rows, memory)."""
    wait_for_inputs(PDL)
    o_n, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    b_sum = tl.zeros([TILES, BLOCK], dtype=tl.float32)
    for t in range(0, tiles, TILES):
        o_t = t + tl.arange(0, TILES)
        p_row = p_squares + (j * tiles + o_t).to(tl.int64)[:, None] * N
        b_sum += tl.load(p_row + o_n[None, :], mask=(o_t < tiles)[:, None] & (o_n < N)[None, :], other=0.0)
    tl.store(p_norms + j.to(tl.int64) * N + o_n, tl.sqrt(tl.sum(b_sum, 0)), mask=o_n < N)


def sum_splits(
    side_parts: Tensor, y_parts: Tensor | None, bias: Tensor | None, side: Tensor, norms: Tensor, y: Tensor | None
) -> None:
    """side [J, N or 0, O] and norms [J, N] from side_parts [J, splits, N, O]; y [N, O] from y_parts [splits, N, O]
    and bias [O] where y is given."""
    memories, splits, rows, outputs = side_parts.shape
    blocks = 0 if y is None else triton.cdiv(outputs, SPLITS_BLOCK)
    if memories + blocks == 0:
        return
    # A pointer that a launch does not follow still has to be one.
    given = side_parts if y_parts is None else y_parts
    sum_splits_kernel[(rows, memories + blocks)](
        side_parts, given, given if bias is None else bias, side, norms, norms if y is None else y,
        rows, outputs, memories, splits, 0 if y_parts is None else y_parts.shape[0],
        RESPONSE=side.shape[1] == rows, HAS_BIAS=bias is not None, BLOCK=SPLITS_BLOCK, num_warps=SPLITS_WARPS,
        **dependent(side_parts),
    )  # fmt: skip


def finish_norms(squares: Tensor, norms: Tensor) -> None:
    """norms [J, N] from squares [J, tiles, N]."""
    memories, tiles, rows = squares.shape
    if memories:
        finish_norms_kernel[(triton.cdiv(rows, NORMS_BLOCK), memories)](
            squares, norms, rows, tiles, TILES=NORMS_TILES, BLOCK=NORMS_BLOCK, num_warps=NORMS_WARPS, **dependent(norms)
        )


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []
    for kind in ("bf16", "fp16", "fp32"):
        types = {"p_side_parts": "*fp32", "p_y_parts": "*fp32", "p_norms": "*fp32"}
        types |= {name: f"*{kind}" for name in ("p_bias", "p_side", "p_y")}
        sizes = {name: "i32" for name in ("N", "O", "memories", "side_splits", "y_splits")}
        flags = {"RESPONSE": True, "HAS_BIAS": True, "BLOCK": SPLITS_BLOCK}
        signature = types | sizes | dict.fromkeys(flags, "constexpr")
        cases.append(
            AotCase(f"sum_splits/{kind}", sum_splits_kernel, signature, flags, SPLITS_WARPS, divisible=(*types, "O"))
        )
    types = {"p_squares": "*fp32", "p_norms": "*fp32", "N": "i32", "tiles": "i32"}
    meta, divisible = {"TILES": NORMS_TILES, "BLOCK": NORMS_BLOCK}, ("p_squares",)
    cases.append(AotCase("finish_norms", finish_norms_kernel, types, meta, NORMS_WARPS, divisible=divisible))
    return cases
