"""Union of the sorted rows of up to 8 shards with many short rows (the element layout), by a byte for each row of the
matrix: bit i where shard i has the row. A row's position in a shard is then a running count of bits, not a search.

A program owns a tile of the map and the rows of every shard that fall into it, which it finds at `edge` [k, tiles + 1],
so that no two programs touch one byte. Counts of the tiles, summed, say where the rows of each go in the union.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase
from .ties_rows import bisect, rows_of

SHARDS, TILE, BLOCK, UNION_BLOCK = 8, 4096, 512, 512
# A map of up to so many bytes a row of the shards, which have 8 bytes a row themselves.
SPARSEST = 16


@triton.jit(do_not_specialize=("edges", "tiles"))
def edge_kernel(
    p_table, p_query, p_edge, p_out, edges, tiles, FIRST: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a shard's rows reach the first row of each tile: of the map, or, given its edges, of the union. Latency."""
    shard = tl.program_id(1)
    p_rows, rows = rows_of(p_table, shard)
    o_edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_edge = o_edge < edges
    if FIRST:
        b_row = o_edge.to(tl.int64) * TILE
        # The outermost take in every row, were they out of order, so that each is checked.
        b_low = tl.where(o_edge < edges - 1, 0, rows)
        b_high = tl.where(m_edge & (o_edge > 0), rows, b_low)
    else:
        b_row = tl.load(p_query + o_edge.to(tl.int64) * STEP, mask=m_edge, other=0)
        p_tile = p_edge + shard * (tiles + 1) + b_row // TILE
        b_low = tl.load(p_tile, mask=m_edge, other=0)
        b_high = tl.load(p_tile + 1, mask=m_edge, other=0)
    tl.store(p_out + shard * edges + o_edge, bisect(p_rows, b_low, b_high, b_row), mask=m_edge)


@triton.jit(do_not_specialize=("tiles", "shards"))
def mark_kernel(p_table, p_edge, p_map, p_size, p_counts, tiles, shards, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of the map, how many of its rows are in the union, and counts[tiles + shard] where rows are not sorted.

    Bytes: the rows, and the map.
    """
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * TILE
    p_tile = p_map + start
    tl.store(p_tile + tl.arange(0, TILE), tl.zeros((TILE,), dtype=tl.uint8))
    for i in range(shards):
        tl.debug_barrier()
        p_rows, _ = rows_of(p_table, i)
        b_unsorted = tl.zeros((BLOCK,), dtype=tl.int32)
        end = tl.load(p_edge + i * (tiles + 1) + tile + 1)
        for at in range(tl.load(p_edge + i * (tiles + 1) + tile), end, BLOCK):
            o_at = at + tl.arange(0, BLOCK)
            m_at = o_at < end
            b_row = tl.load(p_rows + o_at, mask=m_at, other=0)
            b_before = tl.load(p_rows + o_at - 1, mask=m_at & (o_at > 0), other=-1)
            b_unsorted |= (m_at & (b_row <= b_before)).to(tl.int32)
            b_row -= start
            m_at = m_at & (b_row >= 0) & (b_row < TILE)
            b_bits = tl.load(p_tile + b_row, mask=m_at, other=0).to(tl.int32) | (1 << i)
            tl.store(p_tile + b_row, b_bits.to(tl.uint8), mask=m_at)
        if tl.max(b_unsorted, 0) > 0:
            tl.store(p_counts + tiles + i, 1)
    tl.debug_barrier()
    m_row = tl.load(p_tile + tl.arange(0, TILE)) != 0
    tl.store(p_size + tile, tl.sum(m_row.to(tl.int32), 0))


@triton.jit
def compact_kernel(p_map, p_end, p_union, p_bits, TILE: tl.constexpr):
    """The rows of one tile of the map that shards have, and their bits, packed. Bytes: the map, and 9 a row."""
    tile = tl.program_id(0)
    # A scan over words of four bytes is a quarter of one over bytes.
    o_word, o_byte = tl.arange(0, TILE // 4), tl.arange(0, 4)[None, :]
    b_word = tl.load(p_map.to(tl.pointer_type(tl.int32)) + tile.to(tl.int64) * (TILE // 4) + o_word)
    b_count = ((b_word & 0xFF) != 0).to(tl.int32) + ((b_word & 0xFF00) != 0).to(tl.int32)
    b_count += ((b_word & 0xFF0000) != 0).to(tl.int32) + ((b_word >> 24) != 0).to(tl.int32)
    b_start = tl.load(p_end + tile) - tl.sum(b_count, 0) + tl.cumsum(b_count, 0) - b_count
    b_bits = (b_word[:, None] >> (8 * o_byte)) & 0xFF
    b_count = (b_bits != 0).to(tl.int32)
    b_at = b_start[:, None] + tl.cumsum(b_count, 1) - b_count
    tl.store(p_union + b_at, tile.to(tl.int64) * TILE + o_word[:, None] * 4 + o_byte, mask=b_bits != 0)
    tl.store(p_bits + b_at, b_bits.to(tl.uint8), mask=b_bits != 0)


def _edges(table: Tensor, query: Tensor, edge: Tensor, out: Tensor, first: bool) -> Tensor:
    constexprs = {"FIRST": first, "STEP": UNION_BLOCK, "TILE": TILE, "BLOCK": 128}
    grid = (triton.cdiv(out.shape[1], 128), len(out))
    edge_kernel[grid](table, query, edge, out, out.shape[1], edge.shape[1] - 1, **constexprs)
    return out


def tiles_of(limit: int) -> int:
    return triton.cdiv(limit, TILE)


def mark(table: Tensor, shards: int, limit: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The map of all rows below `limit` and the edges of its tiles, in three launches. `counts` [tiles + k] comes as
    zeros, and holds the running size of the union, and then whether each shard's rows are unsorted."""
    tiles = tiles_of(limit)
    bits = table.new_empty(tiles * TILE, dtype=torch.uint8)
    edge = table.new_empty(shards, tiles + 1, dtype=torch.int32)
    _edges(table, table, edge, edge, True)
    size = torch.empty_like(counts[:tiles])
    mark_kernel[(tiles,)](table, edge, bits, size, counts, tiles, shards, TILE=TILE, BLOCK=BLOCK)
    torch.cumsum(size, 0, dtype=torch.int32, out=counts[:tiles])
    return bits, edge


def compact(table: Tensor, marked: Tensor, edge: Tensor, counts: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The union [rows], its bits, and where in each shard each UNION_BLOCK of it begins, in two launches."""
    union, bits = table.new_empty(rows), table.new_empty(rows, dtype=torch.uint8)
    compact_kernel[(len(marked) // TILE,)](marked, counts, union, bits, TILE=TILE)
    first = table.new_empty(len(edge), triton.cdiv(rows, UNION_BLOCK), dtype=torch.int32)
    return union, bits, _edges(table, union, edge, first, False)


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    table, sizes = {"p_table": "*i64"}, {"tiles": "i32", "shards": "i32"}
    edge = table | {"p_query": "*i64", "p_edge": "*i32", "p_out": "*i32", "edges": "i32", "tiles": "i32"}
    mark = table | {"p_edge": "*i32", "p_map": "*u8", "p_size": "*i32", "p_counts": "*i32"} | sizes
    compact = {"p_map": "*u8", "p_end": "*i32", "p_union": "*i64", "p_bits": "*u8"}
    common = {"STEP": UNION_BLOCK, "TILE": TILE, "BLOCK": 128}
    cases = []
    for name, kernel, arguments, constexprs in (
        ("edge/map", edge_kernel, edge, {"FIRST": True, **common}),
        ("edge/union", edge_kernel, edge, {"FIRST": False, **common}),
        ("mark", mark_kernel, mark, {"TILE": TILE, "BLOCK": BLOCK}),
        ("compact", compact_kernel, compact, {"TILE": TILE}),
    ):
        signature = arguments | dict.fromkeys(constexprs, "constexpr")
        divisible = tuple(a for a in arguments if a.startswith("p_"))
        cases.append(AotCase(f"ties_map/{name}", kernel, signature, constexprs, divisible=divisible))
    return cases
