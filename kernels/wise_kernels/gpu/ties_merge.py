"""TIES merge of k compact shards: values_i [n_i, m] at sorted rows index_i [n_i] of a larger matrix, result [n, m] on
the union of the rows. tau_i = k_i-th largest |values_i|; kept = values_i where |values_i| >= tau_i, else 0; gamma =
sign of the sum of kept; result = mean, weighted by w_i, of the kept values with that sign.

`ties_trim` finds tau; `ties_rows` finds the union and where its rows are in the shards, or `ties_map` where rows are
single entries. Then one launch reads every shard once through a table of pointers; a program owns a tile of the result.
The positive and the negative side are averaged as they come, and the sign of the mass, summed in fp64 in the order of
the shards as on the CPU, picks one: no accumulator leaves the registers.

Launches whatever k, copies and zeros included: 13 with `ties_rows`, 18 with `ties_map`, two fewer in 16 bits. Waits of
the host: one for the size of the union and the check of the rows, and with `ties_map` one for the last row, both while
the trim goes on: merging is no part of serving.
Memory beside the result: at most an eighth of each shard, 4 bytes for each row and shard, or the map, a byte for each
row of the matrix. Bound: device memory; with `ties_map` issue slots come close.
Predicted on an H100, Llama-2-7B, rho 0.2, fp32, 2 shards: neuron 150 us, element 380 us of device time.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, guard
from .ties_map import SHARDS, SPARSEST, UNION_BLOCK, compact, mark, tiles_of
from .ties_rows import place
from .ties_trim import BINS, FIELDS, STATE, VALUES, WEIGHT, bracket, select, table_of

# Entries of a tile and num_warps; a tile is wide where rows are long.
MERGE_CONFIGS = {"neuron": (1024, 4), "element": (512, 4)}


@triton.jit
def _tau(bits, DTYPE: tl.constexpr):
    """The fp32 with these bits of a DTYPE."""
    if DTYPE.primitive_bitwidth == 32:
        tau = bits.to(tl.float32, bitcast=True)
    else:
        tau = bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tau


@triton.jit
def _shard(p_table, p_state, shard, shards, DTYPE: tl.constexpr):
    """Address of a shard's values, its tau and its weight; zeros past the last shard."""
    m_shard = shard < shards
    p_shard = p_table + shard * FIELDS
    p_values = tl.multiple_of(tl.load(p_shard + VALUES, mask=m_shard, other=0).to(tl.pointer_type(DTYPE)), 16)
    weight = tl.load(p_shard + WEIGHT, mask=m_shard, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    return p_values, _tau(tl.load(p_state + shard * STATE, mask=m_shard, other=0), DTYPE), weight


@triton.jit
def _vote(b_value, tau, weight, b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight):
    b_value = b_value.to(tl.float32)
    b_value = tl.where(tl.abs(b_value) >= tau, b_value, 0.0)
    b_mass += b_value.to(b_mass.dtype)
    b_plus += weight * tl.maximum(b_value, 0.0)
    b_minus += weight * tl.minimum(b_value, 0.0)
    b_plus_weight += tl.where(b_value > 0, weight, 0.0)
    b_minus_weight += tl.where(b_value < 0, weight, 0.0)
    return b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight


@triton.jit
def _elected(b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight):
    b_sum = tl.where(b_mass > 0, b_plus, b_minus)
    b_weight = tl.where(b_mass > 0, b_plus_weight, b_minus_weight)
    # Where nobody has mass the weight may be 0, and 0 / 0 is not the answer.
    return tl.where(b_mass != 0, tl.div_rn(b_sum, tl.where(b_mass != 0, b_weight, 1.0)), 0.0)


@triton.jit(do_not_specialize=("n", "pitch", "shards"))
def merge_kernel(
    p_table, p_state, p_pos, p_out, n, m, pitch, shards,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_R, BLOCK_M] of the result over all shards, GROUP of them in flight.

    Bytes: every shard once + the result + 4 per row and shard.
    """
    dtype: tl.constexpr = p_out.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_tile = (o_r < n)[:, None] & (o_m < m)[None, :]
    # The sign of two values' sum is right in fp32 too.
    b_mass = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32 if GROUP == 2 else tl.float64)
    b_plus = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    b_minus, b_plus_weight, b_minus_weight = b_plus, b_plus, b_plus
    for first in range(0, shards, GROUP):
        for i in tl.static_range(GROUP):
            shard = first + i
            p_values, tau, weight = _shard(p_table, p_state, shard, shards, dtype)
            b_pos = tl.load(p_pos + shard.to(tl.int64) * pitch + o_r, mask=(shard < shards) & (o_r < n), other=0)
            p_tile = p_values + ((b_pos.to(tl.int64) - 1) * m)[:, None] + o_m[None, :]
            b_value = tl.load(p_tile, mask=m_tile & (b_pos > 0)[:, None], other=0.0)
            b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight = _vote(
                b_value, tau, weight, b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight
            )
    b_mean = _elected(b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight)
    tl.store(p_out + (o_r * m)[:, None] + o_m[None, :], b_mean.to(dtype), mask=m_tile)


@triton.jit(do_not_specialize=("n", "shards"))
def merge_map_kernel(
    p_table, p_state, p_bits, p_first, p_out, n, shards, PAIR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK single entries of the result: a shard's next values go to the rows with its bit, in order.

    Bytes: every shard's values once + the result + a byte an entry.
    """
    dtype: tl.constexpr = p_out.dtype.element_ty
    block = tl.program_id(0)
    o_r = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_bits = tl.load(p_bits + o_r, mask=o_r < n, other=0).to(tl.int32)
    b_mass = tl.zeros((BLOCK,), dtype=tl.float32 if PAIR else tl.float64)
    b_plus = tl.zeros((BLOCK,), dtype=tl.float32)
    b_minus, b_plus_weight, b_minus_weight = b_plus, b_plus, b_plus
    for first in range(0, shards, 2):
        # One scan for two shards: 16 bits hold a block's count.
        b_two = b_bits >> first
        b_count = (b_two & 1) | ((b_two & 2) << 15)
        b_before = tl.cumsum(b_count, 0) - b_count
        for i in tl.static_range(2):
            shard = first + i
            p_values, tau, weight = _shard(p_table, p_state, shard, shards, dtype)
            start = tl.load(p_first + shard * tl.num_programs(0) + block, mask=shard < shards, other=0)
            b_at = start + ((b_before >> (16 * i)) & 0xFFFF)
            b_value = tl.load(p_values + b_at, mask=((b_two >> i) & 1) != 0, other=0.0)
            b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight = _vote(
                b_value, tau, weight, b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight
            )
    b_mean = _elected(b_mass, b_plus, b_minus, b_plus_weight, b_minus_weight)
    tl.store(p_out + o_r, b_mean.to(dtype), mask=o_r < n)


def supported(values: Sequence[Tensor]) -> bool:
    """Whether the kernels take these shards: not fp64, and counts in 32 bits."""
    largest = max(sum(v.shape[0] for v in values), *(v.numel() for v in values))
    return values[0].dtype.itemsize <= 4 and largest < 2**31


def _aligned(t: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, which the kernels take for granted: `t` itself in the usual case."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _later(numbers: Tensor) -> Callable[[], list[int]]:
    """Queue a copy to the host; the call that is returned waits for it, and not for what is launched in between."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read


def _zeros(device: torch.device, *sizes: int) -> list[Tensor]:
    """int32 zeros in one launch, each piece at a multiple of 16 bytes."""
    padded = [triton.cdiv(size, 4) * 4 for size in sizes]
    pieces = torch.zeros(sum(padded), dtype=torch.int32, device=device).split(padded)
    return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def _check_rows(unsorted: Sequence[int]) -> None:
    for i, found in enumerate(unsorted):
        if found:
            raise ValueError(f"index[{i}] must be sorted, without repeats and not negative")


def thresholds(values: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
    """The keep[i]-th largest magnitude of every shard [k], in their dtype: the trim by itself."""
    table, _buffer = table_of(values, [v[:0, 0].long() for v in values], keep, [1.0] * len(values))
    hist, state = _zeros(table.device, len(values) * BINS.value, len(values) * STATE.value)
    with guard(table):
        bracket(table, state, values)
        select(table, hist, state, values)
    bits = state.view(len(values), -1)[:, 0].contiguous()
    return bits.view(values[0].dtype) if values[0].dtype.itemsize == 4 else bits.short().view(values[0].dtype)


def merge_config(m: int) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_M and num_warps for rows of m entries."""
    entries, warps = MERGE_CONFIGS["neuron" if m >= 64 else "element"]
    width = min(entries, triton.next_power_of_2(m))
    return entries // width, width, warps


def ties_merge(values, index, keep: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Merge; arguments as `wise_kernels.ties_merge._ties_merge`, with the entries to keep of each shard."""
    values, index = [_aligned(v) for v in values], [_aligned(rows) for rows in index]
    total, m, shards = sum(r.numel() for r in index), values[0].shape[1], len(values)
    if total == 0:
        return torch.empty_like(values[0]), torch.empty_like(index[0])
    table, _buffer = table_of(values, index, keep, weights)
    with guard(table):
        if m == 1 and shards <= SHARDS:
            ends = _later(torch.cat([r[-1:] for r in index]))
            state, hist = _zeros(table.device, shards * STATE.value, shards * BINS.value)
            # Queued first, the pass over the values hides the wait, and the launches of what follows.
            bracket(table, state, values)
            limit = max(0, *ends()) + 1
            if limit <= SPARSEST * total:
                return _merge_mapped(table, state, hist, values, limit)
            flag, pos, report = _zeros(table.device, total, shards * total, 1 + shards)
        else:
            sizes = (shards * STATE.value, shards * BINS.value, total, shards * total, 1 + shards)
            state, hist, flag, pos, report = _zeros(table.device, *sizes)
            bracket(table, state, values)
        union = place(table, flag, pos.view(shards, total), report, max(r.numel() for r in index))
        found = _later(report)
        select(table, hist, state, values)
        n, *unsorted = found()
        _check_rows(unsorted)
        out = torch.empty(n, m, dtype=values[0].dtype, device=table.device)
        if m:
            block_r, block_m, warps = merge_config(m)
            merge_kernel[(triton.cdiv(n, block_r), triton.cdiv(m, block_m))](
                table, state, pos, out, n, m, total, shards,
                GROUP=2 if shards <= 2 else 4, BLOCK_R=block_r, BLOCK_M=block_m, num_warps=warps,
            )  # fmt: skip
    return out, union[:n]


def _merge_mapped(table, state, hist, values, limit: int) -> tuple[Tensor, Tensor]:
    """The merge of single entries from tau's bracket on."""
    shards, tiles = len(values), tiles_of(limit)
    (counts,) = _zeros(table.device, tiles + shards)
    marked, edge = mark(table, shards, limit, counts)
    found = _later(counts[tiles - 1 :])
    select(table, hist, state, values)
    n, *unsorted = found()
    _check_rows(unsorted)
    union, bits, first = compact(table, marked, edge, counts, n)
    out = torch.empty(n, 1, dtype=values[0].dtype, device=table.device)
    merge_map_kernel[(triton.cdiv(n, UNION_BLOCK),)](
        table, state, bits, first, out, n, shards, PAIR=shards <= 2, BLOCK=UNION_BLOCK
    )
    return out, union


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    cases = []
    for dtype in ("fp32", "fp16", "bf16"):
        for regime, m in (("neuron", 4096), ("element", 1)):
            block_r, block_m, warps = merge_config(m)
            for group in (2, 4):
                constexprs = {"GROUP": group, "BLOCK_R": block_r, "BLOCK_M": block_m}
                pointers = {"p_table": "*i64", "p_state": "*i32", "p_pos": "*i32", "p_out": f"*{dtype}"}
                signature = pointers | {"n": "i32", "m": "i32", "pitch": "i32", "shards": "i32"}
                if regime == "element":
                    constexprs["m"] = 1
                signature |= dict.fromkeys(constexprs, "constexpr")
                divisible = (*pointers, "m") if regime == "neuron" else tuple(pointers)
                name = f"ties_merge/merge/{regime}/{group}/{dtype}"
                case = AotCase(name, merge_kernel, signature, constexprs, num_warps=warps, divisible=divisible)
                cases.append(case)
        for pair in (True, False):
            constexprs = {"PAIR": pair, "BLOCK": UNION_BLOCK}
            pointers = {"p_table": "*i64", "p_state": "*i32", "p_bits": "*u8", "p_first": "*i32", "p_out": f"*{dtype}"}
            signature = pointers | {"n": "i32", "shards": "i32"} | dict.fromkeys(constexprs, "constexpr")
            name = f"ties_merge/map/{2 if pair else 'more'}/{dtype}"
            cases.append(AotCase(name, merge_map_kernel, signature, constexprs, divisible=tuple(pointers)))
    return cases
