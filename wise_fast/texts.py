"""Activations of prompts that an edit must not be heard on: the negatives of the margin loss (eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Unrelated prompts that edits must leave quiet.

    Attributes:
        names: the prompts.
        a: [n, d_ff] activations of their tokens.
        text: [n] int64, each token's text.
        limit: [count] fp32, how loud each may be, in multiples of the margin alpha.
    """

    names: tuple[str, ...]
    a: Tensor
    text: Tensor
    limit: Tensor

    def join(self, other: Texts) -> Texts:
        """Both, these first."""
        text = torch.cat([self.text, other.text + len(self.names)])
        return Texts(self.names + other.names, torch.cat([self.a, other.a]), text, torch.cat([self.limit, other.limit]))

    def only(self, places: list[int]) -> Texts:
        """Those at these places, in order."""
        chosen = torch.tensor(places, dtype=torch.long, device=self.text.device)
        moved = torch.full((len(self.names),), -1, device=self.text.device)
        moved[chosen] = torch.arange(len(places), device=self.text.device)
        kept = moved[self.text] >= 0
        return Texts(tuple(self.names[i] for i in places), self.a[kept], moved[self.text[kept]], self.limit[chosen])
