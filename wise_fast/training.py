"""Trains the delta of one batch of edits in one shard, on the tail alone.

Every edit has its own rows (the bare prompt and prefixed ones), its own loss and its own stopping; all share the
shard's values. Gradients are wanted at the projection's output only; `masked_update` turns them into the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import wise_kernels as kernels
from wise_fast import objective
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory
from wise_fast.tail import Capture, Tail
from wise_fast.texts import Texts
from wise_fast.tokens import Batch, Example, collate
from wise_fast.vocabulary import WHOLE_VOCABULARY, Likely

_EDITS_AT_ONCE = 8  # in a forward of all rows


class EditDiverged(Exception):
    """The loss of one edit of the batch is not finite; `edit` is its position."""

    def __init__(self, edit: int):
        super().__init__(f"edit {edit} diverged")
        self.edit = edit


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
        self.likely: Likely | None = None

    def _learning_rate(self) -> float:
        """One Adam step moves every weight by lr, so a token's output by about lr ||f||_1 sqrt(d_out)."""
        config = self.config
        if config.units == "absolute":
            return config.lr
        seen = self.batch.attention_mask.flatten().bool()
        if config.optimizer == "adam":
            reach = self.selected[seen].abs().sum(-1).median() * self.memory.shape[0] ** 0.5
            return config.lr * self.unit / max(float(reach), 1e-12)
        energy = self.selected[seen].square().sum(-1).median()
        return config.lr * self.unit**2 / max(float(energy), 1e-12)

    def run(self) -> Fit:
        """Step until every edit holds or the steps are used up.

        Raises:
            EditDiverged: an edit's loss is NaN or infinite.
        """
        config = self.config
        first = last = self._begin()
        fine = [False] * self.count
        steps = [0] * self.count
        active = list(range(self.count))
        for step in range(1, config.max_steps + 1):
            holds = self._step(active, self._draw(active), step)
            for edit in active:
                steps[edit] = step
            if step >= config.min_steps and config.nll > 0:
                active = [edit for edit, held in zip(active, holds, strict=True) if not held]
            if not active or step == config.max_steps:
                last, fine = self._verify()
                active = [edit for edit in range(self.count) if not fine[edit]]
                if not active:
                    break
        return Fit(self._folded(), self._taught(), self._keys(), steps, first, last, fine)

    def _draw(self, active: list[int]) -> list[int]:
        """Rows of one step: each active edit's bare prompt and a few of its prefixed ones."""
        rows = []
        for edit in active:
            order = torch.randperm(self.variants - 1, generator=self.generator)[: self.config.prefixes_per_step]
            rows += [edit * self.variants, *(edit * self.variants + 1 + order).tolist()]
        return rows

    def _labels(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Labels of these rows: places in the batch's labels, their row, and their position in the rows' tokens."""
        place = torch.full((self.batch.input_ids.shape[0],), -1, device=self.z.device)
        place[rows] = torch.arange(len(rows), device=self.z.device)
        chosen = (place[self.batch.row] >= 0).nonzero()[:, 0]
        row = place[self.batch.row[chosen]]
        length = self.batch.input_ids.shape[1]
        return chosen, row, row * length + self.batch.positions[chosen] % length

    def _losses(self, rows: list[int], response: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per row: NLL, score, and whether every label is the argmax; and the logits at the labels' positions."""
        capture = self.capture.rows(torch.tensor(rows, device=self.z.device))
        chosen, row, positions = self._labels(rows)
        y = (capture.main.float() + response).to(capture.main.dtype)
        if full or self.likely is None:
            labels = self.batch.labels[chosen]
            logits = self.tail.replay(capture, y, positions)
            nll = objective.token_nll(logits, labels)
        else:
            labels = self.likely.places[chosen]
            logits = self.tail.replay(capture, y, positions, self.likely.tokens)
            nll = objective.restricted_nll(logits, labels, self.likely.rest[chosen])
        right = objective.row_mean((logits.argmax(-1) == labels).float(), row, len(rows)) > 0.999
        score = objective.scores(response, self.batch.prompt_mask[rows], self.config.reduction)
        return objective.row_mean(nll, row, len(rows)), score, right, logits

    def _quiet_score(self, response: Tensor) -> Tensor:
        """Scores of the quiet texts over what each may reach, so that alpha is the margin of all."""
        norms = (response.square().sum(-1) + 1e-12).sqrt()
        return objective.row_mean(norms, self.quiet.text, len(self.quiet.names)) / self.quiet.limit

    def _response(self, tokens: Tensor) -> Tensor:
        return self.before[tokens] + self.memory.respond(self.features[tokens], self.z)

    def _tokens(self, rows: list[int]) -> Tensor:
        length = self.batch.input_ids.shape[1]
        start = torch.tensor(rows, device=self.z.device)[:, None] * length
        return (start + torch.arange(length, device=self.z.device)).flatten()

    def _step(self, active: list[int], rows: list[int], step: int) -> list[bool]:
        """One optimiser step on these rows; says per active edit whether it held before the step."""
        tokens = self._tokens(rows)
        response = self._response(tokens).requires_grad_()
        quiet = (self.quiet_before + self.memory.respond(self.quiet_features, self.z)).requires_grad_()
        nll, score, right, _ = self._losses(rows, response, full=False)
        quiet_score = self._quiet_score(quiet)
        loudest = quiet_score.max() if len(quiet_score) else quiet_score.new_zeros(())
        margin = objective.edit_margin(score, self.config, self.unit)
        margin = margin + objective.gap_margin(score, loudest, self.config, self.unit)
        weight = self.config.margin_weight
        loss = (nll + weight * margin).view(len(active), -1).mean(1)
        total = loss.sum() + weight * objective.irrelevant_margin(quiet_score, self.config, self.unit).sum()
        gradients = torch.autograd.grad(total, (response, quiet))
        # A gradient can overflow where its loss does not, and would spoil the values that all edits share.
        self._check_finite(loss.detach() + 0 * gradients[0].view(len(active), -1).sum(1), active)
        holds = self._holds(nll, score, right, len(active)) & self._hushed(quiet_score)
        self._update(torch.cat([self.features[tokens], self.quiet_features]), torch.cat(gradients), step)
        return holds.tolist()

    def _holds(self, nll: Tensor, score: Tensor, right: Tensor, edits: int) -> Tensor:
        """Per edit: every label is the argmax, the mean NLL is low enough and the score reaches its margin."""
        loud = score.detach() / self.unit >= 0.95 * self.config.beta
        fits = nll.detach().view(edits, -1).mean(1) <= max(self.config.nll, 0.05)
        return (right & loud).view(edits, -1).all(1) & fits

    def _hushed(self, quiet_score: Tensor) -> Tensor:
        return (quiet_score.detach() / self.unit <= 2.0 * self.config.alpha).all()

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
    def _begin(self) -> list[float]:
        """NLL of every edit's bare prompt before training; chooses the tokens that the first steps compute."""
        rows = [edit * self.variants for edit in range(self.count)]
        nll, _, _, logits = self._losses(rows, self._response(self._tokens(rows)), full=True)
        if logits.shape[1] > WHOLE_VOCABULARY:
            chosen, row, _ = self._labels(rows)
            # A prefixed row's n-th label takes the rest of the bare row's n-th.
            start, count = self._starts(row, self.count), torch.bincount(row, minlength=self.count)
            rank = torch.arange(len(self.batch.row), device=self.z.device)
            rank = rank - self._starts(self.batch.row, self.count * self.variants)[self.batch.row]
            edit = self.batch.row // self.variants
            source = start[edit] + torch.minimum(rank, count[edit] - 1)
            self.likely = Likely.of(logits, self.batch.labels[chosen]).spread(source, self.batch.labels)
        return nll.tolist()

    @staticmethod
    def _starts(row: Tensor, rows: int) -> Tensor:
        """Where each row's labels begin, given labels sorted by row."""
        return torch.searchsorted(row.contiguous(), torch.arange(rows, device=row.device))

    @torch.no_grad()
    def _verify(self) -> tuple[list[float], list[bool]]:
        """NLL and success of every edit over all of its rows and the whole vocabulary, in chunks of whole edits.

        Where some edit does not hold, also chooses anew which tokens the next steps compute.
        """
        nll, fine, logits = [], [], []
        for first in range(0, self.count, _EDITS_AT_ONCE):
            edits = min(_EDITS_AT_ONCE, self.count - first)
            rows = list(range(first * self.variants, (first + edits) * self.variants))
            losses, score, right, chunk = self._losses(rows, self._response(self._tokens(rows)), full=True)
            mean = losses.view(edits, -1).mean(1)
            self._check_finite(mean, list(range(first, first + edits)))
            nll += mean.tolist()
            fine += self._holds(losses, score, right, edits).tolist()
            logits.append(chunk)
        if self.likely is not None and not all(fine):
            self.likely = Likely.of(torch.cat(logits), self.batch.labels)
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
            keys.append(
                self.selected.view(-1, length, self.selected.shape[-1])[row][self.batch.prompt_mask[row]].clone()
            )
        return keys
