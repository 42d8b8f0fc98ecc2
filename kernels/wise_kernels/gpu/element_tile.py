"""What the kernels of the element layout share: the expansion of a tile of D [O, F] from its bits [O, ceil(F/32)] and
its packed values, in registers, and the table that says where the values of a tile begin.

Value v of a memory belongs to its v-th set bit, so a weight's place is the number of set bits before it. `popcounts
[J, O, ceil(F/64)]` holds that number for the first weight of every block of 64; a block's first word counts on from
there, its second one back from the next block's. A thread expands octets of neighbouring weights: it loads a word, a
count, then the aligned pairs of values that hold the octet's (two or three of up to five at density 0.2), and deals
them out by shifts. Bound by the integer units: about 70 of some 115 instructions of a warp for 32 octets (sm_90 code).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dual_tiles import SMS
from .launch import AotCase, guard
from .tile import Tile

# 32-bit registers of an SM.
REGISTERS = 65536
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
def memory_of(p_values, p_bits, p_table, p_bounds, j, first, O, W, blocks):
    """Memory j as `next_block` reads it: pointers to bits and table at its row `first`; entries of the table from there
    to its end; the values, where the memory's begin, and how many they are."""
    row, base = j.to(tl.int64) * O + first, tl.load(p_bounds + j)
    count = (tl.load(p_bounds + j + 1) - base).to(tl.int32)
    return p_bits + row * W, p_table + row * blocks, (O - first) * blocks, p_values, base, count


@triton.jit
def octets_of(BO: tl.constexpr, BK: tl.constexpr):
    """Row and place in it of the octets of a block [BO, BK], in one dimension: so lanes run along a row whatever order
    a compiler gives the dimensions of two. Down the rows, every lane of a load would read another line."""
    o_octet = tl.arange(0, BO * BK // 8)
    return o_octet // (BK // 8), o_octet % (BK // 8)


@triton.jit
def _second(k, o_oct, BK: tl.constexpr):
    """Whether an octet at k lies in the second word of its block of 64."""
    return o_oct % 8 >= 4 if BK % 64 == 0 else (k // 32 + o_oct // 4) % 2 == 1


@triton.jit
def load_words(memory, row, k, o_oct, W, blocks, BK: tl.constexpr):
    """For weights k + 8 o_oct + {0..7} of every row: their word and the set bits before its block of 64 or, for the
    second word of a block, before the next block. As loaded: nothing waits for them before the next step."""
    p_bits, p_table, entries, _, _, count = memory
    o_word = k // 32 + o_oct // 4
    o_block = k // 64 + (o_oct // 8 if BK % 64 == 0 else 0) + _second(k, o_oct, BK).to(tl.int32)
    # Sums in brackets stay 32-bit: pointers that the compiler keeps from step to step take two registers each.
    b_word = tl.load(p_bits + (row * W + o_word), mask=o_word < W, other=0).to(tl.uint32, bitcast=True)
    o_block += row * blocks
    return b_word, tl.load(p_table + o_block, mask=o_block < entries, other=count)


@triton.jit
def load_values(memory, b_words, k, o_oct, BK: tl.constexpr):
    """The octets at k and their values, for `expand`.

    A 16-bit value may lie at an odd place, so up to five aligned pairs of them are loaded an octet: as many as it
    needs, beginning with the value *before* its first unless its lowest bit is set.
    """
    _, _, _, p_values, base, _ = memory
    b_word, b_count = b_words
    shift = ((o_oct * 8) % 32 if BK >= 32 else k % 32 + o_oct * 8).to(tl.uint32)
    below, second = (tl.full([1], 1, tl.uint32) << shift) - 1, _second(k, o_oct, BK)
    # Bits of the first word before the octet are added, those of the second from the octet on taken away.
    b_between = popcount(b_word & tl.where(second, below ^ 0xFFFFFFFF, below))
    b_place = b_count + b_between * tl.where(second, -1, 1)
    b_bits = (b_word >> shift) & 255
    p_values += base
    if p_values.dtype.element_ty.primitive_bitwidth == 32:
        b_v0, b_rest, b_place = _next(p_values, b_bits, b_place)
        b_v1, b_rest, b_place = _next(p_values, b_rest, b_place)
        b_v2, b_rest, b_place = _next(p_values, b_rest, b_place)
        b_v3, b_rest, b_place = _next(p_values, b_rest, b_place)
        b_v4, b_rest, b_place = _next(p_values, b_rest, b_place)
        b_v5, b_rest, b_place = _next(p_values, b_rest, b_place)
        b_v6, b_rest, b_place = _next(p_values, b_rest, b_place)
        b_v7, b_rest, b_place = _next(p_values, b_rest, b_place)
        return b_v0, b_v1, b_v2, b_v3, b_v4, b_v5, b_v6, b_v7
    else:
        b_skip = 1 - (b_bits & 1).to(tl.int32)
        b_place += (base & 1).to(tl.int32) - b_skip
        b_odd = b_place & 1
        b_end = b_odd + b_skip + popcount(b_bits)
        p_pair = (p_values - (base & 1)).to(tl.pointer_type(tl.uint32), bitcast=True) + (b_place >> 1)
        # What is not loaded is not wanted either, whatever it is. The pair before the array is not read.
        b_w0 = tl.load(p_pair, mask=(b_bits != 0) & (b_odd + b_skip < 2))
        b_w1 = tl.load(p_pair + 1, mask=b_end > 2)
        b_w2 = tl.load(p_pair + 2, mask=b_end > 4)
        b_w3 = tl.load(p_pair + 3, mask=b_end > 6)
        b_w4 = tl.load(p_pair + 4, mask=b_end > 8)
        return b_bits, b_odd, b_w0, b_w1, b_w2, b_w3, b_w4


@triton.jit
def _next(p_values, b_bits, b_place):
    """Value of the lowest bit, and the rest."""
    b_value = tl.load(p_values + b_place, mask=(b_bits & 1) != 0, other=0.0)
    return b_value, b_bits >> 1, b_place + (b_bits & 1).to(tl.int32)


@triton.jit
def _shifted(b_low, b_high, shift):
    """Bits shift .. shift + 31 of the 64, for shifts up to 32: one instruction."""
    return (((b_high.to(tl.uint64) << 32) | b_low) >> shift).to(tl.uint32)


@triton.jit
def _pair(b_values, b_bits):
    """Of the values of two weights, those whose bit (0, 16) is set."""
    return b_values & ((b_bits & 0x10001) * 0xFFFF)


@triton.jit
def expand(b_octets, dtype: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """D's block [BO, BK] from the octets [BO, BK / 8] of `load_values`.

    The window of values is moved from weights 2 p, 2 p + 1 to the next two by as many as there are bits at 2 p + 1 and
    2 p + 2: so the value of 2 p, if its bit is set, is the lowest, and that of 2 p + 1 the next one in either case.
    """
    if dtype.primitive_bitwidth == 32:
        b_v0, b_v1, b_v2, b_v3, b_v4, b_v5, b_v6, b_v7 = b_octets
        b_even = tl.join(tl.join(b_v0, b_v4), tl.join(b_v2, b_v6))
        b_odd = tl.join(tl.join(b_v1, b_v5), tl.join(b_v3, b_v7))
        return tl.reshape(tl.join(b_even, b_odd), [BO, BK])
    else:
        b_bits, b_odd, b_w0, b_w1, b_w2, b_w3, b_w4 = b_octets
        # Bits 0, 2, 4, 6 as they are, and 1, 3, 5, 7 at 16, 18, 20, 22.
        b_apart = b_bits * 0x8001
        # Twice four bits that move the window, in 2-bit sums; a value is 16 bits.
        b_moves = (b_bits >> 1) - ((b_bits >> 2) & 0x55)
        shift = b_odd.to(tl.uint32) << 4
        b_w0, b_w1 = _shifted(b_w0, b_w1, shift), _shifted(b_w1, b_w2, shift)
        b_w2, b_w3 = _shifted(b_w2, b_w3, shift), _shifted(b_w3, b_w4, shift)
        b_p0 = _pair(b_w0, b_apart)
        shift = (b_moves << 4) & 0x30
        b_w0, b_w1, b_w2 = _shifted(b_w0, b_w1, shift), _shifted(b_w1, b_w2, shift), _shifted(b_w2, b_w3, shift)
        b_p1 = _pair(b_w0, b_apart >> 2)
        shift = (b_moves << 2) & 0x30
        b_w0, b_w1 = _shifted(b_w0, b_w1, shift), _shifted(b_w1, b_w2, shift)
        b_p2 = _pair(b_w0, b_apart >> 4)
        b_p3 = _pair(_shifted(b_w0, b_w1, b_moves & 0x30), b_apart >> 6)
        b_pairs = tl.reshape(tl.join(tl.join(b_p0, b_p2), tl.join(b_p1, b_p3)), [BO, BK // 2])
        b_low = b_pairs.to(tl.uint16).to(dtype, bitcast=True)
        b_high = (b_pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
        return tl.reshape(tl.join(b_low, b_high), [BO, BK])


@triton.jit
def before_first(memory, row, k, o_oct, W, blocks, BO: tl.constexpr, BK: tl.constexpr):
    """What `next_block` starts with one step before k: the words at k, and octets without a bit."""
    b_none = tl.zeros([BO * BK // 8], tl.uint32)
    b_words = load_words(memory, row, k, o_oct, W, blocks, BK)
    if memory[3].dtype.element_ty.primitive_bitwidth == 32:
        b_none = b_none.to(tl.float32)
        return b_words, (b_none, b_none, b_none, b_none, b_none, b_none, b_none, b_none)
    else:
        return b_words, (b_none, b_none.to(tl.int32), b_none, b_none, b_none, b_none, b_none)


@triton.jit
def next_block(memory, ahead, row, k, o_oct, W, blocks, UPCAST: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """D's block [BO, BK] at k, and what is loaded ahead: the octets one step and the words two steps on."""
    b_words, b_octets = ahead
    b_d = expand(b_octets, memory[3].dtype.element_ty, BO, BK)
    b_octets = load_values(memory, b_words, k + BK, o_oct, BK)
    b_words = load_words(memory, row, k + 2 * BK, o_oct, W, blocks, BK)
    return b_d.to(tl.float32) if UPCAST else b_d, (b_words, b_octets)


def splits_of(tile: Tile, programs: int, width: int) -> int:
    """How many of `programs` times that many share a sum over `width`, so that a large device is full once."""
    room = SMS * (REGISTERS // (32 * tile.warps * (tile.registers or 255)))
    return max(1, min(room // programs, width // (4 * tile.depth)))


def pairs_of(values: Tensor) -> Tensor:
    """The values where 32-bit loads can begin at the first and end behind the last: a copy where they cannot.

    An odd number of 16-bit values needs one more behind them in the same storage, as a served bank has.
    """
    values = values.contiguous()
    end = (values.storage_offset() + values.numel() + values.numel() % 2) * values.element_size()
    if values.data_ptr() % 4 == 0 and (values.element_size() == 4 or end <= values.untyped_storage().nbytes()):
        return values
    return torch.cat([values, values.new_zeros(1)])[:-1]


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
