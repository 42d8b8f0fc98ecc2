"""leverage on a device: out [J, N] = ||a_S U_j||^2 with a_S = a[:, columns_j] of a [N, F] and U_j the rows
bounds[j]:bounds[j+1] of `factors` [R, r], all memories in one grouped launch.

Precision: activations of 16 bits and factors that have been rounded to fp16 have at most 11 significant bits, as many
as tf32 keeps: tensor cores multiply them exactly and add in fp32. Factors with more bits are rounded to 11. fp32
activations are multiplied in IEEE fp32.

Few tokens are bound by reading the factors, 4 R r bytes, and cut over blocks of r to fill the device; many by the
product, 2 N R r FLOP at the rate of tf32, and the gather of a_S, one 2-byte load an element, done once for all of r.
Far from either bound: on an H100 512 tokens take 448 us for 64 memories of Llama-2-7B (r 64), 68 us for 4, ten times
what their products need. The gather's latency is what is waited for; tiles of 32 rows, of which more fit an SM, halved
it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_rows import active_at, columns_at
from .launch import SIZES, AotCase, guard

# BLOCK_N, BLOCK_K, BLOCK_R, num_warps, num_stages
SMALL = (16, 128, 16, 4, 4)
MEDIUM = (32, 64, 32, 4, 3)
MEDIUM_FP32 = (32, 32, 32, 4, 3)
LARGE = {32: (32, 128, 32, 4, 2), 64: (32, 128, 64, 4, 2), 128: (32, 64, 128, 4, 2)}
# Programs below which a device is not full.
ENOUGH = 128
BLOCK_SUM = 256


@triton.jit(do_not_specialize=SIZES)
def thin_fwd_kernel(
    p_a, p_columns, p_bounds, p_factors, p_out, rows, rank, s_an, s_af, s_fk, s_fr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R columns of a_S U_j for BLOCK_N tokens, squared and summed."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_r = part * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < rows, o_r < rank
    low, high = tl.load(p_bounds + j), tl.load(p_bounds + j + 1)
    b_y = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    p_rows, o_k = p_a + (o_n * s_an)[:, None], low + tl.arange(0, BLOCK_K)
    b_next = active_at(p_rows, columns_at(p_columns, o_k, high), m_n, o_k, high, s_af)
    b_column = columns_at(p_columns, o_k + BLOCK_K, high)
    for k in range(low, high, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k, b_a = o_k < high, b_next.to(tl.float32)
        b_next = active_at(p_rows, b_column, m_n, o_k + BLOCK_K, high, s_af)
        b_column = columns_at(p_columns, o_k + 2 * BLOCK_K, high)
        p_tile = p_factors + (o_k * s_fk)[:, None] + (o_r * s_fr)[None, :]
        b_u = tl.load(p_tile, mask=m_k[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        b_y = tl.dot(b_a, b_u, b_y, input_precision=PRECISION)
    b_square = tl.sum(b_y * b_y, 1)
    p_out += part.to(tl.int64) * tl.num_programs(1) * rows + j * rows
    tl.store(p_out + o_n, b_square, mask=m_n)


@triton.jit(do_not_specialize=("count", "parts"))
def thin_sum_kernel(p_parts, p_out, count, parts, BLOCK: tl.constexpr):
    """Add the parts [parts, count] in their order, so that equal inputs give equal bits."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < count
    count_64 = tl.full([], 0, tl.int64) + count
    b_square = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        b_square += tl.load(p_parts + o + part * count_64, mask=m, other=0.0)
    tl.store(p_out + o, b_square, mask=m)


def config(rows: int, memories: int, rank: int, exact: bool) -> tuple[int, int, int, int, int]:
    """Blocks, warps and stages: by the number of tokens, and by whether whole rows of U would fill the device."""
    if rows <= 16:
        return SMALL
    if exact:
        return MEDIUM_FP32
    if triton.cdiv(rows, 32) * memories < ENOUGH:
        return MEDIUM
    return LARGE[min(128, max(32, triton.next_power_of_2(rank)))]


def leverage(a: Tensor, columns: Tensor, bounds: Tensor, factors: Tensor) -> Tensor:
    """[J, N] fp32 of `wise_kernels.leverage`; a and factors of any strides and floating dtypes up to fp32."""
    memories, rows, rank = bounds.shape[0] - 1, a.shape[0], factors.shape[1]
    out = torch.empty(memories, rows, dtype=torch.float32, device=a.device)
    if out.numel() == 0 or rank == 0:
        return out.zero_()
    exact = a.dtype not in (torch.float16, torch.bfloat16)
    block_n, block_k, block_r, num_warps, num_stages = config(rows, memories, rank, exact)
    parts = triton.cdiv(rank, block_r)
    squares = out if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=a.device)
    columns = columns.contiguous()
    with guard(a):
        thin_fwd_kernel[(triton.cdiv(rows, block_n), memories, parts)](
            a, columns, bounds, factors, squares, rows, rank, *a.stride(), *factors.stride(),
            PRECISION="ieee" if exact else "tf32",
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        if parts > 1:
            grid = (triton.cdiv(out.numel(), BLOCK_SUM),)
            thin_sum_kernel[grid](squares, out, out.numel(), parts, BLOCK=BLOCK_SUM)
    return out


def aot_cases() -> list[AotCase]:
    """Every block size in the dtypes it is launched for."""
    cases = []
    shipped = [("tf32", "bf16", c) for c in (SMALL, MEDIUM, *LARGE.values())] + [
        ("ieee", "fp32", c) for c in (SMALL, MEDIUM_FP32)
    ]
    for precision, dtype, (block_n, block_k, block_r, num_warps, num_stages) in shipped:
        constexprs = {"PRECISION": precision, "s_af": 1, "s_fr": 1}
        constexprs |= {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": block_r}
        pointers = {"p_a": f"*{dtype}", "p_columns": "*i64", "p_bounds": "*i64", "p_factors": "*fp32"}
        pointers |= {"p_out": "*fp32"}
        signature = {
            name: "constexpr" if name in constexprs else pointers.get(name, "i32") for name in thin_fwd_kernel.arg_names
        }
        divisible = tuple(n for n in (*pointers, "s_an", "s_fk") if n not in constexprs)
        cases.append(AotCase(
            f"leverage/{block_n}x{block_r}x{block_k}/{dtype}", thin_fwd_kernel,
            signature, constexprs, num_warps, num_stages, "mma" if precision == "tf32" else None, divisible,
        ))  # fmt: skip
    signature = {"p_parts": "*fp32", "p_out": "*fp32", "count": "i32", "parts": "i32", "BLOCK": "constexpr"}
    meta = {"BLOCK": BLOCK_SUM}
    cases.append(AotCase("leverage/sum", thin_sum_kernel, signature, meta, divisible=("p_parts", "p_out")))
    return cases
