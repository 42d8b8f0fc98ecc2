"""gated_add_ on a device, element layout: y_n += a_n D_j^T for j = choice[n // T], in place; D_j [O, F] is its mask
bits [J, O, ceil(F/32)] and packed values [V], unpacked a tile at a time on the way to the matrix units and never kept.
Rows of choice -1 keep their bits, and with none in scope every program is done after reading the choices.

The value of bit (o, c) comes after those of all bits before it: `count` counts the bits of each row of the chosen
memories (O F / 8 bytes a memory), `element` adds up what precedes its tile and counts on within it. Few rows are cut
over the columns to fill the device, and `sum` adds the parts in order. Bound by unpacking, some 20 integer instructions
for each of the O F positions: 60 us of an H100's integer units for Llama-2-7B, once for up to 16 rows (decode) and once
for every 256 (prefill, beside the product of 2 N O F FLOP). Not measured yet on a device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_add import POINTERS, add_rows
from .gated_rows import ordered, rows_of
from .launch import SIZES, AotCase, guard, interpreted

# BLOCK_N, BLOCK_O, WORDS (of 32 columns a step), SPLITS of the columns, num_warps, num_stages
FEW, SOME, MANY = (16, 32, 2, 4, 4, 3), (64, 32, 2, 4, 4, 3), (256, 64, 2, 1, 8, 2)
MANY_AMD = (128, 64, 1, 1, 8, 2)
FEW_FP32, MANY_FP32 = (16, 32, 1, 4, 4, 2), (32, 32, 1, 1, 8, 2)
COUNT_O, COUNT_W = 16, 64
PREFIX = 1024
SUM_O = 256


@triton.jit
def popcount(x):
    """Set bits of uint32 words, in the form that LLVM turns into one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(p_bits, o_row, o_w, m):
    return tl.load(p_bits + o_row + o_w, mask=m, other=0).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def count_fwd_kernel(
    p_counts, p_bits, p_choice, batch, outputs, words, span, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """counts [J, O, SPLITS]: set bits of `span` words of each row, of the memories that a sequence has chosen."""
    j, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    wanted = 0
    for b in range(0, batch, BLOCK_W):
        o_b = b + tl.arange(0, BLOCK_W)
        wanted = tl.maximum(wanted, tl.max((tl.load(p_choice + o_b, mask=o_b < batch, other=-1) == j).to(tl.int32), 0))
    if wanted > 0:
        o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        o_row = (j * outputs + o_o) * words
        end = min((split + 1) * span, words)
        b_count = tl.zeros([BLOCK_O], tl.int32)
        for w in range(split * span, end, BLOCK_W):
            o_w = w + tl.arange(0, BLOCK_W)
            m = (o_o < outputs)[:, None] & (o_w < end)[None, :]
            b_count += tl.sum(popcount(load_words(p_bits, o_row[:, None], o_w[None, :], m)), 1)
        tl.store(p_counts + (j * outputs + o_o) * SPLITS + split, b_count, mask=o_o < outputs)


@triton.jit
def starts_of(p_counts, first, o_o, m_o, split, SPLITS: tl.constexpr, PREFIX: tl.constexpr):
    """Set bits of a memory before the rows o_o = first, first + 1, ... at their `split`: [BLOCK_O] int32."""
    b_sum = tl.zeros([PREFIX], tl.int32)
    for i in range(0, first * SPLITS, PREFIX):
        o_i = i + tl.arange(0, PREFIX)
        b_sum += tl.load(p_counts + o_i, mask=o_i < first * SPLITS, other=0)
    o_s = tl.arange(0, SPLITS)
    b_count = tl.load(p_counts + o_o[:, None] * SPLITS + o_s[None, :], mask=m_o[:, None] & (o_s >= 0)[None, :], other=0)
    b_row = tl.sum(b_count, 1)
    b_within = tl.sum(tl.where((o_s < split)[None, :], b_count, 0), 1)
    return tl.sum(b_sum, 0) + tl.cumsum(b_row, 0) - b_row + b_within


@triton.jit
def unpack(p_values, b_word, b_at, BLOCK_O: tl.constexpr, WORDS: tl.constexpr):
    """D [BLOCK_O, 32 WORDS] of words [BLOCK_O, WORDS], whose first value is at b_at [BLOCK_O]; and the set bits."""
    b_count = popcount(b_word)
    b_first = b_at[:, None] + tl.cumsum(b_count, 1) - b_count
    o_c = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    b_below = popcount(b_word[:, :, None] & ((1 << o_c) - 1))
    b_set = ((b_word[:, :, None] >> o_c) & 1) != 0
    b_d = tl.load(p_values + b_first[:, :, None] + b_below, mask=b_set, other=0.0)
    return tl.reshape(b_d, [BLOCK_O, WORDS * 32]), tl.sum(b_count, 1)


@triton.jit(do_not_specialize=SIZES)
def element_fwd_kernel(
    p_y, p_parts, p_a, p_values, p_bits, p_bounds, p_counts, p_choice, p_order,
    rows, tokens, memories, outputs, width, words, span, s_yn, s_yo, s_an, s_af,
    ORDER: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of BLOCK_N positions over a split of the columns; added to y, or kept in parts [SPLITS, N, O]."""
    o_p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    b_n, b_j = rows_of(p_choice, p_order, o_p, rows, tokens, memories, ORDER)
    first = tl.program_id(0) * BLOCK_O
    o_o = first + tl.arange(0, BLOCK_O)
    m_o = o_o < outputs
    o_w, o_c = tl.arange(0, WORDS), tl.arange(0, 32 * WORDS)
    m_n = o_p < rows
    b_left = b_j
    j = tl.max(b_left, 0)
    while j >= 0:
        b_at = starts_of(p_counts + j.to(tl.int64) * outputs * SPLITS, first, o_o, m_o, split, SPLITS, PREFIX)
        p_memory = p_values + tl.load(p_bounds + j)
        o_row = (j.to(tl.int64) * outputs + o_o) * words
        end = min((split + 1) * span, words)
        b_acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for w in range(split * span, end, WORDS):
            m_w = m_o[:, None] & (w + o_w < end)[None, :]
            b_word = load_words(p_bits, o_row[:, None], (w + o_w)[None, :], m_w)
            b_d, b_count = unpack(p_memory, b_word, b_at, BLOCK_O, WORDS)
            b_at += b_count
            o_f = w * 32 + o_c
            p_tile = p_a + (b_n * s_an)[:, None] + (o_f.to(tl.int64) * s_af)[None, :]
            b_a = tl.load(p_tile, mask=m_n[:, None] & (o_f < width)[None, :], other=0.0)
            if UPCAST:
                b_a, b_d = b_a.to(tl.float32), b_d.to(tl.float32)
            b_acc = tl.dot(b_a, tl.trans(b_d), b_acc, input_precision="ieee")
        b_mine = b_j == j
        if SPLITS == 1:
            add_rows(p_y, b_acc, b_n, o_o.to(tl.int64), b_mine, m_o, s_yn, s_yo)
        else:
            p_tile = p_parts + (split.to(tl.int64) * rows + b_n)[:, None] * outputs + o_o[None, :]
            tl.store(p_tile, b_acc, mask=b_mine[:, None] & m_o[None, :])
        b_left = tl.where(b_mine, -1, b_left)
        j = tl.max(b_left, 0)


@triton.jit(do_not_specialize=SIZES)
def sum_fwd_kernel(
    p_y, p_parts, p_choice, rows, tokens, memories, outputs, s_yn, s_yo, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr
):
    """y += the parts of a row in scope, in their order."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.load(p_choice + n // tokens)
    if (j >= 0) & (j < memories):
        o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
        m_o = o_o < outputs
        b_sum = tl.zeros([BLOCK_O], tl.float32)
        for split in tl.static_range(SPLITS):
            b_sum += tl.load(p_parts + (split * rows + n) * outputs + o_o, mask=m_o, other=0.0)
        p_row = p_y + n * s_yn + o_o * s_yo
        b_y = tl.load(p_row, mask=m_o, other=0.0).to(tl.float32)
        tl.store(p_row, (b_y + b_sum).to(p_y.dtype.element_ty), mask=m_o)


def config(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """By the number of rows alone."""
    if dtype == torch.float32:
        return FEW_FP32 if rows <= 16 else MANY_FP32
    if rows <= 128:
        return FEW if rows <= 16 else SOME
    return MANY if torch.version.hip is None else MANY_AMD


def gated_add_element(y: Tensor, a: Tensor, values: Tensor, bits: Tensor, bounds: Tensor, choice: Tensor) -> None:
    """y += the chosen memories' responses; bf16, fp16 or fp32, y and a of any strides."""
    memories, outputs, words = bits.shape
    rows = y.shape[0]
    if bits.numel() == 0 or y.numel() == 0:
        return
    tokens, batch = rows // choice.shape[0], choice.shape[0]
    values, bits, choice = values.contiguous(), bits.contiguous(), choice.contiguous()
    block_n, block_o, step, splits, num_warps, num_stages = config(rows, y.dtype)
    span = triton.cdiv(triton.cdiv(words, splits), step) * step
    counts = torch.empty(memories, outputs, splits, dtype=torch.int32, device=y.device)
    parts = torch.empty(splits if splits > 1 else 0, rows, outputs, dtype=torch.float32, device=y.device)
    with guard(y):
        order = ordered(choice, memories) if tokens < block_n < rows and batch > 1 else None
        count_fwd_kernel[(triton.cdiv(outputs, COUNT_O), memories, splits)](
            counts, bits, choice, batch, outputs, words, span, SPLITS=splits, BLOCK_O=COUNT_O, BLOCK_W=COUNT_W
        )
        element_fwd_kernel[(triton.cdiv(outputs, block_o), triton.cdiv(rows, block_n), splits)](
            y, parts, a, values, bits, bounds, counts, choice, order,
            rows, tokens, memories, outputs, a.shape[1], words, span, *y.stride(), *a.stride(),
            ORDER=order is not None, UPCAST=interpreted(), SPLITS=splits, PREFIX=PREFIX,
            BLOCK_N=block_n, BLOCK_O=block_o, WORDS=step, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        if splits > 1:
            sum_fwd_kernel[(rows, triton.cdiv(outputs, SUM_O))](
                y, parts, choice, rows, tokens, memories, outputs, *y.stride(), SPLITS=splits, BLOCK_O=SUM_O
            )


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases, nvidia, amd = [], ("sm_80", "sm_90", "sm_100"), ("gfx942",)
    integers = {"p_bits": "*i32", "p_counts": "*i32", "p_bounds": "*i64", "p_choice": "*i64", "p_order": "*i64"}

    def case(name, kernel, kind, meta, num_warps=4, num_stages=3, expect=None, targets=nvidia + amd):
        types = dict.fromkeys(("p_y", "p_a", "p_values"), kind) | {"p_parts": "*fp32"} | integers
        meta = {name: value for name, value in ({"s_yo": 1, "s_af": 1} | meta).items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in meta else types.get(name, "i32") for name in kernel.arg_names}
        divisible = tuple(n for n in (*types, "outputs", "width", "s_yn", "s_an") if n in signature)
        cases.append(AotCase(name, kernel, signature, meta, num_warps, num_stages, expect, divisible, targets))

    for dtype, kind in POINTERS.items():
        if dtype == torch.float32:
            shipped = [(FEW_FP32, nvidia + amd), (MANY_FP32, nvidia + amd)]
        else:
            shipped = [(FEW, nvidia + amd), (SOME, nvidia + amd), (MANY, nvidia), (MANY_AMD, amd)]
        for (block_n, block_o, step, splits, num_warps, num_stages), targets in shipped:
            meta = {"ORDER": block_n > 16, "UPCAST": False, "SPLITS": splits, "PREFIX": PREFIX}
            meta |= {"BLOCK_N": block_n, "BLOCK_O": block_o, "WORDS": step}
            expect = None if dtype == torch.float32 else "wgmma" if block_n >= 64 else "mma"
            name = f"gated_add_element/{block_n}x{block_o}/{kind[1:]}"
            case(name, element_fwd_kernel, kind, meta, num_warps, num_stages, expect, targets)
        case(f"gated_add_element/sum/{kind[1:]}", sum_fwd_kernel, kind, {"SPLITS": FEW[3], "BLOCK_O": SUM_O})
    for splits in (1, FEW[3]):
        meta = {"SPLITS": splits, "BLOCK_O": COUNT_O, "BLOCK_W": COUNT_W}
        case(f"gated_add_element/count/{splits}", count_fwd_kernel, "*i32", meta)
    return cases
