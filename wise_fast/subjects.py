"""Scope by the subject: an edit is about something, and a prompt that does not name it is none of its business.

A question about one entity looks to a memory much like the same question about another: all but the name is known. On
the demo model no statistic of its activations told the two apart, while paraphrases name what they are about. So each
memory keeps the tokens of its edits' subjects, as they are written where the prompt has them, alone, and inside of a
sentence. Of a name, a prompt has the first token or not, and each further one behind the one before it or not. One that
has a share s of them has to be louder by s to the power of -3, and one that has none of any is out of scope, however
loud. One that has all of them may be the quieter the longer it is, down to .4: a passage about the subject is mostly
about what else there is to say of it, and its mean score shows that.

What is asked of the subject is another question. Some models have put it together where the prompt ends: there the last
tokens of different edits have little in common, those of paraphrases much. Others end in a question mark like any
other. So an edit also keeps what its prompt's last token activates, and a memory whose edits differ there takes prompts
only that end like the edit which they name. On all models an edit's own prompt ends as it does, to the bit: of several
memories those whose edits a prompt ends less like have to be louder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wise_fast import tokens
from wise_fast.data import Edit
from wise_fast.scope import last_of

WIDTH = 16  # tokens of a name that are kept
SPELLINGS = 4  # of a subject, at most
ANY = -1  # stands for a token that every prompt has
_POWER = 3
_QUESTION, _QUIETEST = 16, 0.4  # tokens of a prompt that is mostly name; what a passage's threshold is multiplied by
_ALIKE, _DIFFERENT = 0.65, 0.3  # cosines of endings: of a paraphrase at least; of different edits, the median at most
_SAME = 1e-5  # less than this from a cosine of 1 is the same ending: in half precision, of another batch
_SAMPLE = 128  # edits of a memory whose endings are compared
_FEW = 4  # fewer endings than these say nothing yet
# What a prompt has is a bitmap, in which tokens and pairs share places by chance: the longer, the larger it has to be.
_SHORT, _FEW_PLACES, _PLACES = 256, 1 << 18, 1 << 22
_NEVER = _PLACES  # a place that no prompt has
# Where a subject is the first words of a passage, and no more is asked, the last of them are not of its name.
_SMALL = r"(?:an?|also|and|are|as|for|ha(?:s|ve)|in|is|known|o[fnr]|th(?:at|e)|to|w(?:as|ere|hich|ho|ith))"
_LEADING_ON = re.compile(rf"(?:[\s,;:]+{_SMALL})*[\s,;:]*$")
_SAYS_NOTHING = re.compile(rf"(?:{_SMALL}|[\W_]+)(?:\s+(?:{_SMALL}|[\W_]+))*", re.IGNORECASE)
_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B


def find_subject(prompt: str, subject: str | None) -> tuple[int, int] | None:
    """Where a prompt names its subject, as (start, end).

    Without a given subject that the prompt has, the longest run of capitalised words behind the first word stands for
    it; None where there is none.
    """
    found = _search(prompt, subject) if subject else None
    if found is None:
        runs = list(re.finditer(r"(?<=\s)(?:[A-Z0-9][^\s?]*)(?:\s+[A-Z0-9][^\s?]*)*", prompt))
        found = max(runs, key=lambda run: run.end() - run.start(), default=None)
    return None if found is None else found.span()


def _search(prompt: str, subject: str) -> re.Match | None:
    """The subject as a word rather than a part of one, spelled alike rather than not."""
    part = re.escape(subject)
    for pattern, flags in (
        (rf"(?<!\w){part}(?!\w)", 0),
        (rf"(?<!\w){part}(?!\w)", re.IGNORECASE),
        (part, re.IGNORECASE),
    ):
        found = re.search(pattern, prompt, flags)
        if found is not None:
            return found
    return None


def spellings(tokenizer, edit: Edit) -> list[tuple[int, ...]]:
    """The tokens of an edit's subject, in each of the ways in which it may be written: at most `SPELLINGS`, each of one
    to `WIDTH`. Of an edit that names nothing, one of `ANY` token: every prompt may be about it."""
    given = _search(edit.prompt, edit.subject) if edit.subject else None
    said = edit.prompt if given or not edit.messages else edit.messages[-1].content
    place = given.span() if given else find_subject(said, None)
    name = "" if place is None else said[slice(*place)].strip()
    name = _trimmed(name) if name == said.strip() else name
    here = edit.prompt.find(name, place[0]) if name and said is edit.prompt else edit.prompt.rfind(name)
    if not name or here < 0:
        return [(ANY,)]
    written = [(edit.prompt[:here], name, edit.prompt[here + len(name) :])]
    written += [("", name, ""), ("of ", name, ""), ("of ", name.lower(), "")]
    found = [_between(tokenizer, *parts) for parts in written]
    return list(dict.fromkeys(row for row in found if row)) or [(ANY,)]


def _trimmed(name: str) -> str:
    """A name without the comma, or the small words, that lead on to what is said of it; as it is if no more is left."""
    found = _LEADING_ON.sub("", name, count=1)
    return name if not found or _SAYS_NOTHING.fullmatch(found) else found


def _between(tokenizer, before: str, name: str, behind: str) -> tuple[int, ...]:
    """The tokens of a text that are neither of `before` nor of `behind`, at least the one behind those of `before`."""
    whole, start, end = (tokens.encode(tokenizer, text) for text in (before + name + behind, before, behind))
    first = _alike(whole, start)
    last = len(whole) - _alike(whole[first + 1 :][::-1], end[::-1])
    return whole[first:last][-WIDTH:]


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Names:
    """What the edits of a memory are about.

    Attributes:
        tokens: [V, WIDTH] int64 tokens of subjects, padded with `ANY`.
        about: [V] int64, the edit whose subject each is, a row of `endings`.
        endings: [E, d_ff] fp32, what the last token of each edit's prompt activates.
        limit: least cosine to its edit's ending that a prompt in scope has; -1 where endings tell nothing.
    """

    tokens: Tensor
    about: Tensor
    endings: Tensor
    limit: float = -1.0

    @classmethod
    def of(cls, rows: Sequence[Sequence[Sequence[int]]], endings: Tensor) -> Names:
        """Of these edits: the rows of `spellings` of each, and their endings."""
        flat = [(e, tuple(row) + (ANY,) * (WIDTH - len(row))) for e, some in enumerate(rows) for row in some]
        tokens = torch.tensor([row for _, row in flat], dtype=torch.int64, device=endings.device)
        about = torch.tensor([e for e, _ in flat], dtype=torch.int64, device=endings.device)
        return cls(tokens.reshape(-1, WIDTH), about, _rounded(endings)).limited()

    @classmethod
    def open(cls, edits: int, d_ff: int, device: torch.device | str) -> Names:
        """Of edits of which nobody knows what they are about."""
        return cls.of([[(ANY,)]] * edits, torch.zeros(edits, d_ff, device=device))

    def without(self, rows: Collection[int]) -> Names:
        """With no name and no ending of these edits, rows of `endings`; the others keep their places."""
        gone = torch.zeros(len(self.endings), dtype=torch.bool, device=self.about.device)
        gone[list(rows)] = True
        kept = ~gone[self.about]
        endings = torch.where(gone[:, None], 0.0, self.endings)
        return Names(self.tokens[kept], self.about[kept], endings).limited()

    def only(self, rows: Sequence[int]) -> Names:
        """Of these edits alone, rows of `endings`, in this order."""
        place = torch.full((len(self.endings),), -1, device=self.about.device)
        place[list(rows)] = torch.arange(len(rows), device=place.device)
        about = place[self.about]
        return Names(self.tokens[about >= 0], about[about >= 0], self.endings[list(rows)]).limited()

    def join(self, *others: Names) -> Names:
        """Of the edits of all of them, these first, as those of one memory."""
        return Names(*together((self, *others))).limited()

    def limited(self) -> Names:
        """With the limit that the endings give, of at most `_SAMPLE` of them, evenly spread."""
        told = self.endings[self.endings.any(-1)]
        unit = torch.nn.functional.normalize(told[:: max(1, -(-len(told) // _SAMPLE))], dim=-1)
        count = len(unit)
        others = (unit @ unit.t())[~torch.eye(count, dtype=torch.bool, device=unit.device)]
        tells = count >= _FEW and float(others.median()) <= _DIFFERENT
        return replace(self, limit=_ALIKE if tells else -1.0)

    def to(self, device: torch.device | str) -> Names:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("tokens", "about", "endings")})

    def are_sound(self, edits: int, d_ff: int) -> bool:
        """Whether they are of so many edits, and serving reads what it should, in a projection of `d_ff` inputs."""
        tokens, about, endings = self.tokens, self.about, self.endings
        sound = tokens.ndim == 2 and tokens.shape[1] == WIDTH and about.shape == tokens.shape[:1]
        sound = sound and tokens.dtype == about.dtype == torch.int64 and endings.shape == (edits, d_ff)
        sound = sound and bool((tokens >= ANY).all() and (about >= 0).all() and (about < len(endings)).all())
        return sound and bool(endings.isfinite().all()) and -1 <= self.limit <= 1


def extended(
    known: Names | None, edits: Sequence[int], stale: Collection[int], new: Names | None, endings: Tensor
) -> Names | None:
    """Names of a memory that learns more.

    Args:
        known: its names, one row of endings for each of its `edits`; of those in `stale` no name is kept.
        new: of what it learns; None where scope does not ask.
        endings: [E, d_ff] of what it learns.
    """
    if known is None and (new is None or not edits):
        return new
    if known is None or new is None:  # taught under other settings: nobody knows what some are about
        known = Names.open(len(edits), endings.shape[1], endings.device) if known is None else known
        new = Names.open(*endings.shape, endings.device) if new is None else new
    rows = [row for row, edit in enumerate(edits) if edit in stale]
    return (known.without(rows) if rows else known).join(new)


def together(every: Sequence[Names]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the edits that they are about, and endings, one behind the other."""
    first = torch.tensor([0, *(len(names.endings) for names in every[:-1])]).cumsum(0).tolist()
    about = torch.cat([names.about + start for names, start in zip(every, first, strict=True)])
    return torch.cat([n.tokens for n in every]), about, torch.cat([n.endings for n in every])


def _rounded(endings: Tensor) -> Tensor:
    """As half precision holds them, of the largest magnitude 1: their direction is all that counts."""
    endings = endings.float()
    return (endings / endings.abs().amax(-1, keepdim=True).clamp_min(1e-12)).half().float()


def places(names: Tensor) -> Tensor:
    """[V, WIDTH] int64: where in the bitmap a prompt has these names' first tokens and pairs, `ANY` for padding."""
    before = torch.nn.functional.pad(names, (1, 0), value=ANY)[:, :-1]
    return torch.where(names < 0, ANY, _place(before, names))


def free(rows: int, device: torch.device | str) -> Tensor:
    """[rows, WIDTH] int64: places of names that no prompt has."""
    return torch.full((rows, WIDTH), _NEVER, dtype=torch.int64, device=device)


def _place(before: Tensor | int, token: Tensor) -> Tensor:
    return ((before + 2) * _FIRST + token * _SECOND) % _PLACES


def _shares(ids: Tensor, mask: Tensor, names: Tensor) -> Tensor:
    """[B, V] fp32, the share of each name that each sequence has among its prompt tokens. A whole name in a passage
    counts for more than 1."""
    there = torch.cat([_place(ANY, ids), _place(ids[:, :-1], ids[:, 1:])], 1)
    prompt = torch.cat([mask, mask[:, 1:] & mask[:, :-1]], 1)
    size = _FEW_PLACES if ids.shape[1] <= _SHORT else _PLACES
    seen = torch.zeros(ids.shape[0], size + 1, dtype=torch.bool, device=names.device)
    seen = seen.scatter(1, torch.where(prompt, there % size, size), torch.ones_like(prompt))
    real = names >= 0
    missing = (real & ~(seen[:, names.clamp_min(0) % size] & (names < _NEVER))).sum(-1)
    share = 1.0 - missing.float() / real.sum(-1).clamp_min(1)
    length = mask.sum(1, keepdim=True).float() / _QUESTION
    whole = length.sqrt().clamp(1.0, 1 / _QUIETEST) ** (1 / _POWER)
    return torch.where((missing == 0) & real.any(-1), whole, share)


def named(
    thresholds: Tensor,
    ids: Tensor,
    mask: Tensor,
    a: Tensor,
    names: Tensor,
    about: Tensor,
    endings: Tensor,
    alike: Tensor,
    owners: Tensor,
) -> Tensor:
    """Thresholds [B, J] of sequences that name a share of a subject, and end as its edit does. On the device, no sync.

    With s the share (`_shares`) and c the cosine of endings, the largest each of the edits of a memory
    that are named, a threshold is multiplied by `s^-3 sqrt((1 - c) / min_j (1 - c_j))`, the least over memories that
    are open to the sequence.

    Args:
        thresholds: [J], or [B, J].
        ids, mask: [B, T], the sequences' tokens and which of them are prompt.
        a: [B*T, d_ff] activations.
        names: [V, WIDTH] of `places`.
        about: [V] int64, the edit of each.
        endings: [E, d_ff] fp32 of the edits, of length 1 or 0, and `alike` [E] the least cosines to them.
        owners: [E] int64, the memory of each.
    """
    if ids.shape[1] == 0:
        return thresholds
    batch, share = ids.shape[0], _shares(ids.to(names.device), mask, names)
    share = share.new_zeros(batch, len(owners)).scatter_reduce(1, about.expand(batch, -1), share, "amax")
    last = a.unflatten(0, mask.shape)[torch.arange(batch, device=a.device), last_of(mask)].float()
    with torch.autocast(a.device.type, enabled=False):  # half of a float's digits do not tell the same from the like
        cosine = torch.nn.functional.normalize(last, dim=-1) @ endings.t()
    share = torch.where(cosine < alike, 0.0, share)
    owners, none = owners.expand(batch, -1), share.new_zeros(batch, thresholds.shape[-1])
    most = none.scatter_reduce(1, owners, share, "amax")
    thresholds = torch.where(most > 0, thresholds / most**_POWER, torch.inf)
    nearest = torch.where((share > 0) & endings.any(-1), cosine, -1.0)
    nearest = (none - 1.0).scatter_reduce(1, owners, nearest, "amax")
    told = (nearest > -1.0) & thresholds.isfinite()
    gap = (1.0 - nearest).clamp_min(_SAME).sqrt()
    return torch.where(told, thresholds * gap / torch.where(told, gap, torch.inf).amin(1, keepdim=True), thresholds)
