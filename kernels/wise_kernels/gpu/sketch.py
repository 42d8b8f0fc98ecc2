"""sketched_route on a device. Rough norms [J, N] are a dense product with the sketches [F, J s] of all memories
(`..sketch.rough_norms`) and give rough scores [B, J]; `contend` finds the pairs of sequence and memory that their bound
leaves open; `exact` computes ||a_S V_j|| for the rows of those pairs alone; `settle` reduces them to scores, and the
choice is made among the contenders.

Nothing comes back to the host: `exact` and `settle` are launched for all pairs, and a program whose rows have none open
is done after reading their states, 4 bytes a row and memory. Sketching is bound by the matrix units, 2 N F J s FLOP: on
an H100 61 us for 2048 rows of Llama-2-7B and 64 memories, s 16, beside a plain projection of 230 us. An open pair adds
reading its memory, or 2 T |S_j| O FLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sketch import rough_norms
from .gated_add import POINTERS
from .gated_rows import active_at, columns_at
from .launch import SIZES, AotCase, guard, interpreted
from .route import by_sequence, choose, config, score

# BLOCK_N, BLOCK_O, BLOCK_K, num_warps, num_stages
FEW, MANY = (16, 32, 128, 4, 4), (64, 128, 64, 8, 3)
FEW_FP32, MANY_FP32 = (16, 32, 32, 4, 4), (32, 32, 32, 4, 3)
BLOCK_J, SETTLE_T = 32, 256


@triton.jit(do_not_specialize=SIZES)
def contend_fwd_kernel(p_states, p_scores, p_thresholds, low, high, memories, s_tb, BLOCK_J: tl.constexpr):
    """states [B, J] of a sequence: 0 the memory cannot be chosen, 2 it is, 1 its exact score decides."""
    first = tl.program_id(0).to(tl.int64) * memories
    p_thresholds += tl.program_id(0).to(tl.int64) * s_tb
    sure = float("-inf")
    for j in range(0, memories, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J).to(tl.int64)
        m_j = o_j < memories
        b_score = tl.load(p_scores + first + o_j, mask=m_j, other=0.0)
        b_eps = tl.load(p_thresholds + o_j, mask=m_j, other=float("inf")).to(tl.float32)
        b_sure = b_score * low > b_eps
        b_ratio = tl.div_rn(b_score, tl.where(b_sure, b_eps, 1.0)) * low
        sure = tl.maximum(sure, tl.max(tl.where(b_sure, b_ratio, float("-inf")), 0))
    rivals = 0
    for turn in range(2):
        for j in range(0, memories, BLOCK_J):
            o_j = j + tl.arange(0, BLOCK_J).to(tl.int64)
            m_j = o_j < memories
            b_score = tl.load(p_scores + first + o_j, mask=m_j, other=0.0)
            b_eps = tl.load(p_thresholds + o_j, mask=m_j, other=float("inf")).to(tl.float32)
            b_possible = b_score * high > b_eps
            b_ratio = tl.div_rn(b_score, tl.where(b_possible, b_eps, 1.0)) * high
            b_possible = b_possible & (b_ratio >= sure)
            if turn == 0:
                rivals += tl.sum(b_possible.to(tl.int32), 0)
            else:
                b_settled = (b_score * low > b_eps) & (rivals == 1)
                tl.store(p_states + first + o_j, tl.where(b_possible, tl.where(b_settled, 2, 1), 0), mask=m_j)


@triton.jit(do_not_specialize=SIZES)
def exact_fwd_kernel(
    p_squares, p_a, p_values, p_columns, p_bounds, p_states, rows, tokens, memories, outputs, s_an, s_af, s_vr, s_vo,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """squares [tiles, J, N]: the sum over a tile of outputs of (a_S V_j)^2, for rows whose state under j is 1."""
    o_p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = o_p.to(tl.int64)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    m_o = o_o < outputs
    p_rows = p_a + (o_n * s_an)[:, None]
    p_row = p_states + (o_p // tokens).to(tl.int64) * memories
    for start in range(0, memories, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < memories
        b_state = tl.load(p_row[:, None] + o_j[None, :], mask=(o_n < rows)[:, None] & m_j[None, :], other=0)
        b_left = tl.where(tl.max((b_state == 1).to(tl.int32), 0) > 0, o_j, -1)
        j = tl.max(b_left, 0)
        while j >= 0:
            m_n = tl.load(p_row + j, mask=o_n < rows, other=0) == 1
            low, high = tl.load(p_bounds + j), tl.load(p_bounds + j + 1)
            b_acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
            o_k = low + tl.arange(0, BLOCK_K)
            b_next = active_at(p_rows, columns_at(p_columns, o_k, high), m_n, o_k, high, s_af)
            b_column = columns_at(p_columns, o_k + BLOCK_K, high)
            for k in range(low, high, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                m_k, b_a = o_k < high, b_next
                b_next = active_at(p_rows, b_column, m_n, o_k + BLOCK_K, high, s_af)
                b_column = columns_at(p_columns, o_k + 2 * BLOCK_K, high)
                p_tile = p_values + (o_k * s_vr)[:, None] + (o_o * s_vo)[None, :]
                b_v = tl.load(p_tile, mask=m_k[:, None] & m_o[None, :], other=0.0)
                if UPCAST:
                    b_a, b_v = b_a.to(tl.float32), b_v.to(tl.float32)
                b_acc = tl.dot(b_a, b_v, b_acc, input_precision="ieee")
            at = (tl.program_id(0).to(tl.int64) * memories + j) * rows + o_n
            tl.store(p_squares + at, tl.sum(b_acc * b_acc, 1), mask=m_n)
            b_left = tl.where(b_left == j, -1, b_left)
            j = tl.max(b_left, 0)


@triton.jit(do_not_specialize=SIZES)
def settle_fwd_kernel(
    p_scores, p_squares, p_mask, p_states, p_spread, rows, tokens, memories, tiles, s_mb, s_mt,
    MAX: tl.constexpr, LEVERAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The score of a sequence and memory from the squares of its tokens, where its state is 1."""
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tl.load(p_states + b * memories + j) == 1:
        b_acc = tl.zeros([BLOCK_T], tl.float32)
        b_bad = tl.zeros([BLOCK_T], tl.int32)
        b_count = tl.zeros([BLOCK_T], tl.int32)
        for t in range(0, tokens, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T).to(tl.int64)
            m_t = tl.load(p_mask + b * s_mb + o_t * s_mt, mask=o_t < tokens, other=0) != 0
            b_sum = tl.zeros([BLOCK_T], tl.float32)
            for tile in range(tiles):
                at = (tile * memories + j) * rows + b * tokens + o_t
                b_sum += tl.load(p_squares + at, mask=m_t, other=0.0)
            b_norm = tl.sqrt(b_sum)
            b_count += m_t.to(tl.int32)
            b_bad |= (b_norm != b_norm).to(tl.int32)
            b_acc = tl.maximum(b_acc, b_norm) if MAX else b_acc + b_norm
        if MAX:
            value = tl.where(tl.max(b_bad, 0) > 0, float("nan"), tl.max(b_acc, 0))
        else:
            value = tl.sum(b_acc, 0) / tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32)
        if LEVERAGE:
            value = value / tl.load(p_spread + b * memories + j)
        tl.store(p_scores + b * memories + j, value)


def tile(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """By the number of rows alone."""
    if dtype == torch.float32:
        return FEW_FP32 if rows <= 16 else MANY_FP32
    return FEW if rows <= 16 else MANY


def exact_scores(scores, spread, states, a, values, columns, bounds, mask, maximum: bool) -> None:
    """Replace scores [B, J] where states [B, J] are 1 by those of exact norms, over spread [B, J] or None."""
    (batch, tokens), memories, (rows, outputs) = mask.shape, scores.shape[1], (a.shape[0], values.shape[1])
    block_n, block_o, block_k, num_warps, num_stages = tile(rows, a.dtype)
    tiles = triton.cdiv(outputs, block_o)
    # A few KB a row for 64 memories, less than its activations; only what is open is ever written or read.
    squares = torch.empty(tiles, memories, rows, dtype=torch.float32, device=a.device)
    exact_fwd_kernel[(tiles, triton.cdiv(rows, block_n))](
        squares, a, values, columns, bounds, states, rows, tokens, memories, outputs, *a.stride(), *values.stride(),
        UPCAST=interpreted(), BLOCK_N=block_n, BLOCK_O=block_o, BLOCK_K=block_k, BLOCK_J=BLOCK_J,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    settle_fwd_kernel[(batch, memories)](
        scores, squares, mask, states, spread, rows, tokens, memories, tiles, *mask.stride(),
        MAX=maximum, LEVERAGE=spread is not None, BLOCK_T=SETTLE_T,
    )  # fmt: skip


def sketched_route(
    a: Tensor, values: Tensor, columns: Tensor, bounds: Tensor, sketched: Tensor, mask: Tensor, thresholds: Tensor,
    low: float, high: float, leverage: Tensor | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scores [B, J] and choice [B] of `wise_kernels.sketched_route`; bf16, fp16 or fp32, any strides."""
    memories, (batch, tokens), maximum = bounds.shape[0] - 1, mask.shape, reduction == "max"
    if memories == 0 or batch == 0:
        scores = torch.empty(batch, memories, dtype=torch.float32, device=a.device)
        return scores, torch.full((batch,), -1, dtype=torch.int64, device=a.device)
    columns, thresholds = columns.contiguous(), thresholds.contiguous()
    norms = rough_norms(a, sketched, memories)
    _, block_j, block_t = config(memories, tokens)
    scores, spread, choice = score(norms, mask, thresholds, leverage, maximum, False, block_j, block_t, keep=True)
    states = torch.empty(batch, memories, dtype=torch.int32, device=a.device)
    with guard(a):
        contend_fwd_kernel[(batch,)](
            states, scores, thresholds, low, high, memories, by_sequence(thresholds), BLOCK_J=BLOCK_J, num_warps=1
        )
        if tokens:
            exact_scores(scores, spread, states, a, values, columns, bounds, mask, maximum)
    choose(scores, states, thresholds, choice)
    return scores, choice


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []

    def case(name, kernel, types, meta, num_warps=4, num_stages=3, expect=None):
        signature = {n: "constexpr" if n in meta else types.get(n, "i32") for n in kernel.arg_names}
        divisible = (n for n, kind in signature.items() if kind.startswith("*") or n in ("outputs", "s_an", "s_vr"))
        cases.append(
            AotCase(f"sketch/{name}", kernel, signature, meta, num_warps, num_stages, expect, tuple(divisible))
        )

    types = {"p_states": "*i32", "p_scores": "*fp32", "p_thresholds": "*fp32", "low": "fp32", "high": "fp32"}
    case("contend", contend_fwd_kernel, types, {"BLOCK_J": BLOCK_J}, 1)
    for maximum in (False, True):
        types = {"p_scores": "*fp32", "p_squares": "*fp32", "p_mask": "*i1", "p_states": "*i32", "p_spread": "*fp32"}
        meta = {"MAX": maximum, "LEVERAGE": not maximum, "BLOCK_T": SETTLE_T} | ({"p_spread": None} if maximum else {})
        case(f"settle/{'max' if maximum else 'mean'}", settle_fwd_kernel, types, meta)
    for dtype, kind in POINTERS.items():
        for block_n, block_o, block_k, num_warps, num_stages in (tile(16, dtype), tile(17, dtype)):
            types = {"p_squares": "*fp32", "p_a": kind, "p_values": kind, "p_columns": "*i64", "p_bounds": "*i64"}
            types |= {"p_states": "*i32"}
            meta = {"s_af": 1, "s_vo": 1, "UPCAST": False, "BLOCK_N": block_n, "BLOCK_O": block_o}
            meta |= {"BLOCK_K": block_k, "BLOCK_J": BLOCK_J}
            expect = None if dtype == torch.float32 else "wgmma" if block_n >= 64 else "mma"
            name = f"exact/{block_n}x{block_o}/{kind[1:]}"
            case(name, exact_fwd_kernel, types, meta, num_warps, num_stages, expect)
    return cases
