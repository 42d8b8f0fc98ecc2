"""One optimiser step on a compact memory in the neuron layout: values [K, O] -= step(g), g = features^T dY, features
[N, K] and dY [N, O] of N tokens. The product stays in registers and goes straight into SGD, momentum or Adam, weight
decay and the clamp, in place, and into a low-precision copy: one launch, and no gradient in device memory. A program
loops over all of N, so there are no atomics and a launch is deterministic.

Bound: few tokens, device memory, 8 bytes an entry and fp32 array that is read and written (24 for Adam); many tokens,
the matrix units, 2 N flop an entry (three times that in tf32x3). The element layout is in masked_update_element.py.
"""

import triton
import triton.language as tl

from .launch import AotCase, guard
from .update_tile import (
    OPTIMIZERS,
    Contiguous,
    aligned_columns,
    apply_step,
    hyper_arguments,
    load_entries,
    product_cases,
    product_operands,
    split_columns,
    token_product,
)

# regime -> BLOCK_K, BLOCK_O, BLOCK_N, PARTS of the step (0: one, whose entries are read before the product), num_warps,
# num_stages
CONFIGS = {
    "narrow": (32, 64, 32, 0, 4, 3),
    "short16": (64, 64, 64, 0, 8, 3),
    "short32": (64, 64, 32, 0, 8, 3),
    "few16": (64, 64, 64, 2, 4, 3),
    "many16": (64, 128, 64, 4, 4, 3),
    "many32": (128, 128, 32, 4, 8, 3),
}
# Under this many 64 x 64 tiles a memory is narrow: some multiprocessors would have no tile, or one of two waves.
FEW_TILES = 256
# Up to so many tokens the product is shorter than what the step reads takes: measured at 64, and no longer at 512.
SHORT_TOKENS = 128
# Up to so many of 16 bits, small tiles: many programs an SM, of which some wait for memory while others multiply.
# Beyond, tiles that read the operands less often.
FEW_TOKENS = 1024
# Below, copying the features to rows of 16 bytes costs more than it saves.
ALIGNED_TOKENS = 128


@triton.jit(do_not_specialize=["N"])
def neuron_kernel(
    p_values, p_features, p_dy, p_first, p_second, p_copy, N, K, FEATURES, O,
    stride_fn, stride_fk, stride_dn, stride_do, lr, decay, momentum, weight1, beta2, eps, scale, step_size, clamp,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, CLAMP: tl.constexpr, COPY: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of values [K, O]: product over N, then the step in place. features [N, FEATURES] may have more columns,
    zeros.

    Bytes: K O (8 per fp32 array + 2 for a bf16 copy) + N (K + O) sizeof; flop: 2 N K O, three times in tf32x3.
    Llama-2-7B (4096 x 11008, rho 0.2), Adam, on an H100: 75 us for 64 tokens, where reading and writing the three
    arrays takes 77 by itself. On another one 106 for 512 and 189 for 2048, whose product is only half hidden.
    """
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_k, m_o = o_k < K, o_o < O
    o_row = o_k[:, None] * O
    if PARTS == 0:
        # Before the product, which hides how long they take.
        o_entry, m_entry = o_row + o_o[None, :], m_k[:, None] & m_o[None, :]
        entries = load_entries(p_values, p_first, p_second, o_entry, m_entry, ADAM, MOMENTUM)
    b_grad = token_product(
        p_features, p_dy, o_k * stride_fk, o_o * stride_do, o_k < FEATURES, m_o, N, stride_fn, stride_dn,
        BLOCK_K, BLOCK_O, BLOCK_N, UPCAST, PRECISION,
    )  # fmt: skip
    if PARTS == 0:
        apply_step(
            b_grad, entries, p_values, p_first, p_second, p_copy, o_entry, m_entry,
            lr, decay, momentum, weight1, beta2, eps, scale, step_size, clamp, ADAM, MOMENTUM, CLAMP, COPY,
        )  # fmt: skip
    else:
        parts = split_columns(b_grad, PARTS)
        for i in tl.static_range(PARTS):
            # A part at a time: with a whole tile of values and moments in flight, registers spill.
            o_o = tl.program_id(0).to(tl.int64) * BLOCK_O + i * (BLOCK_O // PARTS) + tl.arange(0, BLOCK_O // PARTS)
            o_entry, m_entry = o_row + o_o[None, :], m_k[:, None] & (o_o < O)[None, :]
            entries = load_entries(p_values, p_first, p_second, o_entry, m_entry, ADAM, MOMENTUM)
            apply_step(
                parts[i], entries, p_values, p_first, p_second, p_copy, o_entry, m_entry,
                lr, decay, momentum, weight1, beta2, eps, scale, step_size, clamp, ADAM, MOMENTUM, CLAMP, COPY,
            )  # fmt: skip


def config(tokens: int, rows: int, columns: int, itemsize: int) -> tuple[int, ...]:
    if triton.cdiv(rows, 64) * triton.cdiv(columns, 64) < FEW_TILES:
        return CONFIGS["narrow"]
    if tokens <= SHORT_TOKENS:
        return CONFIGS[f"short{8 * itemsize}"]
    return CONFIGS["few16" if itemsize == 2 and tokens <= FEW_TOKENS else f"many{8 * itemsize}"]


def masked_update(values, features, dy, exp_avg, exp_avg_sq, copy, *hyper) -> None:
    """Launch the step on values [K, O]; arguments as `wise_kernels.masked_update._masked_update_`."""
    (tokens, rows), columns = features.shape, dy.shape[1]
    if values.numel() == 0:
        return
    features, dy, options = product_operands(features, dy)
    if tokens > ALIGNED_TOKENS:
        features = aligned_columns(features)
    block_k, block_o, block_n, parts, warps, stages = config(tokens, rows, columns, features.element_size())
    given = Contiguous(values, exp_avg, exp_avg_sq, copy)
    p_values, p_first, p_second, p_copy = given.arguments()
    numbers, flags = hyper_arguments(*hyper)
    with guard(values):
        neuron_kernel[(triton.cdiv(columns, block_o), triton.cdiv(rows, block_k))](
            p_values, features, dy, p_first, p_second, p_copy, tokens, rows, features.shape[1], columns,
            *features.stride(), *dy.stride(), *numbers, **flags, COPY=copy is not None,
            BLOCK_K=block_k, BLOCK_O=block_o, BLOCK_N=block_n, PARTS=parts,
            **options, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    given.write_back()


def aot_cases() -> list[AotCase]:
    """Every shipped configuration of the kernels of this file."""
    cases = []
    for optimizer, flags in OPTIMIZERS.items():
        cases += product_cases(f"neuron/{optimizer}", neuron_kernel, CONFIGS, ("BLOCK_K", "BLOCK_O"), flags)
    return cases
