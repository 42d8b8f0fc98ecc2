"""Trim of TIES: tau_i, the keep_i-th largest |value| of shard i, for all k shards at once and exactly.

The bits of |v| order as |v| does, so tau is found among integers and is the entry that a sort would find. A sample of
each shard brackets tau: about 5 % of the entries lie in [lo, hi]. One pass over the shards counts what is above and
writes what is inside, in any order, to a buffer of an eighth of a shard; a radix select by 8 bits a pass finds tau in
there. Where the sample misled, or the buffer is too small because many entries are equal, the same launches select in
the whole shard instead: the device decides, so every input is exact and nothing syncs with the host.

The last program of a shard to finish a pass draws the conclusion for the next one. Counts are integers: the result
does not depend on the order of the atomics. Bytes: every shard once, and a fraction of it that mostly stays in L2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase

# A row of the table of shards, int64: VALUES, ROWS and BUFFER are addresses, START counts the rows of the shards
# before, WEIGHT holds the bits of an fp32.
VALUES, SIZE, ROWS, COUNT, START, KEEP, WEIGHT, BUFFER, CAPACITY = (tl.constexpr(i) for i in range(9))
FIELDS = tl.constexpr(9)
# A shard's state, int32. tau lies in [LO, LO + 2^LEFT) and is the RANK-th largest there; FOUND entries are buffered.
# While it is bracketed, HI is in the place of LEFT.
LO, LEFT, RANK, WHOLE, FOUND, ABOVE, DONE = (tl.constexpr(i) for i in range(7))
STATE = tl.constexpr(32)
BINS = tl.constexpr(256)
# A bracket of +- MARGIN of SAMPLE entries is 6 standard deviations of a sampled median.
SAMPLE, MARGIN = 16384, 384
BLOCK, PROGRAMS = 2048, 528
WARPS = {"sample": 16, "bracket": 4, "radix": 4}


@triton.jit
def sample_kernel(p_table, p_state, MARGIN: tl.constexpr, WIDE: tl.constexpr, SAMPLE: tl.constexpr):
    """Bracket [lo, hi] of a shard's tau from SAMPLE entries spread over it, four neighbours at a time, and zeroed
    counters. One program a shard; latency only."""
    shard = tl.program_id(0)
    BITS: tl.constexpr = 31 if WIDE else 15
    p_table += shard * FIELDS
    p_state += shard * STATE
    size = tl.load(p_table + SIZE)
    b_group = (tl.arange(0, SAMPLE) // 4).to(tl.int64)
    # Multiples of the golden ratio: an even spread without the period of rows or columns.
    b_jitter = (((b_group * 2654435769) & 0xFFFFFFFF) * tl.maximum(size // (SAMPLE // 4) - 3, 0)) >> 32
    b_at = b_group * size // (SAMPLE // 4) + b_jitter + tl.arange(0, SAMPLE) % 4
    b_at = tl.where(size > SAMPLE, b_at, tl.arange(0, SAMPLE))
    p_bits = tl.load(p_table + VALUES).to(tl.pointer_type(tl.int32 if WIDE else tl.int16))
    b_bits = tl.load(p_bits + b_at, mask=b_at < size, other=0).to(tl.int32) & ((1 << BITS) - 1)
    rank = (tl.load(p_table + KEEP) * tl.minimum(size, SAMPLE) // tl.maximum(size, 1)).to(tl.int32)
    # Bit by bit the largest number that at least so many entries reach: 0 or all ones where the sample ends.
    lo, hi = 0, 0
    for i in range(BITS):
        bit = 1 << (BITS - 1 - i)
        count = tl.sum((b_bits >= (lo | bit)).to(tl.int32) + ((b_bits >= (hi | bit)).to(tl.int32) << 16), 0)
        lo = tl.where((count & 0xFFFF) >= rank + MARGIN, lo | bit, lo)
        hi = tl.where((count >> 16) >= rank - MARGIN, hi | bit, hi)
    o_state = tl.arange(0, STATE)
    tl.store(p_state + o_state, tl.where(o_state == LO, lo, tl.where(o_state == LEFT, hi, 0)))


@triton.jit
def _last(p_done, programs):
    """Whether all other programs of the shard are done, so that what they counted can be read."""
    tl.debug_barrier()
    return tl.atomic_add(p_done, 1) == programs - 1


@triton.jit
def _buffer(b_bits, b_at, lo, hi, p_buffer, capacity):
    m_inside = (b_bits >= lo) & (b_bits <= hi)
    tl.store(p_buffer + b_at, b_bits.to(p_buffer.dtype.element_ty), mask=m_inside & (b_at < capacity))
    return b_at + m_inside.to(tl.int32)


@triton.jit
def _bracket(b_bits, lo, hi, p_state, p_buffer, capacity):
    """How many entries of [BLOCK / 4, 4] are above the bracket; those inside go to the buffer, as far as it has room.

    A thread holds whole rows and counts them for itself, so that the scan is over rows and not over entries.
    """
    # Both counts in one scan: 16 bits hold a block's.
    b_flags = ((b_bits >= lo) & (b_bits <= hi)).to(tl.int32) + ((b_bits > hi).to(tl.int32) << 16)
    b_count = tl.sum(b_flags, 1)
    total = tl.sum(b_count, 0)
    start = tl.atomic_add(p_state + FOUND, total & 0xFFFF, sem="relaxed")
    b_at = start + ((tl.cumsum(b_count, 0) - b_count) & 0xFFFF)
    b_even, b_odd = tl.split(tl.reshape(b_bits, (b_bits.shape[0], 2, 2)))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_at = _buffer(b_0, b_at, lo, hi, p_buffer, capacity)
    b_at = _buffer(b_1, b_at, lo, hi, p_buffer, capacity)
    b_at = _buffer(b_2, b_at, lo, hi, p_buffer, capacity)
    _buffer(b_3, b_at, lo, hi, p_buffer, capacity)
    return total >> 16


@triton.jit
def bracket_kernel(p_table, p_state, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One pass over one shard: count what is above the bracket, buffer what is inside, conclude where tau is.

    Bytes: the shard once, and twice the bracket.
    """
    shard = tl.program_id(1)
    BITS: tl.constexpr = 31 if WIDE else 15
    p_table += shard * FIELDS
    p_state += shard * STATE
    lo, hi = tl.load(p_state + LO), tl.load(p_state + LEFT)
    size, capacity = tl.load(p_table + SIZE), tl.load(p_table + CAPACITY).to(tl.int32)
    pointer: tl.constexpr = tl.pointer_type(tl.int32 if WIDE else tl.int16)
    p_bits = tl.multiple_of(tl.load(p_table + VALUES).to(pointer), 16)
    p_buffer = tl.load(p_table + BUFFER).to(pointer)
    above = 0
    o_block = (tl.arange(0, BLOCK // 4) * 4)[:, None] + tl.arange(0, 4)[None, :]
    whole = size // BLOCK * BLOCK
    # Whole blocks without a mask: a size read from memory would allow no vector loads. Staged, because a block waits
    # for its place in the buffer.
    for start in tl.range(tl.program_id(0) * BLOCK, whole, tl.num_programs(0) * BLOCK, num_stages=3):
        b_bits = tl.load(p_bits + start + o_block).to(tl.int32) & ((1 << BITS) - 1)
        above += _bracket(b_bits, lo, hi, p_state, p_buffer, capacity)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        m_block = o_block < size - whole
        b_bits = tl.load(p_bits + whole + o_block, mask=m_block, other=0).to(tl.int32) & ((1 << BITS) - 1)
        above += _bracket(tl.where(m_block, b_bits, -1), lo, hi, p_state, p_buffer, capacity)
    tl.atomic_add(p_state + ABOVE, above, sem="relaxed")
    if _last(p_state + DONE, tl.num_programs(0)):
        keep = tl.load(p_table + KEEP).to(tl.int32)
        found, above = tl.atomic_add(p_state + FOUND, 0), tl.atomic_add(p_state + ABOVE, 0)
        inside = (above < keep) & (keep <= above + found) & (found <= capacity)
        width = tl.sum((((hi - lo) >> tl.arange(0, 32)) > 0).to(tl.int32), 0)
        tl.store(p_state + LO, tl.where(inside, lo, 0))
        tl.store(p_state + LEFT, tl.where(inside, width, BITS))
        tl.store(p_state + RANK, tl.where(inside, keep - above, keep))
        tl.store(p_state + WHOLE, tl.where(inside, 0, 1))
        tl.store(p_state + DONE, 0)


@triton.jit
def _count(b_bits, m_block, lo, left, shift):
    b_offset = b_bits - lo
    # The shift keeps the sign, so what is below the range does not match either.
    return tl.histogram((b_offset >> shift) & (BINS - 1), BINS, mask=m_block & ((b_offset >> left) == 0))


@triton.jit
def radix_kernel(p_table, p_hist, p_state, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One digit of tau: count the 8 bits below the range of one shard, in its buffer or in the whole of it, and narrow
    the range to the digit that holds the rank. Nothing to do where the range is a single number.

    Bytes: the bracket once. A histogram of 256 bins takes about 45 instructions a warp of values.
    """
    shard = tl.program_id(1)
    MASK: tl.constexpr = 0x7FFFFFFF if WIDE else 0x7FFF
    p_table += shard * FIELDS
    p_state += shard * STATE
    lo, left = tl.load(p_state + LO), tl.load(p_state + LEFT)
    if left > 0:
        rank, whole = tl.load(p_state + RANK), tl.load(p_state + WHOLE)
        shift = tl.maximum(left - 8, 0)
        size = tl.where(whole > 0, tl.load(p_table + SIZE), tl.load(p_state + FOUND).to(tl.int64))
        address = tl.where(whole > 0, tl.load(p_table + VALUES), tl.load(p_table + BUFFER))
        p_bits = tl.multiple_of(address.to(tl.pointer_type(tl.int32 if WIDE else tl.int16)), 16)
        b_count = tl.zeros((BINS,), dtype=tl.int32)
        o_block = tl.arange(0, BLOCK)
        end = size // BLOCK * BLOCK
        for start in range(tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
            b_bits = tl.load(p_bits + start + o_block).to(tl.int32) & MASK
            b_count += _count(b_bits, o_block >= 0, lo, left, shift)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            m_block = o_block < size - end
            b_bits = tl.load(p_bits + end + o_block, mask=m_block, other=0).to(tl.int32) & MASK
            b_count += _count(b_bits, m_block, lo, left, shift)
        o_bin = tl.arange(0, BINS)
        p_count = p_hist + shard * BINS + o_bin
        tl.atomic_add(p_count, b_count, mask=b_count > 0, sem="relaxed")
        if _last(p_state + DONE, tl.num_programs(0)):
            # Read by atomics, past what the multiprocessor may have cached, and taken back for the next digit.
            b_count = tl.atomic_add(p_count, tl.zeros((BINS,), dtype=tl.int32))
            tl.atomic_add(p_count, -b_count, sem="relaxed")
            b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0)
            digit = tl.sum((b_above + b_count >= rank).to(tl.int32), 0) - 1
            tl.store(p_state + LO, lo + (digit << shift))
            tl.store(p_state + LEFT, shift)
            tl.store(p_state + RANK, rank - tl.sum(tl.where(o_bin == digit, b_above, 0), 0))
            tl.store(p_state + DONE, 0)


def table_of(values, index, keep: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The table [k, FIELDS] of the shards on their device, and the memory of their buffers, which it points into."""
    capacity = capacities(values)
    buffer = torch.empty(sum(capacity), dtype=values[0].dtype, device=values[0].device)
    bits = torch.tensor(weights, dtype=torch.float32).view(torch.int32).tolist()
    rows, start, address = [], 0, buffer.data_ptr()
    for v, r, k, w, c in zip(values, index, keep, bits, capacity, strict=True):
        rows.append([v.data_ptr(), v.numel(), r.data_ptr(), r.numel(), start, k, w, address, c])
        start, address = start + r.numel(), address + c * buffer.itemsize
    # Not waited for: the copy is queued, and what it reads was put aside before this returns.
    return torch.tensor(rows, dtype=torch.int64).to(buffer.device, non_blocking=True), buffer


def capacities(values: Sequence[Tensor]) -> list[int]:
    """Entries of each shard's buffer, in whole 16 bytes: an eighth of it, and no more than one shard in all."""
    return [max(8, v.numel() // max(8, len(values)) // 8 * 8) for v in values]


def _grid(values: Sequence[Tensor], size: int) -> tuple[int, int]:
    return max(1, min(triton.cdiv(size, BLOCK), PROGRAMS // len(values))), len(values)


def bracket(table: Tensor, state: Tensor, values: Sequence[Tensor]) -> None:
    """The first two launches of a trim: from here on tau is bracketed and its neighbours are buffered."""
    options = {"WIDE": values[0].dtype.itemsize == 4}
    sample_kernel[(len(values),)](table, state, MARGIN=MARGIN, SAMPLE=SAMPLE, num_warps=WARPS["sample"], **options)
    bracket_kernel[_grid(values, max(v.numel() for v in values))](
        table, state, BLOCK=BLOCK, num_warps=WARPS["bracket"], **options
    )


def select(table: Tensor, hist: Tensor, state: Tensor, values: Sequence[Tensor]) -> None:
    """The bits of every shard's tau in state[:, 0], two or four launches. `hist` is zero, and zero again afterwards."""
    options = {"WIDE": values[0].dtype.itemsize == 4, "BLOCK": BLOCK, "num_warps": WARPS["radix"]}
    grid = _grid(values, max(capacities(values)))
    for _ in range(values[0].dtype.itemsize):
        radix_kernel[grid](table, hist, state, **options)


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    cases = []
    for itemsize in (4, 2):
        common = {"p_table": "*i64", "p_state": "*i32"}
        for kernel, name, constexprs in (
            (sample_kernel, "sample", {"MARGIN": MARGIN, "SAMPLE": SAMPLE}),
            (bracket_kernel, "bracket", {"BLOCK": BLOCK}),
            (radix_kernel, "radix", {"BLOCK": BLOCK}),
        ):
            constexprs = constexprs | {"WIDE": itemsize == 4}
            pointers = common | ({"p_hist": "*i32"} if kernel is radix_kernel else {})
            signature = pointers | dict.fromkeys(constexprs, "constexpr")
            options = {"num_warps": WARPS[name], "divisible": tuple(pointers)}
            cases.append(AotCase(f"ties_trim/{name}/{itemsize}", kernel, signature, constexprs, **options))
    return cases
