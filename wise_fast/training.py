"""Trains the delta of one batch of edits in one shard, on the tail alone.

Every edit has its own rows (the bare prompt and prefixed ones), its own loss and its own stopping; all share the
shard's values. Gradients are wanted at the projection's output only; `masked_update` turns them into the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import wise_kernels as kernels
from torch import Tensor

from wise_fast import objective
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory
from wise_fast.tail import Capture, Tail
from wise_fast.tokens import Batch, Example, collate


class EditDiverged(Exception):
    """The loss of one edit of the batch is not finite; `edit` is its position."""

    def __init__(self, edit: int):
        super().__init__(f"edit {edit} diverged")
        self.edit = edit


@dataclass(frozen=True)
class Texts:
    """Activations of unrelated prompts: `a` [n, d_ff] of prompt tokens only, `text` [n] int64, `count` texts."""

    a: Tensor
    text: Tensor
    count: int

    def join(self, other: Texts) -> Texts:
        text = torch.cat([self.text, other.text + self.count])
        return Texts(torch.cat([self.a, other.a]), text, self.count + other.count)


@dataclass(frozen=True)
class Fit:
    """What training a batch gave.

    Attributes:
        values: the shard's new values.
        taught: [n, K] activations of every token of every row, for protection.
        keys: per edit, [n_e, K] activations of the bare prompt, for thresholds.
        steps, first, last, success: per edit; losses are mean token NLL.
    """

    values: Tensor
    taught: Tensor
    keys: list[Tensor]
    steps: list[int]
    first: list[float]
    last: list[float]
    success: list[bool]


class Trainer:
    """One batch of edits being written into `memory`.

    Args:
        tail: of the model.
        memory: the open shard.
        p: its protection matrix [K, K], or None.
        examples: per edit, its rows, the bare prompt first; every edit has the same number.
        quiet: unrelated prompts that must stay below the margin.
        unit: size of the main response that margins and lr are relative to.
    """

    def __init__(
        self,
        tail: Tail,
        memory: SideMemory,
        p: Tensor | None,
        examples: Sequence[Sequence[Example]],
        quiet: Texts,
        config: WiseConfig,
        unit: float,
        generator: torch.Generator,
        pad: int,
    ):
        self.tail, self.memory, self.p, self.config, self.unit = tail, memory, p, config, unit
        self.generator, self.count, self.variants = generator, len(examples), len(examples[0])
        device = memory.values.device
        self.batch: Batch = collate([row for rows in examples for row in rows], pad, device)
        self.capture: Capture = tail.capture(self.batch.input_ids, self.batch.attention_mask)
        self.selected = memory.select(self.capture.a)
        self.features = self.selected if p is None else self.selected @ p
        self.before = memory.respond(self.selected)
        self.quiet = quiet
        selected = memory.select(quiet.a)
        self.quiet_features = selected if p is None else selected @ p
        self.quiet_before = memory.respond(selected)
        self.z = torch.zeros_like(memory.values)
        buffers = 2 if config.optimizer == "adam" else int(config.momentum > 0)
        self.moments = [torch.zeros_like(self.z) for _ in range(buffers)]
        self.lr = self._learning_rate()

    def _learning_rate(self) -> float:
        """One Adam step moves every weight by lr, so a token's output by about lr ||f||_1 sqrt(d_out)."""
        config = self.config
        if config.units == "absolute":
            return config.lr
        seen = self.batch.attention_mask.flatten().bool()
        if config.optimizer == "adam":
            reach = self.features[seen].abs().sum(-1).median() * self.memory.shape[0] ** 0.5
            return config.lr * self.unit / max(float(reach), 1e-12)
        energy = self.features[seen].square().sum(-1).median()
        return config.lr * self.unit**2 / max(float(energy), 1e-12)

    def run(self) -> Fit:
        """Step until every edit holds or the steps are used up.

        Raises:
            EditDiverged: an edit's loss is NaN or infinite.
        """
        config = self.config
        first, last, steps = [0.0] * self.count, [0.0] * self.count, [0] * self.count
        active = list(range(self.count))
        for step in range(1, config.max_steps + 1):
            nll, holds = self._step(active, self._draw(active), step)
            for i, edit in enumerate(active):
                if step == 1:
                    first[edit] = nll[i]
                last[edit], steps[edit] = nll[i], step
            if step >= config.min_steps and config.nll > 0:
                active = [edit for i, edit in enumerate(active) if not holds[i]]
            if not active:
                last, fine = self._verify()
                active = [edit for edit in range(self.count) if not fine[edit]]
                if not active:
                    break
        last, fine = self._verify()
        return Fit(self._folded(), self._taught(), self._keys(), steps, first, last, fine)

    def _draw(self, active: list[int]) -> list[int]:
        """Rows of one step: each active edit's bare prompt and a few of its prefixed ones."""
        rows = []
        for edit in active:
            order = torch.randperm(self.variants - 1, generator=self.generator)[: self.config.prefixes_per_step]
            rows += [edit * self.variants, *(edit * self.variants + 1 + order).tolist()]
        return rows

    def _losses(self, rows: list[int], response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per row: NLL, score, and whether every label is the argmax. `response` [len(rows) * T, d_out]."""
        index = torch.tensor(rows, device=response.device)
        capture = self.capture.rows(index)
        length = self.batch.input_ids.shape[1]
        place = torch.full((self.batch.input_ids.shape[0],), -1, device=response.device)
        place[index] = torch.arange(len(rows), device=response.device)
        chosen = place[self.batch.row] >= 0
        row = place[self.batch.row][chosen]
        positions = row * length + self.batch.positions[chosen] % length
        labels = self.batch.labels[chosen]
        y = (capture.main.float() + response).to(capture.main.dtype)
        logits = self.tail.replay(capture, y, positions)
        nll = objective.row_mean(objective.token_nll(logits, labels), row, len(rows))
        right = objective.row_mean((logits.argmax(-1) == labels).float(), row, len(rows)) > 0.999
        score = objective.scores(response, self.batch.prompt_mask[index], self.config.reduction)
        return nll, score, right

    def _quiet_score(self, response: Tensor) -> Tensor:
        norms = (response.square().sum(-1) + 1e-12).sqrt()
        return objective.row_mean(norms, self.quiet.text, self.quiet.count)

    def _response(self, tokens: Tensor) -> Tensor:
        return self.before[tokens] + self.memory.respond(self.features[tokens], self.z)

    def _tokens(self, rows: list[int]) -> Tensor:
        length = self.batch.input_ids.shape[1]
        start = torch.tensor(rows, device=self.z.device)[:, None] * length
        return (start + torch.arange(length, device=self.z.device)).flatten()

    def _step(self, active: list[int], rows: list[int], step: int) -> tuple[list[float], list[bool]]:
        tokens = self._tokens(rows)
        response = self._response(tokens).requires_grad_()
        quiet = (self.quiet_before + self.memory.respond(self.quiet_features, self.z)).requires_grad_()
        nll, score, right = self._losses(rows, response)
        quiet_score = self._quiet_score(quiet)
        loudest = quiet_score.max() if self.quiet.count else quiet_score.new_zeros(())
        margin = objective.edit_margin(score, self.config, self.unit)
        margin = margin + objective.gap_margin(score, loudest, self.config, self.unit)
        loss = (nll + margin).view(len(active), -1).mean(1)
        self._check_finite(loss, active)
        total = loss.sum() + objective.irrelevant_margin(quiet_score, self.config, self.unit).sum()
        gradients = torch.autograd.grad(total, (response, quiet))
        holds = self._holds(nll, score, right, len(active)) & self._hushed(quiet_score)
        self._update(torch.cat([self.features[tokens], self.quiet_features]), torch.cat(gradients), step)
        return nll.detach().view(len(active), -1).mean(1).tolist(), holds.tolist()

    def _holds(self, nll: Tensor, score: Tensor, right: Tensor, edits: int) -> Tensor:
        """Per edit: every label is the argmax, the mean NLL is low enough and the score reaches its margin."""
        loud = score.detach() / self.unit >= 0.95 * self.config.beta
        fits = nll.detach().view(edits, -1).mean(1) <= max(self.config.nll, 0.05)
        return (right & loud).view(edits, -1).all(1) & fits

    def _hushed(self, quiet_score: Tensor) -> Tensor:
        return (quiet_score.detach() / self.unit <= 1.2 * self.config.alpha).all()

    def _check_finite(self, loss: Tensor, active: list[int]) -> None:
        for edit, finite in zip(active, torch.isfinite(loss).tolist(), strict=True):
            if not finite:
                raise EditDiverged(edit)

    def _update(self, features: Tensor, gradient: Tensor, step: int) -> None:
        config = self.config
        settings = dict(
            lr=self.lr,
            step=step,
            optimizer=config.optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clamp=config.clamp,
        )
        if self.memory.layout == "neuron":
            kernels.masked_update_(self.z, features, gradient, *self.moments, **settings)
        else:
            kernels.masked_update_element_(self.z, self.memory.index, features, gradient, *self.moments, **settings)

    @torch.no_grad()
    def _verify(self) -> tuple[list[float], list[bool]]:
        """NLL and success of every edit over all of its rows, in chunks of whole edits."""
        nll, fine = [], []
        for first in range(0, self.count, 4):
            edits = min(4, self.count - first)
            rows = list(range(first * self.variants, (first + edits) * self.variants))
            losses, score, right = self._losses(rows, self._response(self._tokens(rows)))
            mean = losses.view(edits, -1).mean(1)
            self._check_finite(mean, list(range(first, first + edits)))
            nll += mean.tolist()
            fine += self._holds(losses, score, right, edits).tolist()
        return nll, fine

    def _folded(self) -> Tensor:
        return self.memory.values + (self.z if self.p is None else self.p @ self.z)

    def _taught(self) -> Tensor:
        return self.selected[self.batch.attention_mask.flatten().bool()]

    def _keys(self) -> list[Tensor]:
        length = self.batch.input_ids.shape[1]
        keys = []
        for edit in range(self.count):
            row = edit * self.variants
            keys.append(self.selected.view(-1, length, self.selected.shape[-1])[row][self.batch.prompt_mask[row]].clone())
        return keys
