"""The edit loss: token NLL of the target, and the routing margins of eq. 5."""

from __future__ import annotations

import torch
from torch import Tensor

from wise_fast.config import WiseConfig


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in fp32, [M], from [M, vocabulary] logits."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def restricted_nll(logits: Tensor, labels: Tensor, rest: Tensor) -> Tensor:
    """`token_nll` when only part of the vocabulary was computed: `rest` [M] is the log-sum-exp of the other logits.

    The rest is taken as it was when last computed in full; it has no gradient.
    """
    logits = logits.float()
    total = torch.logaddexp(logits.logsumexp(-1), rest)
    return total - logits.gather(1, labels[:, None])[:, 0]


def row_mean(values: Tensor, row: Tensor, rows: int, weight: Tensor | None = None) -> Tensor:
    """Mean of [M] values over the entries of each row, [rows], by `weight` [M] where given (positive); a row without
    entries gives 0."""
    if weight is None:
        weight = torch.ones_like(values)
    total = values.new_zeros(rows).index_add(0, row, values * weight)
    count = values.new_zeros(rows).index_add(0, row, weight)
    return total / torch.where(count > 0, count, 1.0)


def answer_weight(row: Tensor, first: float) -> Tensor:
    """Weight of each label [M] in its row's NLL, given the rows of the labels, in order: `first` for the first of a
    row, 1 for the others.

    The first token of an answer carries the edit: under teacher forcing it is read off the prompt alone, while the
    others follow from the right tokens before them.
    """
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    return torch.where(begins, first, 1.0)


def row_max(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Largest of [M] values, none of them negative, over the entries of each row, [rows]; 0 for a row without any."""
    return values.new_zeros(rows).scatter_reduce(0, row, values, "amax")


def scores(response: Tensor, prompt_mask: Tensor, reduction: str) -> Tensor:
    """Routing score of each sequence (eq. 3), [B], from side responses [B*T, d_out] and the prompt mask [B, T].

    Differentiable everywhere: the norm at zero is smoothed, far below what a score can resolve.
    """
    norms = (response.square().sum(-1) + 1e-12).sqrt().view(prompt_mask.shape)
    if reduction == "max":
        return norms.masked_fill(~prompt_mask, 0).amax(1)
    return (norms * prompt_mask).sum(1) / prompt_mask.sum(1).clamp_min(1)


def edit_margin(score: Tensor, config: WiseConfig, unit: float) -> Tensor:
    """`max(0, beta - s_edit)` of eq. 5, per row."""
    return (config.beta - score / unit).clamp_min(0)


def irrelevant_margin(score: Tensor, config: WiseConfig, unit: float) -> Tensor:
    """`max(0, s_irr - alpha)` of eq. 5, per irrelevant text."""
    return (score / unit - config.alpha).clamp_min(0)


def gap_margin(edit: Tensor, irrelevant: Tensor, config: WiseConfig, unit: float) -> Tensor:
    """`max(0, gamma - (s_edit - s_irr))` of eq. 5."""
    return (config.gamma - (edit - irrelevant) / unit).clamp_min(0)
