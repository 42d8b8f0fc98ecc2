"""The part of a large vocabulary that edit steps compute.

With 262k tokens the LM head is the largest matmul there is, and nearly all of its probability sits on few tokens. The
whole head runs when an edit begins and when it claims to hold; the steps between use the likeliest tokens and keep the
rest's share of the partition function as last computed.
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
    def of(cls, logits: Tensor, labels: Tensor, top: int = LIKELY_TOKENS) -> Likely:
        """From complete logits [M, vocabulary] and their labels [M]."""
        tokens = torch.cat([logits.topk(top, -1).indices.flatten(), labels]).unique()
        return cls(tokens, _rest(logits, tokens), torch.searchsorted(tokens, labels))

    def spread(self, source: Tensor, labels: Tensor) -> Likely:
        """For more label positions, each taking the rest of the position `source` [M] that it resembles."""
        tokens = torch.cat([self.tokens, labels]).unique()
        return Likely(tokens, self.rest[source], torch.searchsorted(tokens, labels))

    def renew(self, places: Tensor, logits: Tensor, wrong: Tensor, labels: Tensor, top: int = LIKELY_TOKENS) -> Likely:
        """With the likeliest tokens of label positions that went wrong.

        Args:
            places: [m] label positions that were looked at.
            logits: [m, vocabulary] their complete logits.
            wrong: [m] bool, those whose likeliest tokens are wanted; the rest is renewed of all.
            labels: [M] of all positions.
        """
        tokens = torch.cat([self.tokens, logits[wrong].topk(top, -1).indices.flatten()]).unique()
        rest = self.rest.index_copy(0, places, _rest(logits, tokens))
        return Likely(tokens, rest, torch.searchsorted(tokens, labels))


def _rest(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-sum-exp of the logits [M, vocabulary] of all other tokens, [M] fp32."""
    total, inside = logits.float().logsumexp(-1), logits[:, tokens].float().logsumexp(-1)
    return total + torch.log1p(-(inside - total).exp().clamp_max(1 - 1e-6))
