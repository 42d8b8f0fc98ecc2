"""route on a device. norms [J, N] and prompt_mask [B, T], N = B T, give scores [B, J] (mean or max over the prompt, and
that over the root of the mean of leverage [J, N] where there is one) and choice [B]: the first argmax_j of
score_j / eps_j over the memories above their eps_j.

One launch while a sequence is small: a program reduces all J memories of a sequence and chooses. Long or wide ones are
reduced by a program for each (sequence, few memories) and a second launch of one program a sequence chooses.
Bound: reading norms (and leverage), J N (4 or 8) bytes; below about 1 MB the launch itself, some 2 us: 2.2
us for one memory on an H100.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..route import LEAST
from .launch import SIZES, AotCase, dependent, guard, wait_for_inputs

# A program that chooses holds all memories of its sequence: (most memories, BLOCK_J, BLOCK_T).
WHOLE = ((1, 1, 1024), (4, 4, 256), (16, 16, 64), (64, 64, 32))
# Elements that one program reduces before a second launch pays.
WHOLE_ELEMENTS = 1 << 15
SPLIT_J, SPLIT_T = 2, 1024
CHOOSE_J = 128
NUM_WARPS = 4


@triton.jit
def best_of(b_rank, b_open, o_j, best, chosen):
    """Update the largest rank so far and the memory chosen by it, -1 where that memory is not open."""
    # A NaN never wins: comparisons with it are false in the definition.
    b_rank = tl.where(b_rank == b_rank, b_rank, float("-inf"))
    top = tl.max(b_rank, 0)
    # The first of equals, and an earlier block keeps a tie.
    first = tl.min(tl.where(b_rank == top, o_j, 2147483647), 0)
    opened = tl.max(tl.where((o_j == first) & b_open, 1, 0), 0)
    chosen = tl.where(top > best, tl.where(opened > 0, first, -1), chosen)
    return tl.maximum(best, top), chosen


@triton.jit
def rank_of(b_score, p_thresholds, o_j, m_j):
    """By what memories compete, and which are in scope."""
    b_eps = tl.load(p_thresholds + o_j, mask=m_j, other=float("inf")).to(tl.float32)
    b_open = m_j & (b_score > b_eps)
    # Closed memories drop out, so 0 / 0 cannot compete; rounded as on the host, so equal ratios tie there and here.
    return tl.where(b_open, tl.div_rn(b_score, tl.where(b_open, b_eps, 1.0)), float("-inf")), b_open


@triton.jit
def spread_of(b_leverage, LEAST: tl.constexpr):
    """What a score is divided by, from the mean leverage; rounded as on the host."""
    return tl.sqrt_rn(tl.maximum(b_leverage, LEAST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def reduce_tokens(
    p_x,
    p_mask,
    tokens,
    o_j,
    m_j,
    base,
    s_xj,
    s_xn,
    s_mt,
    MAX: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Mean or max of x[o_j, base + t] over the prompt tokens t: [BLOCK_J] fp32, 0 for an empty prompt."""
    b_acc = tl.zeros([BLOCK_J, BLOCK_T], tl.float32)
    b_bad = tl.zeros([BLOCK_J, BLOCK_T], tl.int32)
    b_count = tl.zeros([BLOCK_T], tl.int32)
    for t in range(0, tokens, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = tl.load(p_mask + o_t * s_mt, mask=o_t < tokens, other=0) != 0
        # Padding is not even read: it may hold NaN.
        p_tile = p_x + o_j[:, None] * s_xj + (base + o_t)[None, :] * s_xn
        b_x = tl.load(p_tile, mask=m_j[:, None] & m_t[None, :], other=0.0).to(tl.float32)
        b_count += m_t.to(tl.int32)
        if MAX:
            b_bad |= (b_x != b_x).to(tl.int32)
            b_acc = tl.maximum(b_acc, b_x)
        else:
            b_acc += b_x
    if MAX:
        # Hardware maxima drop NaN; the definition's maximum does not.
        return tl.where(tl.max(b_bad, 1) > 0, float("nan"), tl.max(b_acc, 1))
    return tl.div_rn(
        tl.sum(b_acc, 1), tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32) + tl.zeros([BLOCK_J], tl.float32)
    )


@triton.jit(do_not_specialize=SIZES)
def route_fwd_kernel(
    p_norms, p_mask, p_thresholds, p_leverage, p_scores, p_spread, p_choice,
    memories, tokens, s_nj, s_nn, s_mb, s_mt, s_lj, s_ln, s_tb,
    MAX: tl.constexpr, LEVERAGE: tl.constexpr, KEEP: tl.constexpr, CHOOSE: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_J memories for a sequence, and what they were divided by if that is to be kept; with CHOOSE, of
    all of them, and the choice."""
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    o_j = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    m_j = o_j < memories
    p_mask += b * s_mb
    base = b * tokens
    b_score = reduce_tokens(p_norms, p_mask, tokens, o_j, m_j, base, s_nj, s_nn, s_mt, MAX, BLOCK_J, BLOCK_T)
    if LEVERAGE:
        b_mean = reduce_tokens(p_leverage, p_mask, tokens, o_j, m_j, base, s_lj, s_ln, s_mt, False, BLOCK_J, BLOCK_T)
        b_spread = spread_of(b_mean, LEAST)
        b_score = tl.div_rn(b_score, b_spread)
        if KEEP:
            tl.store(p_spread + b * memories + o_j, b_spread, mask=m_j)
    tl.store(p_scores + b * memories + o_j, b_score, mask=m_j)
    if CHOOSE:
        b_rank, b_open = rank_of(b_score, p_thresholds + b * s_tb, o_j, m_j)
        _, chosen = best_of(b_rank, b_open, o_j, float("-inf"), -1)
        tl.store(p_choice + b, chosen.to(tl.int64))


@triton.jit(do_not_specialize=SIZES)
def choose_fwd_kernel(
    p_scores, p_states, p_thresholds, p_choice, memories, s_tb, STATES: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The choice of a sequence from its scores [B, J]; with STATES, among those not 0."""
    b = tl.program_id(0).to(tl.int64)
    p_thresholds += b * s_tb
    best = float("-inf")
    chosen = tl.full([], -1, tl.int64)
    for j in range(0, memories, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J).to(tl.int64)
        m_j = o_j < memories
        at = b * memories + o_j
        b_score = tl.load(p_scores + at, mask=m_j, other=0.0)
        if STATES:
            m_j = m_j & (tl.load(p_states + at, mask=m_j, other=0) != 0)
        b_rank, b_open = rank_of(b_score, p_thresholds, o_j, m_j)
        best, chosen = best_of(b_rank, b_open, o_j, best, chosen)
    tl.store(p_choice + b, chosen)


def config(memories: int, tokens: int) -> tuple[bool, int, int]:
    """(one launch, BLOCK_J, BLOCK_T)."""
    if memories * tokens <= WHOLE_ELEMENTS:
        for most, block_j, block_t in WHOLE:
            if memories <= most:
                return True, block_j, block_t
    return False, SPLIT_J, SPLIT_T


def by_sequence(thresholds: Tensor) -> int:
    """Elements from a sequence's thresholds, contiguous [J] or [B, J], to the next one's."""
    return thresholds.shape[1] if thresholds.dim() == 2 else 0


def score(
    norms: Tensor, mask: Tensor, thresholds: Tensor, leverage: Tensor | None, maximum: bool,
    whole: bool, block_j: int, block_t: int, keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """scores [B, J], what they were divided by [B, J] if it is kept, and choice [B], written if one launch does;
    thresholds are contiguous."""
    memories, (batch, tokens) = norms.shape[0], mask.shape
    scores = torch.empty(batch, memories, dtype=torch.float32, device=norms.device)
    spread = torch.empty_like(scores) if keep and leverage is not None else None
    choice = torch.empty(batch, dtype=torch.int64, device=norms.device)
    strides = (0, 0) if leverage is None else leverage.stride()
    with guard(norms):
        route_fwd_kernel[(batch, triton.cdiv(memories, block_j))](
            norms, mask, thresholds, leverage, scores, spread, choice,
            memories, tokens, *norms.stride(), *mask.stride(), *strides, by_sequence(thresholds),
            MAX=maximum, LEVERAGE=leverage is not None, KEEP=spread is not None, CHOOSE=whole, LEAST=LEAST,
            BLOCK_J=block_j, BLOCK_T=block_t, num_warps=NUM_WARPS, **dependent(norms),
        )  # fmt: skip
    return scores, spread, choice


def choose(scores: Tensor, states: Tensor | None, thresholds: Tensor, choice: Tensor) -> None:
    """Write choice [B] from scores [B, J], states [B, J] int32 or None and contiguous thresholds."""
    with guard(scores):
        choose_fwd_kernel[(scores.shape[0],)](
            scores, states, thresholds, choice, scores.shape[1], by_sequence(thresholds),
            STATES=states is not None, BLOCK_J=CHOOSE_J, num_warps=1,
        )  # fmt: skip


def route(
    norms: Tensor, mask: Tensor, thresholds: Tensor, leverage: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """scores [B, J] fp32 and choice [B] int64 of `wise_kernels.route`; inputs of any strides."""
    memories, (batch, tokens) = norms.shape[0], mask.shape
    if memories == 0 or batch == 0:
        scores = torch.empty(batch, memories, dtype=torch.float32, device=norms.device)
        return scores, torch.full((batch,), -1, dtype=torch.int64, device=norms.device)
    thresholds = thresholds.contiguous()
    whole, block_j, block_t = config(memories, tokens)
    scores, _, choice = score(norms, mask, thresholds, leverage, reduction == "max", whole, block_j, block_t)
    if not whole:
        choose(scores, None, thresholds, choice)
    return scores, choice


def aot_cases() -> list[AotCase]:
    """Every block size, with and without leverage; the reduction changes a few instructions."""
    cases = []
    blocks = [(True, j, t) for _, j, t in WHOLE] + [(False, SPLIT_J, SPLIT_T)]
    # Sketched routing scores in any block size and chooses later.
    for whole, block_j, block_t in [*blocks, *((False, j, t) for _, j, t in WHOLE)]:
        for leverage in (False, True):
            pointers = dict.fromkeys(("p_norms", "p_thresholds", "p_scores"), "*fp32") | {"p_choice": "*i64"}
            pointers |= {"p_mask": "*i1", "p_leverage": "*fp32" if leverage else None}
            pointers["p_spread"] = "*fp32" if leverage and not whole else None
            name = f"route/{block_j}x{block_t}/{'whole' if whole else 'scores'}/{'leverage' if leverage else 'norm'}"
            cases.append(_case(name, route_fwd_kernel, pointers, NUM_WARPS, {
                "MAX": not leverage, "LEVERAGE": leverage, "KEEP": leverage and not whole, "CHOOSE": whole,
                "LEAST": LEAST, "BLOCK_J": block_j, "BLOCK_T": block_t, "PDL": False,
            }))  # fmt: skip
    for states in (False, True):
        pointers = dict.fromkeys(("p_scores", "p_thresholds"), "*fp32") | {"p_choice": "*i64"}
        pointers["p_states"] = "*i32" if states else None
        name = f"route/choose/{'contenders' if states else 'all'}"
        cases.append(_case(name, choose_fwd_kernel, pointers, 1, {"STATES": states, "BLOCK_J": CHOOSE_J}))
    return cases


def _case(name: str, kernel, pointers: dict, num_warps: int, constexprs: dict) -> AotCase:
    signature, values = {}, dict(constexprs)
    for argument in kernel.arg_names:
        given = pointers.get(argument, "constexpr" if argument in constexprs else "i32")
        signature[argument] = given or "constexpr"
        if given is None:
            values[argument] = None
    divisible = tuple(a for a, kind in signature.items() if kind.startswith("*"))
    return AotCase(name, kernel, signature, values, num_warps, divisible=divisible)
