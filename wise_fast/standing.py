"""How the rows of a batch stand: what each was like when last seen, which ones a step draws, what claims to hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wise_fast.config import WiseConfig
from wise_fast.rows import Group, Look, Rows


class Standing:
    """Of all rows of a batch, as steps and looks tell it.

    Args:
        loud: routing score from which a row is loud enough.
        generator: of the order among rows that stand alike.

    Attributes:
        held, nll, seen: per row: whether it was right and loud enough, its NLL, and which step saw it last; 0 is none.
        steps: per edit, how many it was trained in.
        taken: how many there were.
        others: how many augmented prompts a step draws of each edit.
    """

    def __init__(self, rows: Rows, config: WiseConfig, loud: float, generator: torch.Generator):
        self.rows, self.config, self.loud, self.generator = rows, config, loud, generator
        total = rows.edits * rows.variants
        self.held, self.nll, self.seen = [False] * total, [float("inf")] * total, [0] * total
        self.steps, self.taken = [0] * rows.edits, 0
        self.others = min(config.prefixes_per_step, rows.variants - 1)

    def draw(self, active: list[int]) -> list[int]:
        """Rows of one step: of each active edit the bare prompt and a few others, or a few longer ones.

        Where there are longer variants, steps take turns between those and the bare prompt's kind, so that no row is
        padded to another kind's length. Rows that did not hold when last seen come first, then those unseen longest.
        """
        kinds = self.rows.kinds if self.others < self.rows.variants - 1 else [range(self.rows.variants)]
        rows = []
        for edit in active:
            turn = self._turn(edit, kinds)
            drawn = torch.rand(self.rows.variants, generator=self.generator).tolist()
            numbers = [n for n in turn if n % self.rows.variants]
            numbers.sort(key=lambda n: (self.held[n], self.seen[n], drawn[n % self.rows.variants]))
            rows += [n for n in turn if n % self.rows.variants == 0] + numbers[: self.others]
        return rows

    def _turn(self, edit: int, kinds: Sequence[Sequence[int]]) -> list[int]:
        """The edit's rows of the kind that is next; one that is fine leaves its turn to one that is not."""
        first = self.steps[edit] % len(kinds)
        mine = self.rows.numbers([edit])
        turns = [[n for n in mine if n % self.rows.variants in kind] for kind in (*kinds[first:], *kinds[:first])]
        return next((turn for turn in turns if not all(map(self._fine, turn))), turns[0])

    def _fine(self, number: int) -> bool:
        """Whether a row asks for no more training, as last seen."""
        return self.held[number] and self.nll[number] <= self.config.nll

    def note(self, group: Group, places: Sequence[int], look: Look) -> None:
        """Remember what each row was like when last seen."""
        loud = look.score.detach() >= self.loud
        rows = zip(places, (look.right & loud).tolist(), look.nll.tolist(), strict=True)
        for place, held, nll in rows:
            number = group.numbers[place]
            self.held[number], self.nll[number], self.seen[number] = held, nll, self.taken

    def claims(self, edit: int, slack: float = 1.0) -> bool:
        """Whether all rows of an edit, as last seen, are right and loud enough, and their mean NLL is low enough."""
        numbers = self.rows.numbers([edit])
        rows = [n for n in numbers if self.seen[n]]
        # Rows that were never drawn are left to the verification, once there was time to draw them.
        few = len(rows) < len(numbers) and self.steps[edit] < 2 * self.config.min_steps
        if few or not self.seen[edit * self.rows.variants]:
            return False
        mean = sum(self.nll[n] for n in rows) / len(rows)
        return all(self.held[n] for n in rows) and mean <= slack * max(self.config.nll, 0.05)
