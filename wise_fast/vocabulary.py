"""The part of a large vocabulary that edit steps compute.

With 262k tokens the LM head is the largest matmul there is, and nearly all of its probability sits on few tokens. The
whole head runs on the bare prompts, when a batch begins and when it ends; everything between uses the likeliest tokens
and keeps the rest's share of the partition function as last computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE_VOCABULARY = 16384  # up to here the whole head is computed at every step
LIKELY_TOKENS = 256  # per label position


@dataclass(frozen=True)
class Likely:
    """The part of the vocabulary that steps compute, since a large head costs more than the tail itself.

    Attributes:
        tokens: [V] int64 sorted, the likeliest tokens at every label position, and the labels.
        rest: [M] fp32, log-sum-exp of all other logits at each label position when last computed.
        places: [M] int64, where each label stands in `tokens`.
    """

    tokens: Tensor
    rest: Tensor
    places: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, more: Tensor, top: int = LIKELY_TOKENS) -> Likely:
        """From complete logits [M, vocabulary] and their labels [M]; `more` tokens are computed in any case."""
        tokens = torch.cat([logits.topk(top, -1).indices.flatten(), labels, more]).unique()
        return cls(tokens, _rest(logits, tokens), torch.searchsorted(tokens, labels))

    def spread(self, source: Tensor, labels: Tensor) -> Likely:
        """For other label positions, with labels among `tokens`: each takes the rest of the position `source` [M]."""
        return Likely(self.tokens, self.rest[source], torch.searchsorted(self.tokens, labels))


def _rest(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-sum-exp of the logits [M, vocabulary] of all other tokens, [M] fp32."""
    total, inside = logits.float().logsumexp(-1), logits[:, tokens].float().logsumexp(-1)
    return total + torch.log1p(-(inside - total).exp().clamp_max(1 - 1e-6))
