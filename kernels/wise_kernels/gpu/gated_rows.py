"""What the gated ops share: which rows a tile holds and which memory each of them chose, the order that brings the
sequences of a memory together, and the addition of responses that are known, y_n += side[choice[n // T], n].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, AotCase, dependent, guard, wait_for_inputs

ORDER_BLOCK = 64
SIDE_N, SIDE_O = 4, 1024


@triton.jit
def columns_at(p_columns, o_k, high):
    """Columns o_k of a memory that ends at `high`."""
    return tl.load(p_columns + o_k, mask=o_k < high, other=0)


@triton.jit
def active_at(p_rows, b_column, m_n, o_k, high, s_af):
    """a[rows, columns] as [BLOCK_N, BLOCK_K]: single elements, which no asynchronous copy can take. So a loop asks for
    them one step before it needs them, and for their columns one step before that."""
    return tl.load(p_rows + (b_column * s_af)[None, :], mask=m_n[:, None] & (o_k < high)[None, :], other=0.0)


@triton.jit
def rows_of(p_choice, p_order, o_p, rows, tokens, memories, ORDER: tl.constexpr):
    """Row and chosen memory (-1: none) at positions o_p; position p is token p % T of the (p // T)-th sequence."""
    m_p = o_p < rows
    b_n, b_sequence = o_p.to(tl.int64), (o_p // tokens).to(tl.int64)
    if ORDER:
        b_n -= b_sequence * tokens
        b_sequence = tl.load(p_order + b_sequence, mask=m_p, other=0)
        b_n += b_sequence * tokens
    b_j = tl.load(p_choice + b_sequence, mask=m_p, other=-1).to(tl.int32)
    # A memory that is not in the bank would send the reads anywhere.
    return b_n, tl.where(b_j < memories, b_j, -1)


@triton.jit(do_not_specialize=SIZES)
def order_fwd_kernel(p_choice, p_order, batch, memories, BLOCK: tl.constexpr):
    """order [B]: sequences sorted by memory, those out of scope last, by counting who comes before; B^2 comparisons."""
    o_s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_key = _key(p_choice, o_s, batch, memories)
    b_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch, BLOCK):
        o_t = start + tl.arange(0, BLOCK)
        b_other = _key(p_choice, o_t, batch, memories)
        b_less = b_other[None, :] < b_key[:, None]
        b_equal = (b_other[None, :] == b_key[:, None]) & (o_t[None, :] < o_s[:, None])
        b_before += tl.sum((b_less | b_equal).to(tl.int32), 1)
    tl.store(p_order + b_before, o_s.to(tl.int64), mask=o_s < batch)


@triton.jit
def _key(p_choice, o_s, batch, memories):
    b_j = tl.load(p_choice + o_s, mask=o_s < batch, other=-1).to(tl.int32)
    b_j = tl.where((b_j >= 0) & (b_j < memories), b_j, memories)
    return tl.where(o_s < batch, b_j, memories + 1)


@triton.jit(do_not_specialize=SIZES)
def side_fwd_kernel(
    p_y, p_side, p_choice, rows, tokens, memories, outputs, s_yn, s_yo, s_sj, s_sn, s_so,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bound by bandwidth: y twice and one response of the rows in scope."""
    wait_for_inputs(PDL)
    o_p = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_n, b_j = rows_of(p_choice, p_choice, o_p, rows, tokens, memories, False)
    if tl.max(b_j, 0) >= 0:
        o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
        m = (b_j >= 0)[:, None] & (o_o < outputs)[None, :]
        p_row = p_side + b_j.to(tl.int64) * s_sj + b_n * s_sn
        b_side = tl.load(p_row[:, None] + (o_o * s_so)[None, :], mask=m, other=0.0).to(tl.float32)
        p_tile = p_y + (b_n * s_yn)[:, None] + (o_o * s_yo)[None, :]
        b_y = tl.load(p_tile, mask=m, other=0.0).to(tl.float32)
        tl.store(p_tile, (b_y + b_side).to(p_y.dtype.element_ty), mask=m)


def ordered(choice: Tensor, memories: int) -> Tensor:
    """order [B] int64 of sequences by chosen memory, stable, those out of scope last."""
    order = torch.empty_like(choice)
    grid = (triton.cdiv(choice.shape[0], ORDER_BLOCK),)
    order_fwd_kernel[grid](choice, order, choice.shape[0], memories, BLOCK=ORDER_BLOCK)
    return order


def add_side(y: Tensor, side: Tensor, choice: Tensor) -> None:
    """y [N, O] += side [J, N, O] of the chosen memories; any strides."""
    memories, (rows, outputs) = side.shape[0], y.shape
    if memories == 0 or y.numel() == 0:
        return
    with guard(y):
        side_fwd_kernel[(triton.cdiv(rows, SIDE_N), triton.cdiv(outputs, SIDE_O))](
            y, side, choice.contiguous(), rows, rows // choice.shape[0], memories, outputs, *y.stride(), *side.stride(),
            BLOCK_N=SIDE_N, BLOCK_O=SIDE_O, **dependent(y),
        )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Every configuration that is launched."""
    cases = []
    for kind in ("*bf16", "*fp16", "*fp32"):
        types = {"p_y": kind, "p_side": kind, "p_choice": "*i64"}
        meta = {"s_yo": 1, "s_so": 1, "BLOCK_N": SIDE_N, "BLOCK_O": SIDE_O, "PDL": False}
        signature = {a: "constexpr" if a in meta else types.get(a, "i32") for a in side_fwd_kernel.arg_names}
        divisible = (*types, "outputs", "s_yn", "s_sn", "s_sj")
        cases.append(AotCase(f"gated_add/side/{kind[1:]}", side_fwd_kernel, signature, meta, divisible=divisible))
    signature = {"p_choice": "*i64", "p_order": "*i64", "batch": "i32", "memories": "i32", "BLOCK": "constexpr"}
    order = AotCase("gated_add/order", order_fwd_kernel, signature, {"BLOCK": ORDER_BLOCK})
    return [*cases, order]
