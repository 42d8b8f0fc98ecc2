"""How loud the unrelated texts of a batch are while it is trained, and which of them a step looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from wise_fast import objective
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory
from wise_fast.texts import Texts

_LOOK_EVERY = 4  # steps between two looks at all texts
_NEAR = 0.7  # share of alpha from which on a text is looked at in every step
_HUSH = 2.0  # multiple of alpha that a text may reach


class Quiet:
    """The texts under a memory that is trained: what it held, plus `features z`.

    Attributes:
        texts: what must stay below the margin.
        selected, features, before: per token: what the memory reads [n, K or d_ff], the same protected, and the
            response [n, d_out] of what is written.
        score: [count] of each text when last looked at, over what it may reach, so that alpha is the margin of all.
        margin: alpha in units of scores.
        always: whether every step looks at all of them, as others than this batch move `z` in between.
        known: response of all tokens if it was looked at since the last step; settling and writing leave it as it is.
    """

    def __init__(self, texts: Texts, memory: SideMemory, p: Tensor | None, config: WiseConfig, unit: float):
        self.texts, self.margin = texts, config.alpha * unit
        self.selected, self.before = memory.select(texts.a), memory.respond(memory.select(texts.a))
        self.protect(p)
        self.score = texts.limit.new_zeros(len(texts.names))
        self.always, self.known = False, None
        self._reduce = objective.row_max if config.reduction == "max" else objective.row_mean

    def protect(self, p: Tensor | None) -> None:
        """Take this `P` for the one that `z` is multiplied by."""
        self.features = self.selected if p is None else self.selected @ p

    def settle(self, half: Tensor, kept: Tensor) -> None:
        """`P` loses `H^T H`, and the memory takes `H^T kept`."""
        shares = self.selected @ half.t()
        self.features = torch.addmm(self.features, shares, half, alpha=-1.0)
        self.before = torch.addmm(self.before, shares, kept)

    def write(self, memory: SideMemory, z: Tensor) -> None:
        """The memory takes `P z`."""
        self.before = self.before + memory.respond(self.features, z)

    @torch.no_grad()
    def loud(self, memory: SideMemory, z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens of the texts whose margins have a gradient in this step, and their response, to train."""
        watched = self._watched(step)
        tokens, response = self._look(watched, memory, z)
        self.known = None
        # The loudest counts in every edit's gap.
        least = self.score[watched].max().clamp_max(self.margin) if len(tokens) else self.margin
        loud = (self.score >= least)[self.texts.text[tokens]]
        return tokens[loud], response[loud].requires_grad_()

    @torch.no_grad()
    def hushed(self, memory: SideMemory, z: Tensor) -> bool:
        """Whether all texts are quiet under what is written so far."""
        _, self.known = self._look(torch.ones_like(self.score, dtype=torch.bool), memory, z)
        return bool((self.score <= _HUSH * self.margin).all())

    def scores(self, response: Tensor, tokens: Tensor) -> Tensor:
        """Scores from the response of these tokens; 0 of texts that have none."""
        norms = (response.square().sum(-1) + 1e-12).sqrt()
        return self._reduce(norms, self.texts.text[tokens], len(self.score)) / self.texts.limit

    def _look(self, watched: Tensor, memory: SideMemory, z: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of these texts and their response."""
        tokens = watched[self.texts.text].nonzero()[:, 0]
        if self.known is None:
            response = self.before[tokens] + memory.respond(self.features[tokens], z)
        else:
            response = self.known[tokens]
        self.score = torch.where(watched, self.scores(response, tokens), self.score)
        return tokens, response

    def _watched(self, step: int) -> Tensor:
        """[count] bool, the texts to look at in this step: all every few steps, else those near their margin.

        The margin of the others has no gradient, and there are more of their tokens than of the edits'. The first step
        shows what the memory did before, the second what the first one did.
        """
        if self.always or step == 1 or step % _LOOK_EVERY == 2:
            return torch.ones_like(self.score, dtype=torch.bool)
        return self.score >= _NEAR * self.margin
