"""`WiseEditor`: lifelong editing of a causal LM through one object."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wise_fast import capacity, compiled, tokens
from wise_fast.architectures import find_architecture
from wise_fast.chat import rendered
from wise_fast.config import WiseConfig
from wise_fast.data import Edit, as_edits, deduplicate
from wise_fast.errors import ConfigError, WiseError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.learning import Learning
from wise_fast.memory import SideMemory
from wise_fast.pack_rows import OWN
from wise_fast.packs import Packs
from wise_fast.routing import Generation, Routing
from wise_fast.sharing import PlainSaving, Sharing
from wise_fast.state import EditorState, EditReport
from wise_fast.tail import Tail
from wise_fast.turns import change, in_turn

logger = logging.getLogger(__name__)


class WiseEditor(Learning, Packs, Sharing):
    """Edits a Hugging Face causal LM in place; the model stays usable through `model(...)` and `model.generate`.

    `edit` teaches, `disabled()` is a block with the unedited model, `checkpoint` and `rollback` undo, `save_pretrained`
    and `from_pretrained` keep, `unload` takes the editor off. The weights of the model are never written.

    Args:
        model: a decoder-only causal LM (see `wise_fast.architectures.SUPPORTED`), or `torch.compile` of one.
        tokenizer: its tokenizer; a pad token is not needed.
        config: `WiseConfig()` when None.

    Raises:
        UnsupportedModelError: the model's structure cannot be edited.
        ConfigError: a setting does not fit the model, or the model has an editor already.
        WiseError: Inductor is set to freeze weights.
    """

    def __init__(self, model: nn.Module, tokenizer, config: WiseConfig | None = None):
        compiled.require_live_weights()
        model = compiled.original(model)
        self.model, self.tokenizer = model, tokenizer
        self.config = WiseConfig() if config is None else config
        if any(isinstance(m, DualMemoryLinear) for m in model.modules()):
            raise ConfigError("the model has side memories already; unload() the editor that put them there first")
        self.stop = tokens.stop_token(tokenizer, self.config.stop)
        self.architecture = find_architecture(model, self.config.layer)
        self.tail = Tail(model, self.architecture)
        self.routing = Routing()
        self._undo: list[EditorState] = []
        self._checkpoints: dict[str, EditorState] = {}
        self._state = EditorState()
        self._packs, self._active, self._order = {}, (OWN,), ()
        self._attach()

    # -- editing ------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.enable_grad()
    @change
    def edit(self, edits: Edit | dict | Iterable[Edit | dict], progress: bool = False) -> list[EditReport]:
        """Teach facts, `config.batch_size` at a time.

        All edits are checked before any is learned. A batch is one transaction: an interrupt leaves no trace of the
        batch it fell into, an edit whose loss is not finite is taken back alone. Batches before it stay.

        Args:
            edits: `Edit`s or dicts of any known format; of edits with the same prompt the last one counts.
            progress: show a progress bar with the time left (needs the `cli` extra).

        Returns:
            One report per edit given, in order.

        Raises:
            EditDataError: an edit is unusable, does not fit the context, or tokenizes to nothing.
            PackError: the editor's own edits are not active, so that none of these would be answered; or this thread is
                in the middle of a generation or of `packs_for`.
            WiseError: Inductor is set to freeze weights.
            UnsupportedModelError: quantized layers behind the projection pass no gradient.
        """
        self._require_own()
        compiled.require_live_weights()
        self.require_gradients()
        given = rendered(self.tokenizer, as_edits(edits))
        kept, superseded = deduplicate(given)
        reports: dict[int, EditReport] = {
            s.position: EditReport(s.edit, note=_superseded(f"edit {s.by_position + 1} of this call", s.contradicting))
            for s in superseded
        }
        places = [i for i in range(len(given)) if i not in reports]
        examples = self.examples(kept, places)
        with _progress(progress, len(kept)) as advance:
            first = 0
            while first < len(kept):
                state = self._open_shard(self._state)
                count = min(self.config.batch_size, len(kept) - first, self._room(state))
                rows = slice(first, first + count)
                state, batch = self._edit_batch(state, kept[rows], examples[rows])
                if self._room(state) == 0:
                    state = self._closed(state)
                if len(state.reports) > len(self._state.reports):  # a batch that diverged as a whole leaves no trace
                    self._commit(state)
                reports.update(zip(places[rows], batch, strict=True))
                first += count
                advance(count)
        held = {report.edit: report for report in self._state.reports if not report.superseded}  # rehearsed since
        made = (reports[i] for i in range(len(given)))
        return [report if report.superseded else held.get(report.edit, report) for report in made]

    @torch.inference_mode(False)
    @in_turn
    def prepare(self) -> None:
        """Ask the model now what the first edit would ask it, once an editor: prefixes, unrelated texts, the unit."""
        _ = self._prefix_tokens, self._quiet_pool, self.unit, self.tail.axes

    def check(self, edits: Iterable[Edit]) -> None:
        """Raise EditDataError, as `edit` would, if one of these `edits` cannot be learned."""
        for place, edit in enumerate(rendered(self.tokenizer, edits)):
            self.examples([edit], [place])

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def edits(self) -> list[EditReport]:
        """Reports of the edits the model holds, in order."""
        return list(self._state.reports)

    @property
    def memories(self) -> list[SideMemory]:
        """Side memories being served."""
        return self._state.memories

    @property
    def projection(self) -> DualMemoryLinear:
        """The drop-in module; WiseError once the editor is unloaded."""
        module = self.model.get_submodule(self.architecture.projection)
        if getattr(module, "routing", None) is not self.routing:
            raise WiseError("the editor was unloaded from its model; make a new one")
        return module

    @property
    def state(self) -> EditorState:
        """Everything that editing changes, as a value. Setting it serves that one and forgets what could be undone."""
        return self._state

    @state.setter
    def state(self, state: EditorState) -> None:
        self._set_state(state)
        self.routing.numbering += 1  # another editor's memories, for all that is known
        self._undo = []

    @in_turn
    def _set_state(self, state: EditorState) -> None:
        self._serve(state, self._packs, self._active)

    @in_turn
    def reserve(self, memories: int) -> None:
        """Make room for so many memories, those that are served included, so that edits change no buffer's shape or
        address: what `torch.compile` or a CUDA graph made of the model serves them as they come, from the first on.

        With more memories than that the room is doubled, and compiled graphs are made anew once. A memory holds
        at most `config.shard_size` edits (fewer where `shard_fill` closes it before, or a rehearsal leaves some to the
        next); in `routing.scores` free slots have columns too, of zeros.

        Raises:
            ConfigError: `memories` is not a positive number, or less than are served.
        """
        projection = self.projection
        projection.reserve(memories, *capacity.planned(self.config, projection, memories))

    def _commit(self, state: EditorState) -> None:
        before = self._state
        self._set_state(state)
        self._undo = [*self._undo, before][-self.config.undo_depth :] if self.config.undo_depth else []

    def checkpoint(self, name: str) -> None:
        """Keep the present state under this `name`, for `rollback(name)`; in memory, not on the disk."""
        self._checkpoints[name] = self._state

    def rollback(self, to: int | str = 1) -> None:
        """Take back the last `to` edits, or everything since the checkpoint named `to`.

        Raises:
            WiseError: there is no such checkpoint, or no state from just that many edits ago is kept.
        """
        if isinstance(to, str):
            if to not in self._checkpoints:
                known = ", ".join(sorted(self._checkpoints)) or "none"
                raise WiseError(f"no checkpoint {to!r}; there are: {known}")
            self._set_state(self._checkpoints[to])
            self._undo = []
            return
        target = len(self._state.reports) - to
        for place in range(len(self._undo) - 1, -1, -1):
            if len(self._undo[place].reports) == target:
                self._set_state(self._undo[place])
                self._undo = self._undo[:place]
                return
        reachable = sorted({len(self._state.reports) - len(s.reports) for s in self._undo})
        raise WiseError(
            f"cannot take back {to} edits; states are kept from {reachable or 'no'} edits ago. Edits of one batch go "
            "together: use batch_size=1, a larger undo_depth, or checkpoint(name)"
        )

    # -- attaching ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        parent, attribute = self.architecture.holder
        holder = self.model.get_submodule(parent)
        wrapped = getattr(holder, attribute), self.routing, self.config.reduction, self.architecture.dtype
        setattr(holder, attribute, DualMemoryLinear(*wrapped))
        self.routing.attach(self.model.get_submodule(self.architecture.decoder))
        methods = {"generate": Generation(self.model.generate, self.routing).generate}
        if hasattr(self.model, "save_pretrained"):
            methods["save_pretrained"] = PlainSaving(self.model.save_pretrained).save_pretrained
        self._methods = {name: self.model.__dict__.get(name) for name in methods}  # the user's own
        self.model.__dict__.update(methods)

    def unload(self) -> nn.Module:
        """Put the original projection object back and return the model, as it was before this editor."""
        parent, attribute = self.architecture.holder
        setattr(self.model.get_submodule(parent), attribute, self.projection.base_layer)
        self.routing.detach()
        for name, own in self._methods.items():
            del self.model.__dict__[name]
            if own is not None:
                self.model.__dict__[name] = own
        return self.model

    def __repr__(self) -> str:
        held = sum(not report.superseded for report in self._state.reports)
        what = f"{type(self.model).__name__}, layer {self.architecture.layer}"
        return f"WiseEditor({what}: {held} edits in {len(self.memories)} memories)"


def _superseded(by: str, contradicting: bool) -> str:
    return f"superseded by {by}" + (", which contradicts it" if contradicting else ", a duplicate")


@contextmanager
def _progress(show: bool, total: int) -> Iterator:
    if not show:
        yield lambda count: None
        return
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
    except ImportError as error:
        raise WiseError("progress=True needs rich: pip install 'wise_fast[cli]'") from error
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("editing", total=total)
        yield lambda count: bar.advance(task, count)
