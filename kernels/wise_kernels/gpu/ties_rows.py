"""Union of the sorted rows of k shards, and where each of its rows is in each shard: pos [k, n] holds the position + 1,
or 0 where the shard lacks the row.

A row's rank in the union is found by bisection in all shards: the rows below it, counted with repeats, number a flag
that equal rows share, and a running sum over the flags leaves the repeats out. No memory of the size of the matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase
from .ties_trim import COUNT, FIELDS, ROWS, START

BLOCK = 256


@triton.jit
def bisect(p_rows, b_low, b_high, b_row):
    """Positions in the sorted rows [b_low, b_high) of the first that is not below each of `b_row`."""
    while tl.max(b_high - b_low, 0) > 0:
        m_open = b_low < b_high
        b_mid = b_low + ((b_high - b_low) >> 1)
        m_right = m_open & (tl.load(p_rows + b_mid, mask=m_open, other=0) < b_row)
        b_high = tl.where(m_open & (m_right == 0), b_mid, b_high)
        b_low = tl.where(m_right, b_mid + 1, b_low)
    return b_low


@triton.jit
def rows_of(p_table, shard):
    """Address and number of a shard's rows."""
    p_rows = tl.load(p_table + shard * FIELDS + ROWS).to(tl.pointer_type(tl.int64))
    return p_rows, tl.load(p_table + shard * FIELDS + COUNT).to(tl.int32)


@triton.jit(do_not_specialize=("shards",))
def rank_kernel(p_table, p_flag, p_below, p_report, shards, BLOCK: tl.constexpr):
    """Of every row of a shard the number of rows below it in all shards, and a flag at that number; report[1 + shard]
    where rows are not sorted, repeat or are negative. Latency of the bisections."""
    shard = tl.program_id(1)
    p_rows, rows = rows_of(p_table, shard)
    o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < rows
    b_row = tl.load(p_rows + o_row, mask=m_row, other=0)
    b_before = tl.load(p_rows + o_row - 1, mask=m_row & (o_row > 0), other=-1)
    if tl.max((m_row & (b_row <= b_before)).to(tl.int32), 0) > 0:
        tl.store(p_report + 1 + shard, 1)
    b_below, b_none = o_row, tl.zeros((BLOCK,), dtype=tl.int32)
    for other in range(shards):
        if other != shard:
            p_others, others = rows_of(p_table, other)
            b_below += bisect(p_others, b_none, b_none + others, b_row)
    start = tl.load(p_table + shard * FIELDS + START)
    tl.store(p_below + start + o_row, b_below, mask=m_row)
    tl.store(p_flag + b_below, 1, mask=m_row)


@triton.jit(do_not_specialize=("total",))
def place_kernel(p_table, p_rank, p_below, p_union, p_pos, p_report, total, BLOCK: tl.constexpr):
    """Rows to their ranks in the union, their positions to the same ranks of pos, the size of the union to report[0].

    Bytes: about 30 a row; launch latency where the rows are few."""
    shard = tl.program_id(1)
    p_rows, rows = rows_of(p_table, shard)
    o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < rows
    b_below = tl.load(p_below + tl.load(p_table + shard * FIELDS + START) + o_row, mask=m_row, other=0)
    b_rank = tl.load(p_rank + b_below, mask=m_row, other=1) - 1
    tl.store(p_union + b_rank, tl.load(p_rows + o_row, mask=m_row, other=0), mask=m_row)
    tl.store(p_pos + shard.to(tl.int64) * total + b_rank, o_row + 1, mask=m_row)
    if tl.program_id(0) + shard == 0:
        tl.store(p_report, tl.load(p_rank + total - 1))


def place(table: Tensor, flag: Tensor, pos: Tensor, report: Tensor, rows: int) -> Tensor:
    """The union in the first report[0] entries of a tensor [total], and pos [k, total] filled in; shards have at most
    `rows` rows each. `flag` [total], pos and `report` [1 + k] come as zeros. Three launches."""
    shards, total = pos.shape
    below = torch.empty_like(flag)
    union = torch.empty(total, dtype=torch.int64, device=flag.device)
    grid = (triton.cdiv(rows, BLOCK), shards)
    rank_kernel[grid](table, flag, below, report, shards, BLOCK=BLOCK)
    rank = flag.cumsum(0, dtype=torch.int32)
    place_kernel[grid](table, rank, below, union, pos, report, total, BLOCK=BLOCK)
    return union


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    cases = []
    for kernel, names in (
        (rank_kernel, ("p_flag", "p_below", "p_report")),
        (place_kernel, ("p_rank", "p_below", "p_union", "p_pos", "p_report")),
    ):
        pointers = {"p_table": "*i64"} | {name: "*i64" if name == "p_union" else "*i32" for name in names}
        size = "shards" if kernel is rank_kernel else "total"
        signature = pointers | {size: "i32", "BLOCK": "constexpr"}
        name = f"ties_rows/{kernel.__name__.removesuffix('_kernel')}"
        cases.append(AotCase(name, kernel, signature, {"BLOCK": BLOCK}, divisible=tuple(pointers)))
    return cases
