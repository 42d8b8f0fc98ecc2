"""Element layout on the device: side_j = a D_j^T [J, N, O] and norms_j(t) = ||side_j,t||_2 [J, N] (eq. 3), D_j [O, F]
expanded on the fly from bits [J, O, ceil(F/32)] and its packed values, and never in device memory.

The expansion is in `element_tile.py`; it is the left factor, side_j^T = D_j a^T, whose fragments matrix units take from
registers, and read one step ahead of its product.

Few rows (N <= 64): 2 V + O F (1/8 + 1/16) bytes for 16-bit values, at rho 0.2 and 4096 x 11008 26 MB or 11 us at 2.43
TB/s; but bound by the integer units: some 70 of the 120 instructions of a warp for 32 octets are theirs, two cycles
each, 25 us on 132 SMs at 1.75 GHz (predicted), beside a plain projection of 48 us. More rows: the matrix product is
dense, 2 N O F, as long as the plain projection's. A program has 256 rows and two sums of 64 outputs: while the matrix
units are at one, the other's block is expanded. A step takes them 1024 cycles, the integer units about 1000, and its 36
KB come from the L2 cache in 1000 to 1400. Predicted at 2048 rows: 333 steps an SM, 200 to 290 us, beside 225 us of
plain projection; at 512 rows, in two splits, 70 to 90 us beside 65.

Measured on an H100: about 570 us at 2048 rows and 155 at 512, where 837 and 261 were taken before octets lay in one
dimension (lanes of a load ran down the rows under triton 3.6, each on a line of its own) and two sums overlapped. That
was with up to three loads an octet that nobody needs; without them it was not measured.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .element_tile import before_first, memory_of, next_block, octets_of, pairs_of, popcount_table, splits_of
from .launch import AotCase, dependent, guard, interpreted, wait_for_inputs
from .row_sums import finish_norms, sum_splits
from .tile import EXPECT_OF, TARGETS_OF, Tile, family, kinds_of

FEW_ROWS, SOME_ROWS = 16, 64
# (up to FEW_ROWS, up to SOME_ROWS, more)
TILES = {
    "wgmma": (Tile(16, 64, 64, 4, 2, 128), Tile(64, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3)),
    "mma": (Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
    "amd": (Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 8, 2), Tile(128, 64, 64, 4, 2)),
    "fp32": (Tile(16, 64, 16, 4, 3), Tile(64, 64, 16, 4, 3), Tile(64, 64, 16, 4, 3)),
}


@triton.jit(do_not_specialize=["N", "splits"])
def element_fwd_kernel(
    p_a, p_values, p_bits, p_table, p_bounds, p_parts, p_side, p_squares,
    N, O, F, W, blocks, s_an, splits, chunk,
    SPLIT: tl.constexpr, RESPONSE: tl.constexpr, UPCAST: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BN rows and BO outputs of one memory. SPLIT: over one of `splits` chunks of F, into parts [J splits, N,
    O]; bound by the bytes of values and bits. Else over F, into the response and sums of squares [J, tiles of O, N];
    bound by the matrix units, and by the issue slots of the expansion."""
    wait_for_inputs(PDL)
    tiles_n, tiles_o = tl.cdiv(N, BN), tl.cdiv(O, BO)
    # Programs of one block of outputs side by side: they read the same values and bits.
    tile_n, tile_o = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n % tiles_o
    part = tl.program_id(0) // (tiles_n * tiles_o)
    j = part // splits
    first = part % splits * chunk
    last = min(first + chunk, F)
    o_n, o_k = tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    HALF: tl.constexpr = BO // 2
    row, o_oct = octets_of(HALF, BK)
    # Offsets inside a tile fit 32 bits, and take half of the registers; its first row is reached by 64.
    memory = memory_of(p_values, p_bits, p_table, p_bounds, j, tile_o * BO, O, W, blocks)
    last_row = O - 1 - tile_o * BO
    row0 = tl.minimum(row, last_row)
    row1 = tl.minimum(HALF + row, last_row)
    p_a += (tile_n * BN).to(tl.int64) * s_an
    o_a = tl.minimum(tl.arange(0, BN), N - 1 - tile_n * BN)[:, None] * s_an + o_k[None, :]
    b_acc0, b_acc1 = tl.zeros([HALF, BN], dtype=tl.float32), tl.zeros([HALF, BN], dtype=tl.float32)
    ahead0 = before_first(memory, row0, first, o_oct, W, blocks, HALF, BK)
    ahead1 = before_first(memory, row1, first, o_oct, W, blocks, HALF, BK)
    for k in range(first - BK, last, BK):
        b_a = tl.load(p_a + k + o_a, mask=((k >= first) & (k + o_k < F))[None, :], other=0.0)
        if UPCAST:
            b_a = b_a.to(tl.float32)
        # Two sums: while the matrix units are at one, the other's block is expanded.
        b_d, ahead0 = next_block(memory, ahead0, row0, k, o_oct, W, blocks, UPCAST, HALF, BK)
        b_acc0 = tl.dot(b_d, tl.trans(b_a), b_acc0, input_precision="ieee")
        b_d, ahead1 = next_block(memory, ahead1, row1, k, o_oct, W, blocks, UPCAST, HALF, BK)
        b_acc1 = tl.dot(b_d, tl.trans(b_a), b_acc1, input_precision="ieee")
    m_n, o_out = (o_n < N)[None, :], o_n.to(tl.int64)[None, :] * O
    o_o = tile_o * BO + tl.arange(0, HALF)[:, None]
    if SPLIT:
        p_parts += part.to(tl.int64) * N * O
        tl.store(p_parts + (o_out + o_o), b_acc0, mask=m_n & (o_o < O))
        tl.store(p_parts + (o_out + o_o + HALF), b_acc1, mask=m_n & (o_o + HALF < O))
    else:
        if RESPONSE:
            p_side += j.to(tl.int64) * N * O
            tl.store(p_side + (o_out + o_o), b_acc0.to(p_side.dtype.element_ty), mask=m_n & (o_o < O))
            tl.store(p_side + (o_out + o_o + HALF), b_acc1.to(p_side.dtype.element_ty), mask=m_n & (o_o + HALF < O))
        # Rows past the last output repeat it.
        b_acc0, b_acc1 = tl.where(o_o < O, b_acc0, 0.0), tl.where(o_o + HALF < O, b_acc1, 0.0)
        b_squares = tl.sum(b_acc0 * b_acc0, 0) + tl.sum(b_acc1 * b_acc1, 0)
        tl.store(p_squares + (j * tiles_o + tile_o).to(tl.int64) * N + o_n, b_squares, mask=o_n < N)


def element_forward(
    a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor, response: bool = True, popcounts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """side [J, N, O] ([J, 0, O] without `response`) and norms [J, N] fp32 of a bank in the element layout.

    Shapes and dtypes as in `wise_kernels.side_forward_element`; `popcounts` is popcount_table(bits), made here if not
    given. `a` is copied unless its rows are contiguous; a memory has fewer than 2^31 weights. Two launches, no sync.
    """
    (rows, width), (memories, outputs, words) = a.shape, bits.shape
    side = torch.empty(memories, rows if response else 0, outputs, dtype=a.dtype, device=a.device)
    norms = torch.empty(memories, rows, dtype=torch.float32, device=a.device)
    if not (rows and outputs and memories):
        return side, norms
    a = a if a.stride(1) == 1 else a.contiguous()
    values, bits = pairs_of(values), bits.contiguous()
    popcounts = popcount_table(bits) if popcounts is None else popcounts
    tile = TILES[family(a)][(rows > FEW_ROWS) + (rows > SOME_ROWS)]
    tiles_n, tiles_o = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    splits = splits_of(tile, memories * tiles_n * tiles_o, width)
    split = rows <= SOME_ROWS or splits > 1
    shape = (memories, splits, rows, outputs) if split else (memories, tiles_o, rows)
    sums = torch.empty(shape, dtype=torch.float32, device=a.device)
    with guard(a):
        element_fwd_kernel[(memories * splits * tiles_n * tiles_o,)](
            a, values, bits, popcounts, bounds, sums, side, sums,
            rows, outputs, width, words, popcounts.shape[2], a.stride(0), splits,
            triton.cdiv(triton.cdiv(width, splits), tile.depth) * tile.depth,
            SPLIT=split, RESPONSE=response, UPCAST=interpreted(), **tile.blocks, **tile.options,
            **dependent(a),
        )  # fmt: skip
        if split:
            sum_splits(sums, None, None, side, norms, None)
        else:
            finish_norms(sums, norms)
    return side, norms


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []
    for table, tiles in TILES.items():
        for kind, (i, split) in product(kinds_of(table), ((0, True), (1, True), (2, True), (2, False))):
            tile, types = tiles[i], dict.fromkeys(("p_a", "p_values", "p_side"), f"*{kind}")
            types |= {"p_bits": "*i32", "p_table": "*i32", "p_bounds": "*i64", "p_parts": "*fp32", "p_squares": "*fp32"}
            sizes = dict.fromkeys(("N", "O", "F", "W", "blocks", "s_an", "splits", "chunk"), "i32")
            meta = {"SPLIT": split, "RESPONSE": True, "UPCAST": False} | tile.blocks
            cases.append(
                AotCase(
                    f"element/{table}/{'split' if split else 'tiles'}/{i}/{kind}", element_fwd_kernel,
                    types | sizes | dict.fromkeys(meta, "constexpr"), meta,
                    # 16 rows have 32 outputs a sum, and wgmma has 64.
                    expect=EXPECT_OF[table] if tile.rows > FEW_ROWS or table == "fp32" else "mma",
                    divisible=(*types, "O", "F", "s_an", "chunk"), targets=TARGETS_OF[table], **tile.options,
                )
            )  # fmt: skip
    return cases
