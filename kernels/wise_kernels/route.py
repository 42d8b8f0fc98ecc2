"""Routing of B sequences of T tokens to J memories from token norms [J, N], N = B T: score_j = mean (or max) of norms_j
over the sequence's prompt tokens (eq. 3), over the root of its mean leverage_j [J, N] where that is given, then top-1
(eq. 6): j* = argmax_j score_j / eps_j among those above eps_j. Thresholds are those of all sequences or of each, where
infinity closes a memory. All on the device.
"""

import numpy as np
import torch
from torch import Tensor

from .checks import direct

REDUCTIONS = ("mean", "max")
LEAST = 1e-30  # a leverage that scores are divided by


def reduce_tokens(tokens: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Mean or max of tokens [J, N] over each row of mask [B, T]: [B, J] fp32, 0 where a row is empty."""
    # where, not a product: padding may hold NaN or infinity.
    kept = torch.where(mask, tokens.float().unflatten(1, mask.shape), 0.0)
    if reduction == "mean":
        return (kept.sum(-1) / mask.sum(-1).clamp_min(1)).t()
    if mask.shape[1] == 0:
        return kept.new_zeros(mask.shape[0], tokens.shape[0])
    return kept.amax(-1).t()


def spread(leverage: Tensor, mask: Tensor) -> Tensor:
    """[B, J] root of the mean leverage of each sequence; its maximum would be that of one new word."""
    return reduce_tokens(leverage, mask, "mean").clamp_min(LEAST).sqrt()


@torch.library.custom_op("wise::route", mutates_args=())
def _route(
    norms: Tensor, prompt_mask: Tensor, thresholds: Tensor, leverage: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    scores = reduce_tokens(norms, prompt_mask, reduction).contiguous()
    # argmax has no answer over no memories.
    if norms.shape[0] == 0:
        return scores, _nothing(norms, prompt_mask)
    if leverage is not None:
        scores = scores / spread(leverage, prompt_mask)
    return scores, choose(scores, scores > thresholds.float(), thresholds)


def _nothing(norms: Tensor, prompt_mask: Tensor) -> Tensor:
    return torch.full((prompt_mask.shape[0],), -1, dtype=torch.int64, device=norms.device)


def choose(scores: Tensor, in_scope: Tensor, thresholds: Tensor) -> Tensor:
    """[B] the memory of the largest score over threshold among those in scope [B, J], -1 where there is none."""
    # Closed memories drop out first, so 0 / 0 at a zero threshold cannot win the argmax as NaN.
    rank = torch.where(in_scope, scores / thresholds.float(), -torch.inf)
    best = rank.argmax(-1, keepdim=True)
    # argmax takes the first of equals, which makes ties go to the lower index on every device.
    return torch.where(in_scope.gather(1, best), best, -1).squeeze(1)


@_route.register_kernel("cpu")
def _route_cpu(norms, prompt_mask, thresholds, leverage, reduction):
    # numpy: an operation on arrays as small as these takes it a quarter of the time.
    if norms.shape[0] == 0 or prompt_mask.shape[0] == 0:
        return norms.new_zeros(prompt_mask.shape[0], norms.shape[0], dtype=torch.float32), _nothing(norms, prompt_mask)
    mask = prompt_mask.numpy()
    count = np.maximum(mask.sum(1), 1).astype(np.float32)[:, None]
    with np.errstate(all="ignore"):
        scores = _reduce(norms, mask, count, reduction)
        if leverage is not None:
            scores = scores / np.sqrt(np.maximum(_reduce(leverage, mask, count, "mean"), np.float32(LEAST)))
        eps = _numbers(thresholds)
        in_scope = scores > eps
        rank = np.where(in_scope, scores / eps, np.float32(-np.inf))
    best, every = rank.argmax(1), np.arange(len(rank))
    choice = np.where(in_scope[every, best], best, -1)
    return torch.from_numpy(np.ascontiguousarray(scores)), torch.from_numpy(choice)


def _numbers(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).float().numpy()


def _reduce(tokens: Tensor, mask: np.ndarray, count: np.ndarray, reduction: str) -> np.ndarray:
    """`reduce_tokens` on the CPU; `count` [B, 1] tokens of each sequence, at least 1."""
    found = _numbers(tokens).reshape(len(tokens), *mask.shape)
    if reduction == "max":
        return np.where(mask, found, np.float32(0)).max(2, initial=0).T
    found, weights = found.transpose(1, 0, 2), mask[:, :, None].astype(np.float32)
    total = np.matmul(found, weights)[:, :, 0]
    if not np.isfinite(total).all():
        # Padding may hold NaN or infinity, which a product keeps; else it gives the same bits in a third of the time.
        total = np.matmul(np.where(mask[:, None], found, np.float32(0)), weights)[:, :, 0]
    return total / count


@_route.register_kernel("cuda")
def _(norms, prompt_mask, thresholds, leverage, reduction):
    from .gpu import route

    return route.route(norms, prompt_mask, thresholds, leverage, reduction)


@_route.register_fake
def _(norms, prompt_mask, thresholds, leverage, reduction):
    batch = prompt_mask.shape[0]
    scores = norms.new_empty(batch, norms.shape[0], dtype=torch.float32)
    return scores, norms.new_empty(batch, dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    norms, mask, _, leverage, ctx.reduction = inputs
    ctx.save_for_backward(norms, mask, leverage)


def _backward(ctx, grad_scores, grad_choice):
    norms, mask, leverage = ctx.saved_tensors
    if leverage is not None:
        grad_scores = grad_scores / spread(leverage, mask)
    share = mask.unsqueeze(0)
    if ctx.reduction == "max":
        # Equal maxima share the gradient, as in torch.amax.
        largest = reduce_tokens(norms, mask, "max")
        share = share & (norms.float().unflatten(1, mask.shape) == largest.t().unsqueeze(-1))
    share = share / share.sum(-1, keepdim=True).clamp_min(1)
    grad = (grad_scores.t().unsqueeze(-1) * share).flatten(1).to(norms.dtype)
    return grad, None, None, None, None


_route.register_autograd(_backward, setup_context=_setup_context)


def check_route(
    memories: int, tokens: int, prompt_mask: Tensor, thresholds: Tensor, leverage: Tensor | None, reduction: str
) -> None:
    """Raise ValueError unless these route `tokens` tokens to `memories` memories, as `route` describes them."""
    if prompt_mask.dim() != 2 or prompt_mask.dtype != torch.bool or prompt_mask.numel() != tokens:
        raise ValueError(
            f"prompt_mask must be bool [B, T] with B T = {tokens}, got {prompt_mask.dtype} {tuple(prompt_mask.shape)}"
        )
    batch, each = prompt_mask.shape[0], thresholds.dim() == 2
    if thresholds.dim() not in (1, 2) or thresholds.shape[-1] != memories or (each and thresholds.shape[0] != batch):
        raise ValueError(f"thresholds must be [{memories}] or [{batch}, {memories}], got {tuple(thresholds.shape)}")
    if leverage is not None and tuple(leverage.shape) != (memories, tokens):
        raise ValueError(f"leverage must be [{memories}, {tokens}], got {tuple(leverage.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def route(
    norms: Tensor,
    prompt_mask: Tensor,
    thresholds: Tensor,
    leverage: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Score every sequence under every memory and choose at most one memory for it (eqs. 3 and 6).

    The scores are differentiable in `norms` (the margins of eq. 5 are made of them); the choice is not.

    Args:
        norms: [J, N] floating point, ||a_t D_j^T||_2 by token, sequence b in columns b*T:(b+1)*T. Not negative.
        prompt_mask: [B, T] bool, N = B T; True at prompt tokens. Padding never counts, whatever it holds.
        thresholds: eps_j >= 0, [J] or by sequence [B, J]. Infinity closes a memory: it is not chosen, whatever
            its tensors hold.
        leverage: [J, N] (see `leverage`). With it a score is in standard errors: over the root of the sequence's mean
            leverage, so that what a memory was not taught counts little, however loud. None scores as the paper does.
        reduction: "mean" or "max", over the prompt tokens, for the norms.

    Returns:
        scores [B, J] fp32 (0 for an empty prompt) and choice [B] int64, -1 for the main memory. Ties go to the lower
        index.

    Raises ValueError for shapes or dtypes other than these, or an unknown reduction.
    """
    if norms.dim() != 2 or not norms.is_floating_point():
        raise ValueError(f"norms must be a floating point [J, N], got {norms.dtype} {tuple(norms.shape)}")
    check_route(*norms.shape, prompt_mask, thresholds, leverage, reduction)
    run = _route_cpu if direct(norms, prompt_mask, thresholds, leverage) else _route
    return run(norms, prompt_mask, thresholds, leverage, reduction)
