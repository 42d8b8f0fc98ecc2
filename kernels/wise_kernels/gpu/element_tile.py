"""What the kernels of the element layout share: the expansion of a tile of D [O, F] from its bits [O, ceil(F/32)] and
its packed values, in registers, and the table that says where the values of a tile begin.

Value v of a memory belongs to its v-th set bit, so a weight's place is the number of set bits before it. `popcounts
[J, O, ceil(F/64)]` holds that number for the first weight of every block of 64; within a block it is a population count
of at most two words. A thread expands eight neighbouring weights: one count, then eight predicated loads, which for the
threads of a warp fall on the same few sectors. Bound by issue slots: 15 instructions of a warp for 32 weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, guard

# Programs that keep a large device issuing, where a sum is split to have that many.
PROGRAMS = 512
POPCOUNT_WORDS, POPCOUNT_WARPS = 512, 4


@triton.jit
def popcount(b_word):
    """Number of set bits of each uint32; compilers know this form and emit one instruction for it."""
    b_word = b_word - ((b_word >> 1) & 0x55555555)
    b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
    b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
    return ((b_word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def popcount_fwd_kernel(p_bits, p_table, p_totals, W, blocks, WORDS: tl.constexpr):
    """table [rows, blocks]: set bits of a row before each block of two words; totals [rows]: all of them."""
    row = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, W, WORDS):
        o_block = first // 2 + tl.arange(0, WORDS // 2)
        o_word = first + tl.arange(0, WORDS)
        b_word = tl.load(p_bits + row * W + o_word, mask=o_word < W, other=0).to(tl.uint32, bitcast=True)
        b_count = tl.sum(tl.reshape(popcount(b_word), [WORDS // 2, 2]), 1)
        b_before = before + tl.cumsum(b_count, 0) - b_count
        tl.store(p_table + row * blocks + o_block, b_before, mask=o_block < blocks)
        before += tl.sum(b_count, 0)
    tl.store(p_totals + row, before)


@triton.jit
def load_words(p_bits, p_table, row, m_row, k, o_oct, W, blocks, BK: tl.constexpr):
    """For weights k + 8 o_oct + {0..7} of every row: their bits, lowest first, and the place of the first."""
    o_word = k // 32 + o_oct // 4
    second = o_oct >= 4 if BK == 64 else o_word % 2 == 1
    shift = ((o_oct * 8) % 32 if BK >= 32 else k % 32 + o_oct * 8).to(tl.uint32)
    # Sums in brackets stay 32-bit: pointers that the compiler keeps from step to step take two registers each.
    p_word, m_word = p_bits + (row * W + o_word), m_row & (o_word < W)
    b_word = tl.load(p_word, mask=m_word, other=0).to(tl.uint32, bitcast=True)
    b_first = tl.load(p_word - 1, mask=m_word & second, other=0).to(tl.uint32, bitcast=True)
    b_place = tl.load(p_table + (row * blocks + k // 64), mask=m_word, other=0)
    below = (tl.full([1, 1], 1, tl.uint32) << shift) - 1
    return b_word >> shift, b_place + popcount(b_first) + popcount(b_word & below)


@triton.jit
def _next(p_values, b_bits, b_place):
    """Value of the lowest bit, and the rest."""
    b_value = tl.load(p_values + b_place, mask=(b_bits & 1) != 0, other=0.0)
    return b_value, b_bits >> 1, b_place + (b_bits & 1).to(tl.int32)


@triton.jit
def load_values(p_values, b_bits, b_place, BO: tl.constexpr, BK: tl.constexpr):
    """D's block [BO, BK] from the bits and places [BO, BK / 8] of its octets."""
    b_v0, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v1, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v2, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v3, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v4, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v5, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v6, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_v7, b_bits, b_place = _next(p_values, b_bits, b_place)
    b_even = tl.join(tl.join(b_v0, b_v4), tl.join(b_v2, b_v6))
    b_odd = tl.join(tl.join(b_v1, b_v5), tl.join(b_v3, b_v7))
    return tl.reshape(tl.join(b_even, b_odd), [BO, BK])


def popcount_table(bits: Tensor) -> Tensor:
    """popcounts [J, O, ceil(F/64)] int32: set bits of a memory, row-major, before each block of 64 weights of a row.

    Derived from bits [J, O, ceil(F/32)] alone: compute it once a bank. Three launches, no sync.
    """
    memories, outputs, width = bits.shape
    bits = bits.contiguous()
    table = torch.empty(memories, outputs, triton.cdiv(width, 2), dtype=torch.int32, device=bits.device)
    totals = torch.empty(memories, outputs, dtype=torch.int32, device=bits.device)
    if bits.numel():
        with guard(bits):
            popcount_fwd_kernel[(memories * outputs,)](
                bits, table, totals, width, table.shape[2], WORDS=POPCOUNT_WORDS, num_warps=POPCOUNT_WARPS
            )
        table += (totals.cumsum(1, dtype=torch.int32) - totals)[:, :, None]
    return table


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    types = {"p_bits": "*i32", "p_table": "*i32", "p_totals": "*i32"}
    signature = types | {"W": "i32", "blocks": "i32", "WORDS": "constexpr"}
    meta = {"WORDS": POPCOUNT_WORDS}
    return [AotCase("popcount", popcount_fwd_kernel, signature, meta, POPCOUNT_WARPS, divisible=tuple(types))]
