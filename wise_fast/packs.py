"""Packs: saved edits that one editor serves beside its own, all in one bank.

A request asks for one pack, or for nothing and gets the active ones. What it may be answered from is a matter of
thresholds alone: each row of `limits` [R, J] has the memories' thresholds where its pack holds them and infinity, which
closes a memory, elsewhere. So a batch that asks for many packs takes the same pass as one that asks for none, which
costs what it did, and what is asked for or active is data, not code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from wise_fast import fingerprint, hub, storage
from wise_fast.config import WiseConfig
from wise_fast.errors import PackError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.memory import Bank, SideMemory, alike
from wise_fast.pack_rows import BASE, OWN, ROWS, known
from wise_fast.routing import Routing
from wise_fast.state import EditorState, EditReport
from wise_fast.turns import change


@dataclass(frozen=True)
class Pack:
    """Saved edits as they are served: memories of one kind of score, and the reports of what they hold."""

    memories: tuple[SideMemory, ...] = ()
    reports: tuple[EditReport, ...] = ()


class Packs:
    """The part of an editor that serves several packs at once. Its own memories are the pack "default"."""

    config: WiseConfig
    projection: DualMemoryLinear
    routing: Routing
    _state: EditorState
    _packs: Mapping[str, Pack]
    _active: tuple[str, ...]
    _order: tuple[tuple[str, int], ...]

    def load_pack(
        self, directory: str | os.PathLike, name: str, *, revision: str | None = None, token: str | None = None
    ) -> None:
        """Serve the edits saved in `directory` to requests that ask for `name`; to others once it is active.

        It is read while the model goes on answering. Each of its memories has the scores and thresholds that it has
        when it is served alone, also where the editor's own are of the other kind (`WiseConfig.route_by`).

        Args:
            directory: one that `save_pretrained` wrote, or the id of a repository that `push_to_hub` made.
            name: to ask for it by.
            revision, token: of that repository.

        Raises:
            PackError: the name is taken; the pack's edits are of another layout or reduction than the editor's; or an
                edit, a generation or a `packs_for` is at work in this thread.
            StorageError: the directory is not one, as `from_pretrained` says, or was made for another base model, dtype
                or layer. Nothing has changed then.
        """
        self._require_new(name)
        device = self.projection.device
        saved = storage.load(hub.local(directory, revision, token))
        fingerprint.compare(saved.base, fingerprint.describe(self.model, self.architecture))
        self._require_fitting(name, saved)
        state = saved.state_on(device)
        self._add_pack(name, Pack(tuple(alike(state.memories, saved.config.route_by)), state.reports))

    @change
    def _add_pack(self, name: str, pack: Pack) -> None:
        self._require_new(name)
        self._serve(self._state, {**self._packs, name: pack}, self._active)

    @change
    def delete_pack(self, name: str) -> None:
        """Serve a loaded pack no more. One that was active is active no more; its directory is left alone.

        Args:
            name: of one that was loaded.

        Raises:
            PackError: there is no such pack; it is the editor's own (`rollback` undoes edits); or an edit, a generation
                or a `packs_for` is at work in this thread. Nothing has changed then.
        """
        if name in ROWS:
            raise PackError(f"{name!r} is no loaded pack and cannot be deleted; set_active() says who is asked")
        known(name, self._packs)
        left = {other: pack for other, pack in self._packs.items() if other != name}
        self._serve(self._state, left, tuple(other for other in self._active if other != name))

    @change
    def set_active(self, names: Sequence[str]) -> None:
        """Say which packs answer requests that ask for none: at first ["default"], the editor's own edits.

        Changes data in place: nothing is compiled again, and no memory is moved.

        Args:
            names: of `packs`, in any order; [] leaves the base model.

        Raises:
            PackError: one is not known; or an edit, a generation or a `packs_for` is at work in this thread. Nothing
                has changed then.
        """
        if isinstance(names, str):
            raise PackError(f"the active packs must be a list of names, got {names!r}; write [{names!r}]")
        rows, projection = self.routing.packs.names, self.projection
        active = tuple(dict.fromkeys(known(name, rows) for name in names if name != BASE))
        projection.activate([rows[name] for name in (BASE, *active)])
        self._active = active

    @contextmanager
    def packs_for(self, names: Sequence[str]) -> Iterator[None]:
        """Answer each sequence of the forwards and generations inside from the pack that is named for it.

        `model.generate(..., pack_names=names)` does the same for one generation, and is the way where another thread
        generates: other threads wait for the block to end.

        Args:
            names: one a sequence, of `packs`, or "__base__" for the main memory alone.

        Raises:
            PackError: a pack is not known; or, in a forward or generation, there are not as many names as sequences.
        """
        with self.routing.turn, self.routing.packs.naming(names, device=self.projection.device):
            yield

    @property
    def packs(self) -> dict[str, list[EditReport]]:
        """The reports of each pack's edits by its name, the editor's own ("default") first."""
        return {OWN: list(self._state.reports)} | {name: list(pack.reports) for name, pack in self._packs.items()}

    @property
    def active(self) -> list[str]:
        """Names of the packs that answer requests that ask for none."""
        return list(self._active)

    def _serve(self, state: EditorState, packs: Mapping[str, Pack], active: tuple[str, ...]) -> None:
        """Serve these from now on; a failure changes nothing."""
        names = {**ROWS, **{name: row for row, name in enumerate(packs, len(ROWS))}}
        bank, order = self._joined(state, packs, active, names)
        try:
            self.projection.set_bank(bank)
        except BaseException:
            if self.projection.reserved:  # it may be half copied
                before, _ = self._joined(self._state, self._packs, self._active, self.routing.packs.names)
                self.projection.set_bank(before)
            raise
        if order[: len(self._order)] != self._order:
            self.routing.numbering += 1
        self.routing.packs.names = names
        self._state, self._packs, self._active, self._order = state, packs, active, order

    @torch.inference_mode(False)  # what is active is changed in place later
    def _joined(
        self, state: EditorState, packs: Mapping[str, Pack], active: tuple[str, ...], names: Mapping[str, int]
    ) -> tuple[Bank | None, tuple[tuple[str, int], ...]]:
        """All memories as one bank, and of each its pack and its first edit, which tell it from the others."""
        groups = {OWN: alike(state.memories, self.config.route_by)}
        groups |= {name: list(pack.memories) for name, pack in packs.items()}
        order = tuple((name, memory.edits[0]) for name, memories in groups.items() for memory in memories)
        bank = Bank.join([memory for memories in groups.values() for memory in memories], self.projection.dtype)
        if bank is not None:
            bank = by_pack(bank, [names[name] for name, _ in order], len(names), [names[n] for n in (BASE, *active)])
        return bank, order

    def _require_own(self) -> None:
        if OWN not in self._active:
            raise PackError(
                f"the editor's own edits are not active (active: {list(self._active)}), so what is taught would not be "
                f"answered; set_active([{OWN!r}, ...]) first"
            )

    def _require_new(self, name: str) -> None:
        if not isinstance(name, str) or not name.strip():
            raise PackError(f"a pack's name must be a string that is not empty, got {name!r}")
        if name in ROWS:
            meaning = "no pack" if name == BASE else "the edits made here"
            raise PackError(f"a pack cannot be called {name!r}, which asks for {meaning}; choose another name")
        if name in self.routing.packs.names:
            raise PackError(f"there is a pack {name!r} already; delete_pack({name!r}) first, or choose another name")

    def _require_fitting(self, name: str, saved: storage.Saved) -> None:
        facts = [("reduction", saved.config.reduction, self.config.reduction)]
        facts += [("layout", memory.layout, self.config.layout) for memory in saved.state.memories]
        for setting, given, wanted in facts:
            if given != wanted:
                raise PackError(
                    f"pack {name!r} has {setting} {given!r} and this editor {wanted!r}, which cannot be served "
                    f"together; load it into an editor made with WiseConfig({setting}={given!r})"
                )


def by_pack(bank: Bank, owners: Sequence[int], packs: int, active: Sequence[int]) -> Bank:
    """The bank with `limits` [packs, J], what each pack's row opens, and as thresholds what these rows together open.

    Args:
        owners: row of each memory's pack, J of them.
        packs: number of names that can be asked for.
    """
    rows = torch.arange(packs, device=bank.thresholds.device)
    mine = torch.tensor(owners, device=rows.device) == rows[:, None]
    limits = torch.where(mine, bank.thresholds, torch.inf)
    return replace(bank, limits=limits, thresholds=limits[list(active)].amin(0))
