"""How a batch of edits changes an editor's state: shards are opened, learn, are closed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from wise_fast import protection, rehearsal
from wise_fast.calibration import calibrated
from wise_fast.data import Edit
from wise_fast.material import Material, seed_of
from wise_fast.memory import SideMemory, storable
from wise_fast.state import NOT_FITTED, EditorState, EditReport, Shard
from wise_fast.subjects import extended
from wise_fast.texts import Texts
from wise_fast.training import EditDiverged, Fit

logger = logging.getLogger(__name__)


class Learning(Material):
    """The part of an editor that makes states of states; none of it serves them."""

    def _open_shard(self, state: EditorState) -> EditorState:
        """The state with an open shard."""
        if state.shard is not None:
            return state
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "mask", state.opened))
        shape = (self.architecture.d_out, self.architecture.d_ff)
        memory = SideMemory.blank(self.config.layout, shape, self.config.mask_ratio, generator, self.device)
        protect = self.config.protect and memory.layout == "neuron"
        p = self._fresh_p(memory) if protect else None
        return state.replace(shard=Shard(memory, p, origin=p), opened=state.opened + 1)

    def _fresh_p(self, memory: SideMemory) -> Tensor:
        """`P` of a shard without edits: what unrelated text activates is protected from the first edit on."""
        p = protection.identity(memory.values.shape[0], self.device)
        strength = self.config.protect_irrelevant
        return p if strength is None else protection.absorb(p, memory.select(self._quiet_pool.a), strength)

    def _room(self, state: EditorState) -> int:
        return self.config.batch_size if state.shard is None else state.shard.room(self.config)

    def _closed(self, state: EditorState) -> EditorState:
        """The state with its open shard closed. What that leaves is learned again in the next one, at most half of it,
        so this ends."""
        state, left = rehearsal.close_shard(self, state)
        while left:
            state = self._open_shard(state)
            places = left[: min(self.config.batch_size, self._room(state))]
            edits = [state.reports[i].edit for i in places]
            state, _ = self._edit_batch(state, edits, self.examples(edits, places), places)
            left = left[len(places) :]
            if self._room(state) == 0:
                state, more = rehearsal.close_shard(self, state)
                left += more
        # All that was to be learned again may have diverged.
        return state if state.shard is None or state.shard.memory.edits else state.replace(shard=None)

    def _edit_batch(
        self, state: EditorState, edits: Sequence[Edit], examples: Sequence, places: Sequence[int] | None = None
    ) -> tuple[EditorState, list[EditReport]]:
        """(state with the batch learned, reports). Edits that diverge are left out and reported. `places` are those of
        their reports if they are learned once more."""
        start = time.perf_counter()
        alive = list(range(len(edits)))
        fit = None
        while alive and fit is None:
            held = {report.edit.prompt for report in state.reports}
            quiet = self.quiet_texts([edits[i] for i in alive], state.shard.quiet, held)
            rows = [examples[i] for i in alive]
            generator = torch.Generator().manual_seed(seed_of(self.config.seed, "draw", len(state.reports)))
            trainer = self.trainer(state.shard.memory, state.shard.p, rows, quiet, generator)
            try:
                with self.tail.evaluating():
                    fit = trainer.run()
            except EditDiverged as error:
                logger.warning("edit %r diverged and is left out", edits[alive[error.edit]].prompt)
                del alive[error.edit]
        known = [EditReport(edit) for edit in edits] if places is None else [state.reports[i] for i in places]
        reports = [r.replace(success=False, note="diverged: its loss was not finite; taken back") for r in known]
        if places is None:
            places = range(len(state.reports), len(state.reports) + len(alive))
        else:
            state = state.replace(reports=_with(state.reports, places, reports))
            places = [places[i] for i in alive]
        if fit is not None:
            state = self._learned(state, fit, [known[i] for i in alive], places, quiet)
            seconds = (time.perf_counter() - start) / len(edits)
            made = [state.reports[place] for place in places]
            made = [r.replace(seconds=r.seconds + seconds) for r in made]
            state = state.replace(reports=_with(state.reports, places, made))
            for i, report in zip(alive, made, strict=True):
                reports[i] = report
        return state, reports

    def _learned(
        self, state: EditorState, fit: Fit, known: Sequence[EditReport], places: Sequence[int], quiet: Texts | None
    ) -> EditorState:
        """The state with a fitted batch in its open shard, and its reports, `known` so far, at these places."""
        shard = state.shard
        prompts = {report.edit.prompt for report in known}
        stale = {i for i, r in enumerate(state.reports) if r.edit.prompt in prompts and not r.superseded} - {*places}
        old = [r.replace(note="superseded by a later edit") if i in stale else r for i, r in enumerate(state.reports)]
        keys = tuple(k for k in shard.keys if k[0] not in stale) + tuple(zip(places, fit.keys, strict=True))
        memory = shard.memory.replace(values=storable(fit.values), edits=(*shard.memory.edits, *places))
        success = {i: report.success for i, report in enumerate(old)} | dict(zip(places, fit.success, strict=True))
        new = self._names([report.edit for report in known], fit.endings)
        memory = memory.replace(names=extended(shard.memory.names, shard.memory.edits, stale, new, fit.endings))
        memory, scores = calibrated(memory, fit.p, keys, {i for i, held in success.items() if held}, self.config)
        new = [
            report.replace(
                steps=report.steps + steps,
                loss_before=first if math.isnan(report.loss_before) else report.loss_before,
                loss=last,
                score=scores[place],
                success=success[place],
                note="" if success[place] else NOT_FITTED,
            )
            for place, report, steps, first, last in zip(places, known, fit.steps, fit.first, fit.last, strict=True)
        ]
        made = _with(old, places, new)
        gone = {i for i, r in enumerate(made) if r.superseded}
        # A memory of superseded edits alone would only compete with the one that replaced it.
        merged, closed = (tuple(m for m in part if set(m.edits) - gone) for part in (state.merged, state.closed))
        for i in stale:
            merged, closed = (tuple(self._without(m, i, made[i].edit) for m in part) for part in (merged, closed))
        return state.replace(
            merged=merged,
            closed=closed,
            shard=shard.replace(memory=memory, p=fit.p, keys=keys, quiet=quiet),
            reports=made,
        )

    def _without(self, memory: SideMemory, place: int, edit: Edit) -> SideMemory:
        """A finished memory without this edit. Its name is enough where memories compete; in an average, and where
        nothing is asked for a name, its response counts."""
        if place not in memory.edits:
            return memory
        named = memory.names is not None and self.config.mode == "retrieve"
        return memory.forget(place, None if named else self._prompt_activations(edit.prompt))


def _with(reports: Sequence[EditReport], places: Sequence[int], new: Sequence[EditReport]) -> tuple[EditReport, ...]:
    """The reports with these at their places, which may be the next ones."""
    made = dict(enumerate(reports)) | dict(zip(places, new, strict=True))
    return tuple(made.values())
