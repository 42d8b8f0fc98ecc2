"""One optimiser step on a compact memory in the element layout: values [V], bits [O, W = ceil(F/32)], a [N, F] and dY
[N, O] of N tokens, g = dY^T a at the set bits. Tiles of dY^T a over rows of O and words of F are made by the matrix
units, and of each only the set bits are stored, packed: entry (o, c) lies at row_start[o] + starts[o, c // 32] +
popcount of the lower bits of its word. A second launch steps the packed entries.

Why two launches, where the neuron layout takes one: inside the tile the step would run on all lanes, set or not, and
read and write packed arrays in pieces of a few bytes. The packed gradient costs 8 bytes an entry; no dense one exists.

Bound: few tokens, device memory and the index arithmetic of the tiles; many tokens, the matrix units, 2 N O F flop
whatever the density (three times that in tf32x3).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .element_tile import popcount
from .launch import AotCase, guard
from .update_tile import (
    OPTIMIZERS,
    Contiguous,
    apply_step,
    case,
    hyper_arguments,
    load_entries,
    product_cases,
    product_operands,
    split_columns,
    token_product,
)

# regime -> BLOCK_O, BLOCK_F, BLOCK_N, PARTS of the store, num_warps, num_stages
CONFIGS = {"many16": (128, 128, 64, 4, 8, 3), "many32": (128, 128, 32, 4, 8, 3)}
BLOCK_W, BLOCK_STEP = 512, 1024


@triton.jit
def word_starts_kernel(p_bits, p_starts, p_counts, W, stride_o, stride_w, BLOCK_W: tl.constexpr):
    """Set bits before each word of a row -> starts [O, W]; set bits of the row -> counts [O]. One row a program.

    Memory-bound: 8 bytes a word, about 3 % of the bytes of the step at density 0.2: 7 us for Llama-2-7B on an H100.
    """
    row = tl.program_id(0).to(tl.int64)
    before = tl.zeros((), dtype=tl.int32)
    for start in range(0, W, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        b_word = tl.load(p_bits + row * stride_o + o_w * stride_w, mask=o_w < W, other=0)
        b_count = popcount(b_word.to(tl.uint32, bitcast=True))
        tl.store(p_starts + row * W + o_w, before + tl.cumsum(b_count, 0) - b_count, mask=o_w < W)
        before += tl.sum(b_count, 0)
    tl.store(p_counts + row, before.to(tl.int64))


@triton.jit(do_not_specialize=["N"])
def element_grad_kernel(
    p_grad, p_bits, p_starts, p_row_start, p_a, p_dy, N, O, F, V, W,
    stride_bo, stride_bw, stride_an, stride_af, stride_dn, stride_do,
    BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dY^T a over rows of O and words of F, of which the set bits are stored packed -> grad [V].

    Bytes: 4 V + O F / 4 of bits and starts + N (O + F) sizeof; flop: 2 N O F whatever the density. Predicted for
    Llama-2-7B and N = 512 (bf16, H100): 150 us, of a tile's 12500 cycles some 7000 for operands from the L2 cache and
    4000 for 1300 instructions a warp that find and store its entries. Before its lanes ran along rows: measured, 271.
    """
    o_o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_o, m_f = o_o < O, o_f < F
    # A part is as wide as a word. Its row's word and first entry are read before the product, which hides that.
    o_w = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    m_w = m_o[:, None] & (o_w < W)[None, :]
    p_word = p_bits + (o_o * stride_bo)[:, None] + (o_w.to(tl.int64) * stride_bw)[None, :]
    b_word = tl.load(p_word, mask=m_w, other=0).to(tl.uint32, bitcast=True)
    # Entries of a tile lie within BLOCK_O rows, so they are 32-bit offsets from its first row.
    tile_start = tl.load(p_row_start + tl.program_id(1).to(tl.int64) * BLOCK_O)
    b_row = (tl.load(p_row_start + o_o, mask=m_o, other=0) - tile_start).to(tl.int32)
    b_first = tl.load(p_starts + (o_o * W)[:, None] + o_w[None, :], mask=m_w, other=0) + b_row[:, None]
    b_grad = token_product(
        p_dy, p_a, o_o * stride_do, o_f.to(tl.int64) * stride_af, m_o, m_f, N, stride_dn, stride_an,
        BLOCK_O, BLOCK_F, BLOCK_N, UPCAST, PRECISION,
    )  # fmt: skip
    # Keeps a bank whose bits and values disagree from writing outside of its memory.
    room = tl.minimum(V - tile_start, 0x7FFFFFFF).to(tl.int32)
    SIZE: tl.constexpr = BLOCK_O * (BLOCK_F // PARTS)
    parts, o_part = split_columns(b_grad, PARTS), tl.arange(0, PARTS)[None, :]
    b_bit = (tl.full((BLOCK_F // PARTS,), 1, tl.uint32) << tl.arange(0, BLOCK_F // PARTS).to(tl.uint32))[None, :]
    p_grad += tile_start
    for i in tl.static_range(PARTS):
        b_bits = tl.sum(tl.where(o_part == i, b_word, 0), 1)[:, None]
        b_entry = tl.sum(tl.where(o_part == i, b_first, 0), 1)[:, None] + popcount(b_bits & (b_bit - 1))
        m_entry = ((b_bits & b_bit) != 0) & (b_entry < room)
        # In one dimension, so that lanes run along a row whatever order a compiler gives the dimensions of two.
        b_entry, m_entry = tl.reshape(b_entry, [SIZE]), tl.reshape(m_entry, [SIZE])
        tl.store(p_grad + b_entry, tl.reshape(parts[i], [SIZE]), mask=m_entry)


@triton.jit
def element_step_kernel(
    p_values, p_grad, p_row_start, p_first, p_second, p_copy, O, V,
    lr, decay, momentum, weight1, beta2, eps, scale, step_size, clamp,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, CLAMP: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of a block of packed values [V]; memory-bound, as the neuron layout + 4 bytes an entry for its gradient:
    83 us for Llama-2-7B on an H100, 252 MB.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o_entry = start + tl.arange(0, BLOCK)
    # Where bits and values disagree on V, entries without a bit have no gradient.
    end = tl.minimum(tl.load(p_row_start + O), V)
    if start + BLOCK <= end:
        # Without a mask, because V is any number and a mask of it allows no vector loads.
        m_entry = tl.full((BLOCK,), True, tl.int1)
        entries = load_entries(p_values, p_first, p_second, o_entry, m_entry, ADAM, MOMENTUM)
        apply_step(
            tl.load(p_grad + o_entry), entries, p_values, p_first, p_second, p_copy, o_entry, m_entry,
            lr, decay, momentum, weight1, beta2, eps, scale, step_size, clamp, ADAM, MOMENTUM, CLAMP, COPY,
        )  # fmt: skip
    else:
        m_entry = o_entry < end
        entries = load_entries(p_values, p_first, p_second, o_entry, m_entry, ADAM, MOMENTUM)
        b_grad = tl.load(p_grad + o_entry, mask=m_entry, other=0.0)
        apply_step(
            b_grad, entries, p_values, p_first, p_second, p_copy, o_entry, m_entry,
            lr, decay, momentum, weight1, beta2, eps, scale, step_size, clamp, ADAM, MOMENTUM, CLAMP, COPY,
        )  # fmt: skip


def word_starts(bits: Tensor) -> tuple[Tensor, Tensor]:
    """For bits [O, W]: set bits before each word in its row [O, W] int32, and before each row [O + 1] int64."""
    outputs, width = bits.shape
    starts = torch.empty(outputs, width, dtype=torch.int32, device=bits.device)
    row_start = torch.zeros(outputs + 1, dtype=torch.int64, device=bits.device)
    with guard(bits):
        word_starts_kernel[(outputs,)](bits, starts, row_start[1:], width, *bits.stride(), BLOCK_W=BLOCK_W)
    return starts, row_start.cumsum_(0)


def masked_update_element(values, bits, a, dy, exp_avg, exp_avg_sq, copy, *hyper) -> None:
    """Launch the step on values [V]; arguments as `wise_kernels.masked_update._masked_update_element_`."""
    (tokens, inputs), outputs = a.shape, dy.shape[1]
    if values.numel() == 0:
        return
    dy, a, options = product_operands(dy, a)
    block_o, block_f, block_n, parts, warps, stages = CONFIGS["many16" if a.element_size() == 2 else "many32"]
    given = Contiguous(values, exp_avg, exp_avg_sq, copy)
    p_values, p_first, p_second, p_copy = given.arguments()
    starts, row_start = word_starts(bits)
    grad = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
    numbers, flags = hyper_arguments(*hyper)
    with guard(values):
        element_grad_kernel[(triton.cdiv(inputs, block_f), triton.cdiv(outputs, block_o))](
            grad, bits, starts, row_start, a, dy, tokens, outputs, inputs, values.numel(), bits.shape[1],
            *bits.stride(), *a.stride(), *dy.stride(), BLOCK_O=block_o, BLOCK_F=block_f, BLOCK_N=block_n, PARTS=parts,
            **options, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        element_step_kernel[(triton.cdiv(values.numel(), BLOCK_STEP),)](
            p_values, grad, row_start, p_first, p_second, p_copy, outputs, values.numel(), *numbers, **flags,
            COPY=copy is not None, BLOCK=BLOCK_STEP,
        )  # fmt: skip
    given.write_back()


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    cases = product_cases("element", element_grad_kernel, CONFIGS, ("BLOCK_O", "BLOCK_F"), {})
    cases.append(case("element/starts", word_starts_kernel, {"BLOCK_W": BLOCK_W}))
    for optimizer, flags in OPTIMIZERS.items():
        cases.append(case(f"element/step/{optimizer}", element_step_kernel, flags | {"BLOCK": BLOCK_STEP}))
    return cases
