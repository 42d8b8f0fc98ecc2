"""Scope by the last token: where a prompt ends, the model has put the question together.

A score is over what a memory does not know of the whole prompt. That tells an edit's paraphrases from other texts, but
hardly a question about one entity from the same question about another, where the model is small or names share words:
most of their tokens are known. The last token knows of all of them. So a sequence whose last prompt token is much newer
to a memory than its own edits' are has to be louder by as much to be in scope of it; and of several memories those to
which it is newer than to another have to be louder by as much. How new a token is to a memory is the root of its
leverage over the norm of the response: what is well known and loudly answered is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-6  # of a norm, and of a newness in units of its limit


def newness(leverage: Tensor, norm: Tensor) -> Tensor:
    """`sqrt(leverage / norm)` of tokens, any shape: how new they are to a memory."""
    return (leverage.clamp_min(0) / norm.clamp_min(_LEAST)).sqrt()


def last_of(mask: Tensor) -> Tensor:
    """[B] int64 place of each sequence's last prompt token in a [B, T] bool mask; 0 where it has none."""
    return ((torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).amax(1) - 1).clamp_min(0)


def narrowed(thresholds: Tensor, limits: Tensor, norms: Tensor, leverage: Tensor, mask: Tensor) -> Tensor:
    """Thresholds of each sequence, [B, J], given how new its last prompt token is to each memory.

    With n_j its newness over limit_j, `threshold_j max(1, n_j) n_j / min_i n_i`, the least over memories that are
    open to the sequence. On the device, no sync.

    Args:
        thresholds: [J], or [B, J]; infinite where a memory is closed.
        limits: [J], how new a last token may be before it counts; a memory of infinity is left as it is.
        norms, leverage: [J, B*T] of all tokens.
        mask: [B, T] bool, prompt tokens.
    """
    if mask.shape[1] == 0 or limits.shape[0] == 0:
        return thresholds
    place = last_of(mask)[None, :, None].expand(limits.shape[0], -1, 1)
    at, norm = (tokens.float().unflatten(1, mask.shape).gather(2, place)[..., 0].t() for tokens in (leverage, norms))
    new = (newness(at, norm) / limits).clamp_min(_LEAST)
    counts = limits.isfinite() & thresholds.isfinite()
    least = torch.where(counts, new, torch.inf).amin(1, keepdim=True)
    return torch.where(counts, thresholds * new.clamp_min(1.0) * (new / least), thresholds)
