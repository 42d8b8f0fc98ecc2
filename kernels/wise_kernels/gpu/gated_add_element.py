"""gated_add_ on a device, element layout: y_n += a_n D_j^T for j = choice[n // T], in place; D_j [O, F] is its mask
bits [J, O, ceil(F/32)] and packed values [V], expanded a tile at a time as in `dual_forward_element` and never kept.
Rows of choice -1 keep their bits, and with none in scope every program is done after reading the choices.

`popcounts` says where the values of a tile begin; without it every call counts the bits of the whole bank. Sums are cut
over the columns where that fills the device, and `sum` adds the parts in order. Bound by the integer units that expand:
25 us for Llama-2-7B on an H100 (predicted), once for up to 16 rows (decode) and once for every 128 (prefill, beside the
dense product, 2 N O F FLOP). Measured there: 45 us for 1 to 8 rows, 58 with programs of eight warps instead of four:
too little is in flight, as an octet's word, count and values are read one behind the other.
"""

from dataclasses import replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .element_tile import before_first, memory_of, next_block, octets_of, pairs_of, popcount_table, splits_of
from .gated_add import add_rows
from .gated_rows import ordered, rows_of
from .launch import SIZES, AotCase, dependent, guard, interpreted, wait_for_inputs
from .tile import EXPECT_OF, TARGETS_OF, Tile, family, is_sm100, kinds_of

FEW_ROWS, SOME_ROWS = 16, 64
# (up to FEW_ROWS, up to SOME_ROWS, more)
TILES = {
    "wgmma": (Tile(16, 64, 64, 4, 2, 128), Tile(64, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    "mma": (Tile(16, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
    "amd": (Tile(16, 64, 64, 4, 2), Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2)),
    "fp32": (Tile(16, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
}
# What keeps a decode step's registers from spilling on sm_100, whose compiler needs a few more.
REGISTERS_SM100 = 144
SUM_O = 256
LARGEST = 2**31 - 1


@triton.jit(do_not_specialize=SIZES)
def element_fwd_kernel(
    p_y, p_parts, p_a, p_values, p_bits, p_bounds, p_table, p_choice, p_order,
    rows, tokens, memories, outputs, width, words, blocks, chunk, s_yn, s_yo, s_an, s_af,
    ORDER: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BO outputs of BN positions over a chunk of the columns; added to y, or if SPLIT kept in parts [splits, N, O]."""
    wait_for_inputs(PDL)
    o_p = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    b_n, b_j = rows_of(p_choice, p_order, o_p, rows, tokens, memories, ORDER)
    HALF: tl.constexpr = BO // 2
    first = tl.program_id(0) * BO
    o_o, o_k = first + tl.arange(0, HALF), tl.arange(0, BK)
    row, o_oct = octets_of(HALF, BK)
    # Rows past the last output repeat it.
    row0 = tl.minimum(row, outputs - 1 - first)
    row1 = tl.minimum(HALF + row, outputs - 1 - first)
    start, end = split * chunk, min((split + 1) * chunk, width)
    j = tl.max(b_j, 0)
    while j >= 0:
        # Rows of other memories read the first one, and nobody what it gives.
        b_row = tl.where(b_j == j, b_n.to(tl.int32), -1)
        o_a = (tl.maximum(b_row, 0) * s_an)[:, None] + (o_k * s_af)[None, :]
        memory = memory_of(p_values, p_bits, p_table, p_bounds, j, first, outputs, words, blocks)
        j = tl.max(tl.where(b_j < j, b_j, -1), 0)
        b_acc0, b_acc1 = tl.zeros([HALF, BN], tl.float32), tl.zeros([HALF, BN], tl.float32)
        ahead0 = before_first(memory, row0, start, o_oct, words, blocks, HALF, BK)
        ahead1 = before_first(memory, row1, start, o_oct, words, blocks, HALF, BK)
        for k in range(start - BK, end, BK):
            p_tile = p_a + tl.cast(k, tl.int64) * s_af + o_a
            b_a = tl.load(p_tile, mask=((k >= start) & (k + o_k < width))[None, :], other=0.0)
            if UPCAST:
                b_a = b_a.to(tl.float32)
            # Two sums, as in `dual_forward_element`.
            b_d, ahead0 = next_block(memory, ahead0, row0, k, o_oct, words, blocks, UPCAST, HALF, BK)
            b_acc0 = tl.dot(b_d, tl.trans(b_a), b_acc0, input_precision="ieee")
            b_d, ahead1 = next_block(memory, ahead1, row1, k, o_oct, words, blocks, UPCAST, HALF, BK)
            b_acc1 = tl.dot(b_d, tl.trans(b_a), b_acc1, input_precision="ieee")
        b_mine = b_row >= 0
        if SPLIT:
            p_tile = p_parts + split.to(tl.int64) * rows * outputs + ((b_row * outputs)[None, :] + o_o[:, None])
            tl.store(p_tile, b_acc0, mask=b_mine[None, :] & (o_o < outputs)[:, None])
            tl.store(p_tile + HALF, b_acc1, mask=b_mine[None, :] & (o_o + HALF < outputs)[:, None])
        else:
            o_out = o_o.to(tl.int64)
            add_rows(p_y, tl.trans(b_acc0), b_row.to(tl.int64), o_out, b_mine, o_o < outputs, s_yn, s_yo)
            add_rows(p_y, tl.trans(b_acc1), b_row.to(tl.int64), o_out + HALF, b_mine, o_o + HALF < outputs, s_yn, s_yo)


@triton.jit(do_not_specialize=SIZES)
def sum_fwd_kernel(
    p_y,
    p_parts,
    p_choice,
    rows,
    tokens,
    memories,
    outputs,
    splits,
    s_yn,
    s_yo,
    BLOCK_O: tl.constexpr,
    PDL: tl.constexpr,
):
    """y += the parts of a row in scope, in their order."""
    wait_for_inputs(PDL)
    n = tl.program_id(0)
    j = tl.load(p_choice + n // tokens)
    if (j >= 0) & (j < memories):
        o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
        m_o = o_o < outputs
        b_sum = tl.zeros([BLOCK_O], tl.float32)
        for split in range(splits):
            b_sum += tl.load(p_parts + (split * rows + n).to(tl.int64) * outputs + o_o, mask=m_o, other=0.0)
        p_row = p_y + n.to(tl.int64) * s_yn + o_o * s_yo
        b_y = tl.load(p_row, mask=m_o, other=0.0).to(tl.float32)
        tl.store(p_row, (b_y + b_sum).to(p_y.dtype.element_ty), mask=m_o)


def tile_of(table: str, regime: int, sm100: bool) -> Tile:
    """The tile for up to FEW_ROWS, up to SOME_ROWS or more (0, 1, 2)."""
    tile = TILES[table][regime]
    return replace(tile, registers=REGISTERS_SM100) if sm100 and tile.registers else tile


def gated_add_element(
    y: Tensor, a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor, choice: Tensor, popcounts: Tensor | None = None
) -> None:
    """y += the chosen memories' responses; bf16, fp16 or fp32, y and a of any strides."""
    memories, outputs, words = bits.shape
    rows, width = a.shape
    if bits.numel() == 0 or y.numel() == 0:
        return
    tokens, batch = rows // choice.shape[0], choice.shape[0]
    if rows * abs(a.stride(0)) > LARGEST and rows > 1:
        # Offsets of rows are 32-bit: in two parts, of sequences or of one's tokens.
        half = batch // 2 * tokens or rows // 2
        one, two = (choice[: batch // 2], choice[batch // 2 :]) if batch > 1 else (choice, choice)
        gated_add_element(y[:half], a[:half], values, bits, bounds, one, popcounts)
        gated_add_element(y[half:], a[half:], values, bits, bounds, two, popcounts)
        return
    values, bits, choice = pairs_of(values), bits.contiguous(), choice.contiguous()
    tile = tile_of(family(a), (rows > FEW_ROWS) + (rows > SOME_ROWS), is_sm100(a))
    tiles_n, tiles_o = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs)
    splits = splits_of(tile, tiles_n * tiles_o, width)
    chunk = triton.cdiv(triton.cdiv(width, splits), tile.depth) * tile.depth
    table = popcount_table(bits) if popcounts is None else popcounts.contiguous()
    parts = torch.empty(splits if splits > 1 else 0, rows, outputs, dtype=torch.float32, device=y.device)
    with guard(y):
        order = ordered(choice, memories) if tokens < tile.rows < rows and batch > 1 else None
        element_fwd_kernel[(tiles_o, tiles_n, splits)](
            y, parts, a, values, bits, bounds, table, choice, order,
            rows, tokens, memories, outputs, width, words, table.shape[2], chunk, *y.stride(), *a.stride(),
            ORDER=order is not None, UPCAST=interpreted(), SPLIT=splits > 1, **tile.blocks, **tile.options,
            **dependent(y),
        )  # fmt: skip
        if splits > 1:
            sum_fwd_kernel[(rows, triton.cdiv(outputs, SUM_O))](
                y, parts, choice, rows, tokens, memories, outputs, splits, *y.stride(), BLOCK_O=SUM_O,
                **dependent(y),
            )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []
    integers = {"p_bits": "*i32", "p_table": "*i32"}
    integers |= dict.fromkeys(("p_bounds", "p_choice", "p_order"), "*i64")

    def case(name, kernel, kind, meta, **options):
        types = dict.fromkeys(("p_y", "p_a", "p_values"), f"*{kind}") | {"p_parts": "*fp32"} | integers
        meta = {name: value for name, value in ({"s_yo": 1, "s_af": 1} | meta).items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in meta else types.get(name, "i32") for name in kernel.arg_names}
        usual = (*types, "outputs", "width", "chunk", "s_yn", "s_an")
        divisible = tuple(n for n in usual if signature.get(n, "constexpr") != "constexpr")
        cases.append(AotCase(name, kernel, signature, meta, divisible=divisible, **options))

    for table, tiles in TILES.items():
        for kind, (i, split) in product(kinds_of(table), ((0, True), (1, True), (2, True), (2, False))):
            targets = [(t,) for t in TARGETS_OF[table]] if tiles[i].registers else [TARGETS_OF[table]]
            for on in targets:
                tile = tile_of(table, i, on == ("sm_100",))
                meta = {"ORDER": i > 1, "UPCAST": False, "SPLIT": split, "PDL": False} | tile.blocks
                meta |= {} if i > 1 else {"p_order": None}
                expect = EXPECT_OF[table] if tile.rows > FEW_ROWS or table == "fp32" else "mma"
                name = f"gated_add_element/{table}/{'split' if split else 'tiles'}/{i}/{kind}"
                name += f"/{on[0]}" if tile.registers else ""
                case(name, element_fwd_kernel, kind, meta, expect=expect, targets=on, **tile.options)
    for kind in ("bf16", "fp16", "fp32"):
        case(f"gated_add_element/sum/{kind}", sum_fwd_kernel, kind, {"BLOCK_O": SUM_O, "PDL": False})
    return cases
