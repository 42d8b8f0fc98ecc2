"""FT-L: fine-tuning of the same one matrix, under an L-inf constraint, as the literature's baseline of that name.

Constrained fine-tuning is of Zhu et al. 2020 (arXiv 2012.00363); one FFN projection, Adam, and the constraint around
the weights as an edit finds them are of Meng et al. 2022 (arXiv 2202.05262, "FT+L"): minimise the target's NLL over
the one matrix W, and after every step put W back into `|W - W_before|_inf <= norm_constraint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bench.projection import ProjectionMethod
from wise_fast import tokens
from wise_fast.architectures import linear_weight
from wise_fast.data import Edit
from wise_fast.errors import ConfigError


@dataclass(frozen=True)
class FTLConfig:
    """Settings. The defaults are the usual ones: 25 steps of Adam at 5e-4, entries moved by at most 5e-4 an edit.

    Attributes:
        layer, stop: as in `WiseConfig`; the stop token is trained after the target, as ours does.
        steps, lr: of Adam, whose state starts anew with every edit.
        norm_constraint: how far an edit may move an entry of the matrix; None leaves it free.
        nll: an edit stops once its target's mean token NLL is at most this.
    """

    layer: int | None = None
    steps: int = 25
    lr: float = 5e-4
    norm_constraint: float | None = 5e-4
    nll: float = 1e-2
    stop: str = "auto"

    def __post_init__(self) -> None:
        bound = self.norm_constraint
        if not (self.steps >= 1 and self.lr > 0 and self.nll >= 0 and (bound is None or bound > 0)):
            raise ConfigError(f"FT-L needs steps >= 1, lr > 0, nll >= 0 and a positive norm_constraint, got {self}")


class FTL(ProjectionMethod):
    """Fine-tunes the projection's weight in place. It has no router: every prompt reads the changed matrix."""

    name = "ft-l"

    def __init__(self, model: nn.Module, tokenizer, config: FTLConfig | None = None):
        super().__init__(model, tokenizer, FTLConfig() if config is None else config)
        self._original = self.projection.weight.data
        self._weight = linear_weight(self.projection).detach().float().clone()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        edited, self.projection.weight.data = self.projection.weight.data, self._original
        try:
            yield
        finally:
            self.projection.weight.data = edited

    def unload(self) -> nn.Module:
        self.projection.weight.data = self._original
        return super().unload()

    def tensors(self) -> list[Tensor]:
        """Nothing beside the model: the matrix has changed in place."""
        return []

    def _learn(self, edit: Edit, row: tokens.Example) -> tuple[int, str]:
        batch = self._batch([row])
        capture = self.tail.capture(batch.input_ids, batch.attention_mask)
        before, bias = self._weight, self.projection.bias
        weight = before.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([weight], lr=self.config.lr)
        a, bound, steps = capture.a.float(), self.config.norm_constraint, 0
        bias = None if bias is None else bias.detach().float()
        while True:
            y = F.linear(a, weight, bias).to(capture.main.dtype)
            loss = F.cross_entropy(self.tail.replay(capture, y, batch.positions).float(), batch.labels)
            if steps == self.config.steps or loss.item() <= self.config.nll:
                break
            (weight.grad,) = torch.autograd.grad(loss, weight)
            optimiser.step()
            steps += 1
            if bound is not None:
                weight.data.clamp_(before - bound, before + bound)
        if not bool(weight.isfinite().all()):
            return steps, "diverged: its weights were not finite; taken back"
        self._weight = weight.detach()
        self.projection.weight.data = self._stored(self._weight)
        return steps, ""

    def _stored(self, weight: Tensor) -> Tensor:
        """[d_out, d_ff] as the module keeps it."""
        return (weight.t() if isinstance(self.projection, Conv1D) else weight).contiguous().to(self._original.dtype)
