"""gated_add_ on a device, neuron layout: y_n += a_n[columns_j] values_j for j = choice[n // T], in place; y [N, O],
a [N, F], values [R, O], bounds [J + 1], choice [B], N = B T. Rows of choice -1 keep their bits: every program reads the
choices of its rows first, and with none in scope it is done, so that no value of any memory is read.

Rows are taken in tiles and a tile walks over the memories that its rows have chosen. Up to 16 rows (decode) in one
launch of few programs, the least that a step out of scope can cost. In scope it is bound by the latencies of choice,
bounds, columns, activations and values, one behind the other, then by reading the values once, 2 |S_j| O bytes in 16
bits: 17 us on an H100 for Llama-2-7B at rho 0.2, of which 6 are bandwidth. Shares of the columns in several hundred
programs, added up by a second launch, took 15, but 1.5 us more of every step out of scope; on a stream beside the
projection's they took as long as this in scope, and 5 us out of it.

More rows in two launches: `pack` gathers each row's active columns, so that the product reads whole vectors; then tiles
of the product, 2 N |S_j| O FLOP, bound by the matrix units. Many short sequences are first put in the order of their
memories, which makes the tiles of one memory as few as they can be. Out of scope: launches that read 8 B bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_rows import active_at, columns_at, ordered, rows_of
from .launch import SIZES, AotCase, dependent, guard, interpreted, wait_for_inputs

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# BLOCK_N, BLOCK_O, BLOCK_K, num_warps, num_stages
FEW, FEW_FP32, FEW_AMD = (16, 32, 512, 8, 2), (16, 32, 32, 4, 4), (16, 32, 128, 4, 4)
TILES = ((128, 128, 64, 8, 4), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4))
# 64 KB of local memory on AMD.
TILES_AMD = ((128, 128, 64, 8, 2), (64, 32, 64, 4, 2))
TILE_FP32 = (64, 32, 32, 4, 3)
PACK_N, PACK_K = 32, 64
GROUP = 8
ENOUGH = 120


@triton.jit(do_not_specialize=SIZES)
def few_fwd_kernel(
    p_y, p_a, p_values, p_columns, p_bounds, p_choice, rows, tokens, memories, outputs,
    s_yn, s_yo, s_an, s_af, s_vr, s_vo,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of up to BLOCK_N rows; bound by the bandwidth of values."""
    wait_for_inputs(PDL)
    o_p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_n, b_j = rows_of(p_choice, p_choice, o_p, rows, tokens, memories, False)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    m_o = o_o < outputs
    p_rows = p_a + (b_n * s_an)[:, None]
    b_left = b_j
    j = tl.max(b_left, 0)
    while j >= 0:
        b_mine = b_j == j
        low, high = tl.load(p_bounds + j), tl.load(p_bounds + j + 1)
        b_acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        o_k = low + tl.arange(0, BLOCK_K)
        b_next = active_at(p_rows, columns_at(p_columns, o_k, high), b_mine, o_k, high, s_af)
        b_column = columns_at(p_columns, o_k + BLOCK_K, high)
        for k in range(low, high, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k, b_a = o_k < high, b_next
            b_next = active_at(p_rows, b_column, b_mine, o_k + BLOCK_K, high, s_af)
            b_column = columns_at(p_columns, o_k + 2 * BLOCK_K, high)
            p_tile = p_values + (o_k * s_vr)[:, None] + (o_o * s_vo)[None, :]
            b_v = tl.load(p_tile, mask=m_k[:, None] & m_o[None, :], other=0.0)
            if UPCAST:
                b_a, b_v = b_a.to(tl.float32), b_v.to(tl.float32)
            b_acc = tl.dot(b_a, b_v, b_acc, input_precision="ieee")
        # Stored memory by memory: a value that is not finite stays in the rows that chose it.
        add_rows(p_y, b_acc, b_n, o_o, b_mine, m_o, s_yn, s_yo)
        b_left = tl.where(b_mine, -1, b_left)
        j = tl.max(b_left, 0)


@triton.jit
def add_rows(p_y, b_acc, b_n, o_o, m_n, m_o, s_yn, s_yo):
    p_tile = p_y + (b_n * s_yn)[:, None] + (o_o * s_yo)[None, :]
    m = m_n[:, None] & m_o[None, :]
    b_y = tl.load(p_tile, mask=m, other=0.0).to(tl.float32)
    tl.store(p_tile, (b_y + b_acc).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=SIZES)
def pack_fwd_kernel(
    p_packed, p_a, p_columns, p_bounds, p_choice, p_order, rows, tokens, memories, s_packed, s_an, s_af,
    ORDER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """packed[p, k] = a[n, columns_j[k]] for the row n and memory j at position p, zeros up to a multiple of BLOCK_K."""
    wait_for_inputs(PDL)
    o_p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_n, b_j = rows_of(p_choice, p_order, o_p, rows, tokens, memories, ORDER)
    if tl.max(b_j, 0) >= 0:
        m_n = b_j >= 0
        b_low = tl.load(p_bounds + b_j, mask=m_n, other=0)
        b_size = tl.load(p_bounds + b_j + 1, mask=m_n, other=0) - b_low
        first = tl.program_id(0) * BLOCK_K
        o_k = first + tl.arange(0, BLOCK_K)
        m = o_k[None, :] < b_size[:, None]
        b_column = tl.load(p_columns + b_low[:, None] + o_k[None, :], mask=m, other=0)
        b_a = tl.load(p_a + (b_n * s_an)[:, None] + b_column * s_af, mask=m, other=0.0)
        p_tile = p_packed + (o_p.to(tl.int64) * s_packed)[:, None] + o_k[None, :]
        tl.store(p_tile, b_a, mask=(first < b_size)[:, None] & (o_k >= 0)[None, :])


@triton.jit(do_not_specialize=SIZES)
def tiles_fwd_kernel(
    p_y, p_packed, p_values, p_bounds, p_choice, p_order, rows, tokens, memories, outputs,
    s_packed, s_yn, s_yo, s_vr, s_vo,
    ORDER: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of BLOCK_N positions; bound by the matrix units."""
    wait_for_inputs(PDL)
    tiles_n, tiles_o = tl.cdiv(rows, BLOCK_N), tl.cdiv(outputs, BLOCK_O)
    # A few rows of tiles at a time share both operands in the L2 cache.
    group = tl.program_id(0) // (GROUP * tiles_o)
    size = min(tiles_n - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_o)
    o_p = (group * GROUP + within % size) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_n, b_j = rows_of(p_choice, p_order, o_p, rows, tokens, memories, ORDER)
    o_o = within // size * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < outputs
    o_k = tl.arange(0, BLOCK_K)
    # Not masked: what a row of another memory, or past the end, holds stays in its row, and that is not stored.
    p_rows = p_packed + (tl.minimum(o_p, rows - 1).to(tl.int64) * s_packed)[:, None] + o_k[None, :]
    b_left = b_j
    j = tl.max(b_left, 0)
    while j >= 0:
        low = tl.load(p_bounds + j)
        depth = min((tl.load(p_bounds + j + 1) - low).to(tl.int32), s_packed)
        p_tile = p_values + ((low + o_k) * s_vr)[:, None] + (o_o.to(tl.int64) * s_vo)[None, :]
        b_acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for k in range(0, depth, BLOCK_K):
            b_a = tl.load(p_rows + k)
            b_v = tl.load(p_tile, mask=(k + o_k < depth)[:, None] & m_o[None, :], other=0.0)
            if UPCAST:
                b_a, b_v = b_a.to(tl.float32), b_v.to(tl.float32)
            b_acc = tl.dot(b_a, b_v, b_acc, input_precision="ieee")
            p_tile += BLOCK_K * s_vr
        add_rows(p_y, b_acc, b_n, o_o, b_j == j, m_o, s_yn, s_yo)
        b_left = tl.where(b_j == j, -1, b_left)
        j = tl.max(b_left, 0)


def tile(rows: int, outputs: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """The largest tile that still gives every SM of a large device about one."""
    if dtype == torch.float32:
        return TILE_FP32
    tiles = TILES if torch.version.hip is None else TILES_AMD
    for found in tiles:
        if triton.cdiv(rows, found[0]) * triton.cdiv(outputs, found[1]) >= ENOUGH:
            return found
    return tiles[-1]


def gated_add(y: Tensor, a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, choice: Tensor) -> None:
    """y += the chosen memories' responses; bf16, fp16 or fp32, any strides."""
    memories, (rows, outputs) = bounds.shape[0] - 1, y.shape
    if memories == 0 or y.numel() == 0:
        return
    tokens, columns, choice = rows // choice.shape[0], columns.contiguous(), choice.contiguous()
    with guard(y):
        if rows <= FEW[0]:
            few = FEW if torch.version.hip is None else FEW_AMD
            block_n, block_o, block_k, num_warps, num_stages = FEW_FP32 if y.dtype == torch.float32 else few
            few_fwd_kernel[(triton.cdiv(outputs, block_o), triton.cdiv(rows, block_n))](
                y, a, values, columns, bounds, choice, rows, tokens, memories, outputs,
                *y.stride(), *a.stride(), *values.stride(),
                UPCAST=interpreted(), BLOCK_N=block_n, BLOCK_O=block_o, BLOCK_K=block_k,
                num_warps=num_warps, num_stages=num_stages, **dependent(y),
            )  # fmt: skip
            return
        block_n, block_o, block_k, num_warps, num_stages = tile(rows, outputs, y.dtype)
        order = ordered(choice, memories) if tokens < block_n and choice.shape[0] > 1 else None
        # No memory has more columns than `a`, nor more than the bank.
        chunks = triton.cdiv(min(a.shape[1], values.shape[0]), PACK_K)
        packed = torch.empty(rows, max(1, chunks) * PACK_K, dtype=a.dtype, device=a.device)
        pack_fwd_kernel[(max(1, chunks), triton.cdiv(rows, PACK_N))](
            packed, a, columns, bounds, choice, order, rows, tokens, memories, packed.stride(0), *a.stride(),
            ORDER=order is not None, BLOCK_N=PACK_N, BLOCK_K=PACK_K, **dependent(y),
        )  # fmt: skip
        tiles_fwd_kernel[(triton.cdiv(rows, block_n) * triton.cdiv(outputs, block_o),)](
            y, packed, values, bounds, choice, order, rows, tokens, memories, outputs,
            packed.stride(0), *y.stride(), *values.stride(),
            ORDER=order is not None, UPCAST=interpreted(), GROUP=GROUP,
            BLOCK_N=block_n, BLOCK_O=block_o, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
            **dependent(y),
        )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases, nvidia, amd = [], ("sm_80", "sm_90", "sm_100"), ("gfx942",)
    for dtype, kind in POINTERS.items():
        fp32 = dtype == torch.float32
        few = [(FEW_FP32, nvidia + amd)] if fp32 else [(FEW, nvidia), (FEW_AMD, amd)]
        shipped = [(few_fwd_kernel, found, targets) for found, targets in few]
        tiles = [(TILE_FP32, nvidia + amd)] if fp32 else [(t, nvidia) for t in TILES] + [(t, amd) for t in TILES_AMD]
        shipped += [(tiles_fwd_kernel, found, targets) for found, targets in tiles]
        shipped += [(pack_fwd_kernel, (PACK_N, 0, PACK_K, 4, 3), nvidia + amd)]
        for kernel, (block_n, block_o, block_k, num_warps, num_stages), targets in shipped:
            constexprs = {"s_yo": 1, "s_af": 1, "s_vo": 1, "ORDER": True, "UPCAST": False, "GROUP": GROUP, "PDL": False}
            constexprs |= {"BLOCK_N": block_n, "BLOCK_O": block_o, "BLOCK_K": block_k}
            constexprs = {name: v for name, v in constexprs.items() if name in kernel.arg_names}
            types = dict.fromkeys(("p_y", "p_a", "p_values", "p_packed"), kind)
            types |= dict.fromkeys(("p_columns", "p_bounds", "p_choice", "p_order"), "*i64")
            signature = {
                name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names
            }
            usual = (*types, "outputs", "s_packed", "s_yn", "s_an", "s_vr")
            divisible = tuple(name for name in usual if name in signature)
            expect = None if fp32 or kernel is pack_fwd_kernel else "mma" if kernel is few_fwd_kernel else "wgmma"
            name = f"gated_add/{kernel.__name__.split('_')[0]}/{block_n}x{block_o}/{kind[1:]}"
            name += "/amd" if targets == amd else ""
            cases.append(
                AotCase(name, kernel, signature, constexprs, num_warps, num_stages, expect, divisible, targets)
            )
    return cases
