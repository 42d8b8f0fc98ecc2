"""Trains the delta of one batch of edits in one shard, on the tail alone.

Every edit has its own rows (the bare prompt and prefixed ones), its own loss and its own stopping; all share the
shard's values. Gradients are wanted at the projection's output only; `masked_update` turns them into the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

import wise_kernels as kernels
from wise_fast import objective
from wise_fast.config import WiseConfig
from wise_fast.memory import SideMemory
from wise_fast.protection import gain, weight
from wise_fast.quiet import Quiet
from wise_fast.rows import Group, Look, Part, Rows, look_at
from wise_fast.standing import Standing
from wise_fast.tail import Tail
from wise_fast.texts import Texts
from wise_fast.tokens import Example
from wise_fast.vocabulary import WHOLE_VOCABULARY

_LOUD = 0.95  # share of beta that an edit's score must reach
_SLACK = 1.5  # what the NLL may be, in what an edit stops at, once the whole vocabulary is looked at


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
        p: the shard's protection matrix with these edits absorbed, or None.
        keys: per edit, [n_e, K] activations of the bare prompt, for thresholds.
        endings: [edits, d_ff] activations of the bare prompts' last tokens.
        steps, first, last, success: per edit; losses are mean token NLL, weighted as in the loss.
    """

    values: Tensor
    p: Tensor | None
    keys: list[Tensor]
    endings: Tensor
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
        self.memory, self.p, self.config, self.unit, self.generator = memory, p, config, unit, generator
        self.rows = Rows(tail, memory, examples, pad, config.first_token)
        self.count, self.variants = self.rows.edits, self.rows.variants
        self.quiet = Quiet(quiet, memory, p, config, unit)
        self.lr = self._learning_rate()
        self.last_dropout = 0.0  # how often, in a step, an augmented prompt's last token gets no response
        self.standing = Standing(self.rows, config, _LOUD * config.beta * unit, generator)
        # P before the batch, and what it has absorbed of each settled edit.
        self.origin, self.absorbed = p, dict[int, Tensor]()
        self.z = torch.zeros_like(memory.values)
        self._begin_anew([])

    def _begin_anew(self, entering: Sequence[int]) -> None:
        """Begin to train from what is written by now, these edits for the first time: no moments."""
        for group, places in self.rows.split(self.rows.numbers(entering)):
            group.begin(places, self.memory, self.p)
        self.since = 0
        self.moments = [torch.zeros_like(self.z) for _ in range(self.config.moments)]

    def _learning_rate(self) -> float:
        """One Adam step moves every weight by lr, so a token's output by about lr ||f||_1 sqrt(d_out)."""
        config = self.config
        if config.units == "absolute":
            return config.lr
        taught = self.rows.taught(range(self.count))
        if config.optimizer == "adam":
            reach = taught.abs().sum(-1).median() * self.memory.shape[0] ** 0.5
            return config.lr * self.unit / max(float(reach), 1e-12)
        return config.lr * self.unit**2 / max(float(taught.square().sum(-1).median()), 1e-12)

    def run(self) -> Fit:
        """Train every edit until it holds or its steps are used up.

        What later edits of the batch have disturbed is trained again.

        Raises:
            EditDiverged: an edit's loss is NaN or infinite.
        """
        first, todo = self._begin(), list(range(self.count))
        while todo:
            if self.absorbed:
                self._release(todo)
            self._train(todo)
            last, fine = self._verify()
            todo = [e for e in range(self.count) if not fine[e] and self.standing.steps[e] < self.config.max_steps]
        keys = [self.rows.key(edit) for edit in range(self.count)]
        return Fit(self.memory.values, self.p, keys, self.rows.endings(), self.standing.steps, first, last, fine)

    def _train(self, edits: Sequence[int]) -> None:
        """Steps for these edits, a few at a time: what claims to hold is settled, and the next takes its place.

        The fewer at once, the fewer steps each takes. Without protection what was settled would be undone, so all are
        trained at once and end together.
        """
        waiting, active, ended = list(edits), [], []
        wave = len(waiting) if self.p is None else self.config.wave
        while waiting or active or ended:
            if not active or (self.p is not None and 2 * len(ended) >= wave):
                if ended:
                    self._settle(ended, active)
                entering = waiting[: wave - len(active)]
                active, waiting, ended = active + entering, waiting[len(entering) :], []
                self._begin_anew(entering)
                continue
            self._step(active, self.standing.draw(active))
            for edit in active:
                self.standing.steps[edit] += 1
            ended += self._ended(active)
            active = [edit for edit in active if edit not in ended]
        self._write()

    def _ended(self, active: Sequence[int]) -> list[int]:
        """Edits that are trained no further: they claim to hold and unrelated texts are quiet, or no steps are left."""
        config, steps = self.config, self.standing.steps
        claiming = [e for e in active if steps[e] >= config.min_steps and config.nll > 0 and self.standing.claims(e)]
        if claiming and not self.quiet.hushed(self.memory, self.z):
            claiming = []
        return [e for e in active if e in claiming or steps[e] >= config.max_steps]

    def _settle(self, edits: Sequence[int], active: Sequence[int] = ()) -> None:
        """Protect these edits from what is learned next, by the active ones too.

        `P` becomes `P - H^T H`. The memory takes what that takes from `P z`, so `z` goes on and is multiplied by all of
        `P` once, in `_write`.
        """
        if self.p is None:
            return
        products = []
        for edit in edits:
            a, pa = self.rows.taught([edit]), self.rows.protected([edit])
            scale = weight(a, pa, self.config.protect_lambda)
            self.absorbed[edit] = scale * a
            products.append(scale * pa)
        half = gain(torch.cat(products), torch.cat([self.absorbed[edit] for edit in edits]))
        kept = half @ self.z
        self.memory = self.memory.replace(values=torch.addmm(self.memory.values, half.t(), kept))
        self._absorb(half)
        self.quiet.settle(half, kept)
        for group, places in self.rows.split(self.rows.numbers(active)):
            group.settle(places, half, kept)

    def _absorb(self, half: Tensor) -> None:
        """`P` loses `H^T H`; the one before the batch stays as it is."""
        if self.p is self.origin:
            self.p = self.p.clone()
        self.p.addmm_(half.t(), half, alpha=-1.0)

    def _write(self) -> None:
        """Fold the delta into the memory."""
        self.memory = self.memory.replace(values=self.memory.values + (self.z if self.p is None else self.p @ self.z))
        self.quiet.write(self.memory, self.z)
        self.z.zero_()

    def _release(self, edits: Sequence[int]) -> None:
        """Let these settled edits be moved again: P from what it was, without them."""
        kept = [a for edit, a in self.absorbed.items() if edit not in edits]
        self.absorbed = {edit: a for edit, a in self.absorbed.items() if edit not in edits}
        self.p = self.origin
        if kept:
            a = torch.cat(kept)
            self._absorb(gain(a @ self.p, a))
        self.quiet.protect(self.p)

    def _response(self, group: Group, places: Sequence[int]) -> Tensor:
        """Side response [b*T, d_out] of these rows, with what the batch has written so far."""
        tokens = group.tokens(places)
        return group.before[tokens] + self.memory.respond(group.features[tokens], self.z)

    def _silent(self, group: Group, places: Sequence[int]) -> Tensor | None:
        """Tokens of these rows that get no response in this step: the last of some augmented prompts."""
        if self.last_dropout == 0:
            return None
        augmented = torch.tensor([group.numbers[place] % self.variants > 0 for place in places])
        drawn = torch.rand(len(places), generator=self.generator) < self.last_dropout
        chosen = (augmented & drawn).to(group.selected.device)
        return group.endings(places) & chosen.repeat_interleave(group.width(places))

    def _step(self, active: list[int], rows: list[int]) -> None:
        """One optimiser step on these rows."""
        self.standing.taken, self.since = self.standing.taken + 1, self.since + 1
        quiet_tokens, quiet = self.quiet.loud(self.memory, self.z, self.standing.taken)
        quiet_score = self.quiet.scores(quiet, quiet_tokens)
        loudest = (quiet_score if len(quiet) else self.quiet.score).max()
        features = [self.quiet.features[quiet_tokens]]
        margin_weight, reduction = self.config.margin_weight, self.config.reduction
        losses, inputs = quiet.new_zeros(self.count), []
        parts = [
            Part(group, places, self._response(group, places).requires_grad_(), self._silent(group, places))
            for group, places in self.rows.split(rows)
        ]
        drawn = torch.bincount(torch.tensor(rows) // self.variants, minlength=self.count).to(quiet.device)
        for part, seen in zip(parts, look_at(parts, reduction, full=False), strict=True):
            group, places = part.group, part.places
            margin = objective.edit_margin(seen.score, self.config, self.unit)
            margin = margin + objective.gap_margin(seen.score, loudest, self.config, self.unit)
            edit = torch.tensor([group.numbers[i] for i in places], device=quiet.device) // self.variants
            losses = losses.index_add(0, edit, (seen.nll + margin_weight * margin) / drawn[edit])
            inputs.append((edit, part.response))
            features.append(group.features[group.tokens(places)])
            self.standing.note(group, places, seen)
        total = losses.sum() + margin_weight * objective.irrelevant_margin(quiet_score, self.config, self.unit).sum()
        gradients = torch.autograd.grad(total, [quiet, *(response for _, response in inputs)])
        # A gradient can overflow where its loss does not, and would spoil the values that all edits share.
        probe = losses.detach()
        for (edit, _), gradient in zip(inputs, gradients[1:], strict=True):
            probe = probe.index_add(0, edit, 0 * gradient.view(len(edit), -1).sum(1))
        self._check_finite(probe[active], active)
        self._update(torch.cat(features), torch.cat(gradients))

    def _check_finite(self, loss: Tensor, active: list[int]) -> None:
        for edit, finite in zip(active, torch.isfinite(loss).tolist(), strict=True):
            if not finite:
                raise EditDiverged(edit)

    def _update(self, features: Tensor, gradient: Tensor) -> None:
        config = self.config
        settings = dict(
            lr=self.lr,
            step=self.since,
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
        looks = self._look(self.rows.bare(), full=True)
        self._restrict(looks)
        nll = {group.numbers[p]: x for group, places, look in looks for p, x in zip(places, look.nll.tolist())}
        return [nll[number] for number in self.rows.bare()]

    def _look(self, numbers: Sequence[int], full: bool) -> list[tuple[Group, list[int], Look]]:
        """These rows under what the memory holds."""
        split = self.rows.split(numbers)
        parts = [Part(g, places, self.memory.respond(g.selected[g.tokens(places)])) for g, places in split]
        looks = look_at(parts, self.config.reduction, full)
        return [(group, places, seen) for (group, places), seen in zip(split, looks, strict=True)]

    def _restrict(self, looks: Sequence[tuple[Group, list[int], Look]]) -> None:
        plain = self.rows.groups[0].tail.head_is_plain  # a quantized or offloaded head gives all or nothing
        if plain and looks[0][2].logits.shape[1] > WHOLE_VOCABULARY:
            self.rows.restrict(looks)

    @torch.no_grad()
    def _verify(self) -> tuple[list[float], list[bool]]:
        """NLL and success of every edit: on the bare prompt over the whole vocabulary, on other rows the likely part.

        Unless all hold, also chooses anew which tokens the next steps compute.
        """
        bare = self.rows.bare()
        looks = self._look(bare, full=True)
        others = [n for n in self.rows.numbers(range(self.count)) if n % self.variants]
        for group, places, look in looks + self._look(others, full=False):
            self._check_finite(look.nll, [group.numbers[place] // self.variants for place in places])
            self.standing.note(group, places, look)
        means = [fmean(self.standing.nll[n] for n in self.rows.numbers([edit])) for edit in range(self.count)]
        fine = [self.standing.claims(edit, _SLACK) for edit in range(self.count)]
        if not all(fine):
            self._restrict(looks)
        return means, fine
