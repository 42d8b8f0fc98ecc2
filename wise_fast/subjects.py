"""Scope by the subject: an edit is about something, and a prompt that does not name it is none of its business.

A question about one entity looks to a memory much like the same question about another: all but the name is known. On
the demo model no statistic of its activations told the two apart, while paraphrases name what they are about. So each
memory keeps the tokens of its edits' subjects, as they are written where the prompt has them, alone, and inside of a
sentence. Of a name, a prompt has the first token or not, and each further one behind the one before it or not. One that
has a share s of them has to be louder by s to the power of -3, and one that has none of any is out of scope, however
loud.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wise_fast import tokens
from wise_fast.data import Edit

WIDTH = 16  # tokens of a name that are kept
SPELLINGS = 4  # of a subject, at most
ANY = -1  # stands for a token that every prompt has
_POWER = 3
_PLACES = 1 << 18  # what a prompt has is a bitmap of so many, in which tokens and pairs of them share places by chance
_PADDING, _NEVER = _PLACES, _PLACES + 1
_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B


def find_subject(prompt: str, subject: str | None) -> tuple[int, int] | None:
    """Where a prompt names its subject, as (start, end).

    Without a given subject that the prompt has, the longest run of capitalised words behind the first word stands for
    it; None where there is none.
    """
    found = re.search(re.escape(subject), prompt, re.IGNORECASE) if subject else None
    if found is None:
        runs = list(re.finditer(r"(?<=\s)(?:[A-Z0-9][^\s?]*)(?:\s+[A-Z0-9][^\s?]*)*", prompt))
        found = max(runs, key=lambda run: run.end() - run.start(), default=None)
    return None if found is None else found.span()


def spellings(tokenizer, edit: Edit) -> list[tuple[int, ...]]:
    """The tokens of an edit's subject, in each of the ways in which it may be written: at most `SPELLINGS`, each of one
    to `WIDTH`. Of an edit that names nothing, one of `ANY` token: every prompt may be about it."""
    said = edit.messages[-1].content if edit.messages else edit.prompt
    place = find_subject(said, edit.subject)
    name = "" if place is None else said[slice(*place)].strip()
    if not name:
        return [(ANY,)]
    here = max(edit.prompt.rfind(name), 0)
    written = [(edit.prompt[:here], name), ("", name), ("of ", name), ("of ", name.lower())]
    found = [_behind(tokenizer, *pair) for pair in written]
    return list(dict.fromkeys(row for row in found if row)) or [(ANY,)]


def _behind(tokenizer, before: str, name: str) -> tuple[int, ...]:
    """The last tokens of a text, those behind `before`."""
    whole, start = (tokens.encode(tokenizer, text) for text in (before + name, before))
    same = next((i for i, (a, b) in enumerate(zip(whole, start)) if a != b), min(len(whole), len(start)))
    return whole[same:][-WIDTH:]


def written(rows: Iterable[Sequence[int]], like: Tensor) -> Tensor:
    """[V, WIDTH] int64 on the device of `like`: rows of tokens, padded with `ANY`."""
    padded = [tuple(row) + (ANY,) * (WIDTH - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=like.device).reshape(-1, WIDTH)


def joined(names: Tensor | None, more: Tensor) -> Tensor:
    """Rows of both, each once, in order."""
    rows = dict.fromkeys(map(tuple, [] if names is None else names.tolist())) | dict.fromkeys(map(tuple, more.tolist()))
    return torch.tensor(list(rows), dtype=torch.int64, device=more.device).reshape(-1, WIDTH)


def are_names(names: Tensor) -> bool:
    """Whether these are rows of `written`."""
    sound = names.ndim == 2 and names.shape[1] == WIDTH and names.dtype == torch.int64
    return sound and bool((names >= ANY).all())


def places(names: Tensor) -> Tensor:
    """[V, WIDTH] int64: where in the bitmap a prompt has these names' first tokens and pairs, `ANY` for padding."""
    before = torch.nn.functional.pad(names, (1, 0), value=ANY)[:, :-1]
    return torch.where(names < 0, ANY, _place(before, names))


def free(rows: int, device: torch.device | str) -> Tensor:
    """[rows, WIDTH] int64: places of names that no prompt has."""
    return torch.full((rows, WIDTH), _NEVER, dtype=torch.int64, device=device)


def _place(before: Tensor | int, token: Tensor) -> Tensor:
    return ((before + 2) * _FIRST + token * _SECOND) % _PLACES


def named(thresholds: Tensor, ids: Tensor, mask: Tensor, names: Tensor, owners: Tensor) -> Tensor:
    """Thresholds [B, J] of sequences that name a share of the memories' subjects. On the device, no sync.

    Args:
        thresholds: [J], or [B, J].
        ids, mask: [B, T], the sequences' tokens and which of them are prompt.
        names: [V, WIDTH] of `places`.
        owners: [V] int64, the memory of each.
    """
    ids, batch = ids.to(names.device), ids.shape[0]
    alone, pairs = _place(ANY, ids), _place(ids[:, :-1], ids[:, 1:])
    there = torch.cat([alone, pairs], 1), torch.cat([mask, mask[:, 1:] & mask[:, :-1]], 1)
    seen = torch.zeros(batch, _NEVER + 1, dtype=torch.bool, device=names.device)
    seen = seen.scatter(1, torch.where(there[1], there[0], _PADDING), torch.ones_like(there[1]))
    real = names >= 0
    found = (seen[:, names.clamp_min(0)] & real).sum(-1) + (~real).all(-1)
    share = found / real.sum(-1).clamp_min(1)
    most = share.new_zeros(batch, thresholds.shape[-1]).scatter_reduce(1, owners.expand(batch, -1), share, "amax")
    return torch.where(most > 0, thresholds / most**_POWER, torch.inf)
