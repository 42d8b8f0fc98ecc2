"""TIES merge of k compact shards: values_i [n_i, m] at sorted rows index_i [n_i] of a larger matrix, result [n, m] on
the union of the rows. tau_i = k_i-th largest |values_i|; kept = values_i where |values_i| >= tau_i, else 0; gamma =
sign of the sum of kept; result = mean, weighted by w_i, of the kept values with that sign.

Trim: radix select on the bits of |v|, which order as |v| does: a pass counts one digit of the entries that match the
digits chosen so far, highest first, so tau is exactly the entry that a sort would find, and ties with it are kept. All
shards go in one launch a pass; a pass reads each shard once. Counts are integers, so atomics cannot change them.

Merge: one launch reads every shard once through a table of pointers; a program owns a tile of the result and finds its
rows in each shard by bisection. The positive and the negative side are averaged as they come, and the sign of the mass,
summed in fp64 in the order of the shards as on the CPU, picks one: no accumulator leaves the registers, and nothing of
the size of a shard is allocated but the result. Per-shard launches would need accumulators larger than a shard.

Two host syncs a merge, for the check of the rows and for the size of the union: merging is no part of serving.
Bound: device memory in every pass.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, guard

# Bits of each digit by size of an entry, highest first: with more than 64 bins a pass is bound by its ballots.
DIGITS = {4: (6, 5, 5, 5, 5, 5), 2: (5, 5, 5)}
PITCH = 64
BLOCK, PROGRAMS = 4096, 1024
# regime -> BLOCK_R, BLOCK_M, num_warps; a tile is 16 entries a thread, or 8 where a row is a single entry
MERGE_CONFIGS = {"neuron": (8, 256, 4), "element": (1024, 1, 4)}


@triton.jit
def _descend(p_hist, p_state, shard, WIDTH: tl.constexpr, PITCH: tl.constexpr):
    """From a pass's counts and the state before it: the digits of tau so far, and tau's rank among their entries."""
    prefix = tl.load(p_state + shard * 2)
    rank = tl.load(p_state + shard * 2 + 1)
    o_bin = tl.arange(0, 1 << WIDTH)
    b_count = tl.load(p_hist + shard * PITCH + o_bin)
    b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0)
    digit = tl.sum((b_above + b_count >= rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(o_bin == digit, b_above, 0), 0)
    return (prefix << WIDTH) | digit, rank - above


@triton.jit
def _count(b_bits, m_block, prefix, shift, WIDTH: tl.constexpr, MASK: tl.constexpr):
    b_bits = b_bits.to(tl.int32) & MASK
    m_block = m_block & ((b_bits >> (shift + WIDTH)) == prefix)
    return tl.histogram((b_bits >> shift) & ((1 << WIDTH) - 1), 1 << WIDTH, mask=m_block)


@triton.jit
def radix_kernel(
    p_table, p_hist, p_state, shift, shards,
    PREVIOUS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over one shard: counts of the digit at `shift` [2^WIDTH] among the entries that match the digits before.

    Bytes: the shard once. A histogram of 32 bins takes about 27 instructions a warp of values, of 64 bins 34, which
    at 4 instructions a cycle is just under the time to load them (H200). Not measured on a device yet.
    """
    shard = tl.program_id(1)
    MASK: tl.constexpr = 0x7FFFFFFF if WIDE else 0x7FFF
    if PREVIOUS > 0:
        prefix, rank = _descend(p_hist, p_state, shard, PREVIOUS, PITCH)
        p_hist += shards * PITCH
        p_state += shards * 2
        if tl.program_id(0) == 0:
            tl.store(p_state + shard * 2, prefix)
            tl.store(p_state + shard * 2 + 1, rank)
    else:
        prefix = tl.load(p_state + shard * 2)
    address = tl.load(p_table + shard * 4)
    size = tl.load(p_table + shard * 4 + 1)
    p_bits = tl.multiple_of(address.to(tl.pointer_type(tl.int32 if WIDE else tl.int16)), 16)
    b_count = tl.zeros((1 << WIDTH,), dtype=tl.int32)
    o_block = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    # Whole blocks without a mask: a size read from memory would allow no vector loads.
    while start + BLOCK <= size:
        b_bits = tl.load(p_bits + start + o_block)
        b_count += _count(b_bits, o_block >= 0, prefix, shift, WIDTH, MASK)
        start += step
    if start < size:
        m_block = o_block < size - start
        b_bits = tl.load(p_bits + start + o_block, mask=m_block, other=0)
        b_count += _count(b_bits, m_block, prefix, shift, WIDTH, MASK)
    tl.atomic_add(p_hist + shard * PITCH + tl.arange(0, 1 << WIDTH), b_count, mask=b_count > 0, sem="relaxed")


@triton.jit
def threshold_kernel(
    p_hist, p_state, p_tau, WIDTH: tl.constexpr, WIDE: tl.constexpr, BF16: tl.constexpr, PITCH: tl.constexpr
):
    """The last digit of each shard's tau, and tau itself in fp32. One program a shard; launch latency only."""
    shard = tl.program_id(0)
    prefix, _ = _descend(p_hist, p_state, shard, WIDTH, PITCH)
    if WIDE:
        tau = prefix.to(tl.float32, bitcast=True)
    elif BF16:
        tau = (prefix << 16).to(tl.float32, bitcast=True)
    else:
        tau = prefix.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    tl.store(p_tau + shard, tau)


@triton.jit
def _find(p_rows, first, last, b_row, BLOCK_R: tl.constexpr, STEPS: tl.constexpr):
    """Positions of `b_row` in the sorted rows [first, last), and which of them are there."""
    b_low = tl.zeros((BLOCK_R,), dtype=tl.int64) + first
    b_high = tl.zeros((BLOCK_R,), dtype=tl.int64) + last
    for _ in tl.static_range(STEPS):
        b_mid = (b_low + b_high) >> 1
        m_open = b_low < b_high
        m_right = m_open & (tl.load(p_rows + b_mid, mask=m_open, other=0) < b_row)
        b_high = tl.where(m_open & (m_right == 0), b_mid, b_high)
        b_low = tl.where(m_right, b_mid + 1, b_low)
    m_found = b_low < last
    return b_low, m_found & (tl.load(p_rows + b_low, mask=m_found, other=0) == b_row)


@triton.jit
def merge_kernel(
    p_table, p_first, p_tau, p_weight, p_union, p_out, n, m, tiles, shards,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_R, BLOCK_M] of the result over all shards.

    Bytes: every shard once + the result + 8 per row and shard searched. Not measured on a device yet.
    """
    tile = tl.program_id(0)
    o_r = tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_row = tl.load(p_union + o_r, mask=o_r < n, other=-1)
    b_mass = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float64)
    b_plus = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    b_minus, b_plus_weight, b_minus_weight = b_plus, b_plus, b_plus
    for i in range(shards):
        p_values = tl.load(p_table + i * 4).to(tl.pointer_type(p_out.dtype.element_ty))
        p_rows = tl.load(p_table + i * 4 + 2).to(tl.pointer_type(tl.int64))
        rows = tl.load(p_table + i * 4 + 3)
        first = tl.load(p_first + i * tiles + tile)
        # BLOCK_R rows of the union hold at most BLOCK_R of a shard's.
        b_at, m_at = _find(p_rows, first, tl.minimum(first + BLOCK_R, rows), b_row, BLOCK_R, STEPS)
        p_tile = tl.multiple_of(p_values, 16) + (b_at * m)[:, None] + o_m[None, :]
        b_value = tl.load(p_tile, mask=m_at[:, None] & (o_m < m)[None, :], other=0.0).to(tl.float32)
        b_value = tl.where(tl.abs(b_value) >= tl.load(p_tau + i), b_value, 0.0)
        weight = tl.load(p_weight + i)
        b_mass += b_value.to(tl.float64)
        b_plus += weight * tl.maximum(b_value, 0.0)
        b_minus += weight * tl.minimum(b_value, 0.0)
        b_plus_weight += tl.where(b_value > 0, weight, 0.0)
        b_minus_weight += tl.where(b_value < 0, weight, 0.0)
    b_sum = tl.where(b_mass > 0, b_plus, b_minus)
    b_weight = tl.where(b_mass > 0, b_plus_weight, b_minus_weight)
    # Where nobody has mass the weight may be 0, and 0 / 0 is not the answer.
    b_mean = tl.where(b_mass != 0, tl.div_rn(b_sum, tl.where(b_mass != 0, b_weight, 1.0)), 0.0)
    m_out = (o_r < n)[:, None] & (o_m < m)[None, :]
    tl.store(p_out + (o_r * m)[:, None] + o_m[None, :], b_mean.to(p_out.dtype.element_ty), mask=m_out)


def supported(values: Sequence[Tensor]) -> bool:
    """Whether the kernels take these shards: not fp64, and counts in 32 bits."""
    return values[0].dtype.itemsize <= 4 and max(v.numel() for v in values) < 2**31


def _aligned(t: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, which the kernels take for granted: `t` itself in the usual case."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def union_of(index: Sequence[Tensor]) -> Tensor:
    """Sorted union of the rows, without sorting where the rows are dense enough for a byte a row of the matrix.

    Raises ValueError for rows that are not sorted or repeat.
    """
    ordered = [(rows[1:] > rows[:-1]).all() for rows in index]
    last = [rows[-1] if rows.numel() else rows.new_zeros(()) for rows in index]
    first = [rows[0] if rows.numel() else rows.new_zeros(()) for rows in index]
    flags = torch.stack([torch.stack(ordered).long(), torch.stack(last), torch.stack(first)]).tolist()
    for i, (fine, lowest) in enumerate(zip(flags[0], flags[2], strict=True)):
        if not fine or lowest < 0:
            raise ValueError(f"index[{i}] must be sorted, without repeats and not negative")
    limit = max(flags[1]) + 1
    if limit > 16 * sum(rows.numel() for rows in index):
        return torch.cat(list(index)).unique()
    present = torch.zeros(limit, dtype=torch.bool, device=index[0].device)
    for rows in index:
        present.index_fill_(0, rows, True)
    return present.nonzero().squeeze(1)


def thresholds(values: Sequence[Tensor], table: Tensor, keep: Sequence[int]) -> Tensor:
    """tau [k] fp32: the keep[i]-th largest magnitude of shard i. `table` [k, 4] holds its address and its size."""
    shards, digits = len(values), DIGITS[values[0].dtype.itemsize]
    options = {"WIDE": values[0].dtype.itemsize == 4, "PITCH": PITCH}
    hist = torch.zeros(len(digits), shards, PITCH, dtype=torch.int32, device=table.device)
    state = torch.tensor([[0, k] for k in keep], dtype=torch.int32).expand(len(digits), -1, -1).to(table.device)
    state = state.contiguous()
    grid = (min(PROGRAMS, max(1, *(triton.cdiv(v.numel(), BLOCK) for v in values))), shards)
    shift, tau = sum(digits), torch.empty(shards, dtype=torch.float32, device=table.device)
    with guard(table):
        for i, width in enumerate(digits):
            shift, at = shift - width, max(i - 1, 0)
            options["PREVIOUS"] = digits[i - 1] if i else 0
            radix_kernel[grid](table, hist[at], state[at], shift, shards, WIDTH=width, BLOCK=BLOCK, **options)
        del options["PREVIOUS"]
        bf16 = values[0].dtype == torch.bfloat16
        threshold_kernel[(shards,)](hist[-1], state[-1], tau, WIDTH=digits[-1], BF16=bf16, **options)
    return tau


def merge_config(m: int) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_M and num_warps for rows of m entries."""
    if m >= 64:
        return MERGE_CONFIGS["neuron"]
    entries, _, warps = MERGE_CONFIGS["element"]
    width = triton.next_power_of_2(m)
    return entries // width, width, warps


def ties_merge(values, index, keep: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Merge; arguments as `wise_kernels.ties_merge._ties_merge`, with the entries to keep of each shard."""
    values, index = [_aligned(v) for v in values], [_aligned(rows) for rows in index]
    device, m = values[0].device, values[0].shape[1]
    union = union_of(index)
    out = torch.empty(union.shape[0], m, dtype=values[0].dtype, device=device)
    if out.numel() == 0:
        return out, union
    rows = [[v.data_ptr(), v.numel(), r.data_ptr(), r.numel()] for v, r in zip(values, index, strict=True)]
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    tau = thresholds(values, table, keep)
    block_r, block_m, warps = merge_config(m)
    tiles = triton.cdiv(union.shape[0], block_r)
    first = torch.empty(len(values), tiles, dtype=torch.int64, device=device)
    for at, r in zip(first, index, strict=True):
        torch.searchsorted(r, union[::block_r].contiguous(), out=at)
    with guard(out):
        merge_kernel[(tiles, triton.cdiv(m, block_m))](
            table, first, tau, torch.tensor(weights, dtype=torch.float32).to(device), union, out, union.shape[0], m,
            tiles, len(values), BLOCK_R=block_r, BLOCK_M=block_m, STEPS=block_r.bit_length(), num_warps=warps,
        )  # fmt: skip
    return out, union


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    cases = []
    for itemsize, digits in DIGITS.items():
        counters = {"p_table": "*i64", "p_hist": "*i32", "p_state": "*i32"}
        for previous, width in sorted(set(zip((0, *digits), digits, strict=False))):
            constexprs = {"PREVIOUS": previous, "WIDTH": width, "WIDE": itemsize == 4, "PITCH": PITCH, "BLOCK": BLOCK}
            signature = counters | {"shift": "i32", "shards": "i32"} | dict.fromkeys(constexprs, "constexpr")
            name = f"ties_merge/radix/{itemsize}/{previous}_{width}"
            cases.append(AotCase(name, radix_kernel, signature, constexprs, divisible=tuple(counters)))
    for dtype in ("fp32", "fp16", "bf16"):
        itemsize = 4 if dtype == "fp32" else 2
        constexprs = {"WIDTH": 5, "WIDE": itemsize == 4, "BF16": dtype == "bf16", "PITCH": PITCH}
        signature = {"p_hist": "*i32", "p_state": "*i32", "p_tau": "*fp32"}
        signature |= dict.fromkeys(constexprs, "constexpr")
        cases.append(AotCase(f"ties_merge/threshold/{dtype}", threshold_kernel, signature, constexprs))
        for regime, (block_r, block_m, warps) in MERGE_CONFIGS.items():
            constexprs = {"BLOCK_R": block_r, "BLOCK_M": block_m, "STEPS": block_r.bit_length()}
            pointers = {"p_table": "*i64", "p_first": "*i64", "p_tau": "*fp32", "p_weight": "*fp32", "p_union": "*i64"}
            signature = pointers | {"p_out": f"*{dtype}", "n": "i32", "m": "i32", "tiles": "i32", "shards": "i32"}
            if regime == "element":
                constexprs["m"] = 1
            signature |= dict.fromkeys(constexprs, "constexpr")
            divisible = tuple(a for a in signature if a.startswith("p_") or a == "m" and regime == "neuron")
            name = f"ties_merge/merge/{regime}/{dtype}"
            case = AotCase(name, merge_kernel, signature, constexprs, num_warps=warps, divisible=divisible)
            cases.append(case)
    return cases
