"""Which pack each row of a batch asks for: by name outside of a forward, in it by row of `DualMemoryLinear.limits`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from wise_fast.errors import PackError

BASE, OWN = "__base__", "default"  # what asks for no memory, and the editor's own memories
ROWS: Mapping[str, int] = {BASE: 0, OWN: 1}  # loaded packs follow


class PackRows:
    """The packs that may be asked for, and what the present block or generation asks for.

    Attributes:
        names: their rows of `limits`.
        asked: [b] int64 rows of `limits`, one a sequence; None where nothing is asked for.
    """

    def __init__(self):
        self.names: dict[str, int] = dict(ROWS)
        self.asked: Tensor | None = None

    @contextmanager
    def naming(self, names: Sequence[str] | None, sequences: int | None = None, device=None) -> Iterator[None]:
        """Ask for these packs inside, one a sequence; None goes on with what is asked for.

        Args:
            sequences: that there are, where it is known.
            device: where they will be routed, so that no forward waits for a copy.

        Raises:
            PackError: a pack is not known, or there are not as many names as sequences.
        """
        before = self.asked
        asked = before if names is None else self._rows_of(names).to(device)
        if asked is not None and sequences not in (None, len(asked)):
            raise PackError(_uneven(len(asked), sequences))
        self.asked = asked
        try:
            yield
        finally:
            self.asked = before

    def rows(self, batch: int, expanded: bool, device: torch.device) -> Tensor | None:
        """[batch] rows of `limits` of a forward; None when nothing is asked for.

        Args:
            expanded: whether each sequence may have become several rows side by side, as beams and samples do.

        Raises:
            PackError: the forward has other rows than were asked for.
        """
        if self.asked is None:
            return None
        given = self.asked.shape[0]
        if batch == given:
            return self.asked.to(device)
        if not (expanded and given and batch % given == 0):
            raise PackError(_uneven(given, batch))
        return self.asked.to(device).repeat_interleave(batch // given)

    def _rows_of(self, names: Sequence[str]) -> Tensor:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise PackError(f"pack names must be a list of strings, one for each sequence of the batch; got {names!r}")
        return torch.tensor([self.names[known(name, self.names)] for name in names], dtype=torch.int64)


def known(name: str, names: Mapping[str, object]) -> str:
    """The name, if it is one of these; PackError else."""
    if name not in names:
        there = ", ".join(map(repr, names)) or "none"
        raise PackError(f"no pack {name!r}; there are: {there}. load_pack(directory, {name!r}) first")
    return name


def _uneven(named: int, sequences: int) -> str:
    return f"{named} pack names for {sequences} sequences; give one name for each sequence, {BASE!r} for no pack at all"
