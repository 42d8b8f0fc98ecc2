"""The training rows of one batch of edits, captured and held in groups of like length.

Every edit has the same variants of its prompt: the bare one, shortened ones of about its length, and ones behind a
prefix, about twice as long. Prompts differ as much again: padded to the longest, half of a step would be padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wise_fast import objective
from wise_fast.capture import Capture
from wise_fast.memory import SideMemory
from wise_fast.scope import last_of
from wise_fast.tail import Tail
from wise_fast.tokens import Batch, Example, collate
from wise_fast.vocabulary import Likely

_LIKE = 1.3  # how much longer than the bare prompts a variant may be, to be drawn in the same steps as those
_PER_FORWARD = 32  # what one more forward costs, in tokens
_PER_GROUP = 128  # the same of one more group: each step draws few of its rows, and pays little of its padding


@dataclass(frozen=True)
class Look:
    """What a forward said of some rows.

    Attributes:
        nll: [b] mean NLL of each row's labels, weighted as in the loss.
        score: [b] routing score.
        right: [b] bool, every label is the argmax.
        logits: [M, V] at the labels' positions.
        labels: [M] places of those in the group's labels.
    """

    nll: Tensor
    score: Tensor
    right: Tensor
    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Labels:
    """Labels of some rows of a group.

    Attributes:
        chosen, row, positions: [M], their places in the group's labels, their rows, and their places in the rows'
            tokens.
        full: whether their logits are over the whole vocabulary.
    """

    chosen: Tensor
    row: Tensor
    positions: Tensor
    full: bool


@dataclass(frozen=True)
class Part:
    """Some rows of a group, and what the memory responds to them.

    Attributes:
        places: of the rows in the group.
        response: [b*T, d_out] to the `tokens` of those places.
        silent: [b*T] bool, of those the ones whose response the model is not given; None where it is given all.
    """

    group: Group
    places: Sequence[int]
    response: Tensor
    silent: Tensor | None = None

    @property
    def given(self) -> Tensor:
        """[b*T, d_out], the response that the model is given."""
        return self.response if self.silent is None else self.response.masked_fill(self.silent[:, None], 0.0)


class Group:
    """Rows of like length.

    Attributes:
        numbers: of the rows, among all rows of the batch.
        batch, capture: of these rows.
        selected, features, before: per token [n*T, K or d_ff]: what the memory reads, the same protected, and the
            response [n*T, d_out] of what the memory held; the latter two as of the row's last `begin`.
        weight: [M] of each label in its row's NLL.
        likely, head: part of the vocabulary that steps compute, and its weights; None for all of it.
    """

    def __init__(self, tail: Tail, memory: SideMemory, numbers: list[int], batch: Batch, first_token: float = 1.0):
        self.tail, self.numbers, self.batch = tail, numbers, batch
        self.capture = tail.capture(batch.input_ids, batch.attention_mask)
        self.lengths = batch.attention_mask.sum(1).tolist()
        self.selected = memory.select(self.capture.a)
        self.features = torch.zeros_like(self.selected)
        self.before = self.selected.new_zeros(len(self.selected), memory.shape[0])
        self.weight = objective.answer_weight(batch.row, first_token)
        self.likely: Likely | None = None
        self.head: tuple[Tensor, Tensor | None] | None = None

    @property
    def size(self) -> int:
        """Bytes of what is held of its tokens."""
        own = [t for t in (self.selected, self.features, self.before) if t is not self.capture.a]
        return self.capture.size + sum(t.numel() * t.element_size() for t in own)

    def begin(self, places: Sequence[int], memory: SideMemory, p: Tensor | None) -> None:
        """Take what the memory holds, and what it protects, for the state from which steps train these rows."""
        tokens = self.tokens(places)
        selected = self.selected[tokens]
        self.features[tokens] = selected if p is None else selected @ p
        self.before[tokens] = memory.respond(selected)

    def settle(self, places: Sequence[int], half: Tensor, kept: Tensor) -> None:
        """The same where since these rows' `begin` `P` has lost `H^T H`, and the memory has taken `H^T kept`."""
        tokens = self.tokens(places)
        shares = self.selected[tokens] @ half.t()
        self.features[tokens] = torch.addmm(self.features[tokens], shares, half, alpha=-1.0)
        self.before[tokens] = torch.addmm(self.before[tokens], shares, kept)

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.batch.input_ids.shape[1]

    def width(self, places: Sequence[int]) -> int:
        """Tokens of the longest of these rows: a look at them needs no more padding than that."""
        return max(self.lengths[place] for place in places)

    def tokens(self, places: Sequence[int]) -> Tensor:
        """Places of these rows' tokens among the group's, each row padded to the longest of them."""
        start = torch.tensor(places, device=self.selected.device)[:, None] * self.length
        return (start + torch.arange(self.width(places), device=start.device)).flatten()

    def seen(self) -> Tensor:
        """[n*T] bool, tokens that are not padding."""
        return self.batch.attention_mask.flatten().bool()

    def asked(self) -> Tensor:
        """[n*T] bool, tokens that the edit is about: of the prompt behind a prefix, and of the answer."""
        begun = self.batch.prompt_mask.cummax(1).values
        return begun.flatten() & self.seen()

    def endings(self, places: Sequence[int]) -> Tensor:
        """[b*T] bool, which of these rows' `tokens` is the last of its prompt."""
        prompt = self.batch.prompt_mask[torch.tensor(places, device=self.selected.device), : self.width(places)]
        return torch.nn.functional.one_hot(last_of(prompt), prompt.shape[1]).bool().flatten()

    def ending(self, place: int) -> Tensor:
        """[d_ff], what the last token of a row's prompt activates."""
        return self.capture.a[self.tokens([place])[self.endings([place])]][0]

    def key(self, place: int) -> Tensor:
        """[n, K] activations of a row's prompt, for thresholds."""
        tokens = self.tokens([place])
        return self.selected[tokens[self.batch.prompt_mask.flatten()[tokens]]]

    def replay(self, places: Sequence[int], response: Tensor, labels: Labels) -> tuple[Capture, Tensor, Tensor]:
        """What `Tail.replay_all` wants of these rows, given the side response of their `tokens`."""
        capture = self.capture.rows(torch.tensor(places, device=response.device), self.width(places))
        return capture, (capture.main.float() + response).to(capture.main.dtype), labels.positions

    def judge(self, places: Sequence[int], response: Tensor, labels: Labels, logits: Tensor, reduction: str) -> Look:
        """What a replay said of these rows."""
        chosen, row, count = labels.chosen, labels.row, len(places)
        if labels.full:
            wanted = self.batch.labels[chosen]
            nll = objective.token_nll(logits, wanted)
        else:
            wanted = self.likely.places[chosen]
            nll = objective.restricted_nll(logits, wanted, self.likely.rest[chosen])
        right = objective.row_mean((logits.argmax(-1) == wanted).float(), row, count) > 0.999
        mask = self.batch.prompt_mask[torch.tensor(places, device=response.device), : self.width(places)]
        score = objective.scores(response, mask, reduction)
        return Look(objective.row_mean(nll, row, count, self.weight[chosen]), score, right, logits, chosen)

    def labels(self, places: Sequence[int], full: bool) -> Labels:
        """Of these rows; all of the vocabulary also where no part of it was chosen."""
        index, width = torch.tensor(places, device=self.selected.device), self.width(places)
        place = torch.full((len(self.numbers),), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        chosen = (place[self.batch.row] >= 0).nonzero()[:, 0]
        row = place[self.batch.row[chosen]]
        positions = row * width + self.batch.positions[chosen] % self.length
        return Labels(chosen, row, positions, full or self.likely is None)


class Rows:
    """All rows of a batch: row `edit * variants + variant`, the bare prompt being variant 0.

    A variant that comes out like an earlier one of its edit (no word was dropped) is left out.

    Args:
        examples: per edit its rows, the bare prompt first; every edit has the same number.
        first_token: weight of an answer's first token in its row's NLL.

    Attributes:
        kinds: the variants of like length, those with the bare prompt first.
        groups: the rows in few groups, shortest first, so that little is padded.
    """

    def __init__(
        self,
        tail: Tail,
        memory: SideMemory,
        examples: Sequence[Sequence[Example]],
        pad: int,
        first_token: float = 1.0,
    ):
        self.edits, self.variants = len(examples), len(examples[0])
        self.kinds = _kinds(examples)
        self._distinct = [[v for v, row in enumerate(rows) if row not in rows[:v]] for rows in examples]
        rows = {n: examples[n // self.variants][n % self.variants] for n in self.numbers(range(self.edits))}
        kept, lengths = list(rows), [len(row.prompt) + max(len(row.target) - 1, 0) for row in rows.values()]
        self.groups = []
        for places in buckets(lengths, _PER_GROUP):
            numbers = [kept[place] for place in places]
            batch = collate([rows[n] for n in numbers], pad, memory.values.device)
            self.groups.append(Group(tail, memory, numbers, batch, first_token))
        self._place = {n: (group, i) for group in self.groups for i, n in enumerate(group.numbers)}

    @property
    def size(self) -> int:
        """Bytes of what the groups hold of their tokens."""
        return sum(group.size for group in self.groups)

    def split(self, numbers: Sequence[int]) -> list[tuple[Group, list[int]]]:
        """These rows by group, as (group, places in it); groups that have none are left out."""
        found: dict[Group, list[int]] = {}
        for number in numbers:
            group, place = self._place[number]
            found.setdefault(group, []).append(place)
        return list(found.items())

    def numbers(self, edits: Sequence[int]) -> list[int]:
        """All rows of these edits."""
        return [edit * self.variants + variant for edit in edits for variant in self._distinct[edit]]

    def bare(self) -> list[int]:
        return [edit * self.variants for edit in range(self.edits)]

    def key(self, edit: int) -> Tensor:
        """[n, K] activations of an edit's bare prompt."""
        group, place = self._place[edit * self.variants]
        return group.key(place)

    def endings(self) -> Tensor:
        """[edits, d_ff], what the last token of each edit's bare prompt activates."""
        places = (self._place[number] for number in self.bare())
        return torch.stack([group.ending(place) for group, place in places])

    def taught(self, edits: Sequence[int]) -> Tensor:
        """[n, K] activations of these edits' prompts and answers in every row, for protection. Prefixes are any text:
        they would take most of the room, and nobody asks for them again."""
        return torch.cat([group.selected[tokens] for group, tokens in self._taught(edits)])

    def protected(self, edits: Sequence[int]) -> Tensor:
        """The same protected, as of these edits' last `begin`."""
        return torch.cat([group.features[tokens] for group, tokens in self._taught(edits)])

    def _taught(self, edits: Sequence[int]) -> list[tuple[Group, Tensor]]:
        parts = [(group, group.tokens(places)) for group, places in self.split(self.numbers(edits))]
        return [(group, tokens[group.asked()[tokens]]) for group, tokens in parts]

    def restrict(self, looks: Sequence[tuple[Group, Sequence[int], Look]]) -> None:
        """Let later looks compute the likely tokens alone, given full looks at the bare prompts.

        The n-th label of any other row takes the rest of the vocabulary from the bare row's n-th. What was likely
        before still counts as likely.
        """
        logits = torch.cat([look.logits for *_, look in looks])
        labels = torch.cat([group.batch.labels[look.labels] for group, _, look in looks])
        more = [group.batch.labels for group in self.groups]
        more += [group.likely.tokens for group in self.groups[:1] if group.likely is not None]
        likely = Likely.of(logits, labels, torch.cat(more))
        head = self.groups[0].tail.head_of(likely.tokens)
        edit = torch.cat([_edits(group, self.variants)[look.labels] for group, _, look in looks])
        order = edit.argsort(stable=True)
        first = torch.searchsorted(edit[order], torch.arange(self.edits, device=edit.device))
        count = torch.bincount(edit, minlength=self.edits)
        for group in self.groups:
            row, owner = group.batch.row, _edits(group, self.variants)
            start = torch.searchsorted(row.contiguous(), torch.arange(len(group.numbers), device=row.device))
            rank = torch.arange(len(row), device=row.device) - start[row]
            source = order[first[owner] + torch.minimum(rank, count[owner] - 1)]
            group.likely, group.head = likely.spread(source, group.batch.labels), head


def look_at(parts: Sequence[Part], reduction: str, full: bool) -> list[Look]:
    """Replay rows of some groups. The LM head is asked once for all of them; `full`: over the whole vocabulary."""
    if not parts:
        return []
    tail, head = parts[0].group.tail, None if full else parts[0].group.head
    labels = [part.group.labels(part.places, full) for part in parts]
    replays = [part.group.replay(part.places, part.given, of) for part, of in zip(parts, labels, strict=True)]
    logits = tail.replay_all(replays, head).split([len(of.chosen) for of in labels])
    seen = zip(parts, labels, logits, strict=True)
    return [part.group.judge(part.places, part.response, *found, reduction) for part, *found in seen]


def _edits(group: Group, variants: int) -> Tensor:
    """The edit of each of the group's labels."""
    return (torch.tensor(group.numbers, device=group.batch.row.device) // variants)[group.batch.row]


def buckets(lengths: Sequence[int], each: int = _PER_FORWARD) -> list[list[int]]:
    """Row numbers by length, cut where padding would cost more than another forward does: `each`, in tokens."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n rows, and where their last bucket begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[cut][0] + (end - cut) * longest + each, cut) for cut in range(end)))
    buckets, end = [], len(order)
    while end:
        buckets.append(sorted(order[best[end][1] : end]))
        end = best[end][1]
    return buckets[::-1]


def _kinds(examples: Sequence[Sequence[Example]]) -> list[list[int]]:
    """Variants by length: those like the bare prompt, and the longer ones."""
    lengths = [sum(len(rows[v].prompt) for rows in examples) for v in range(len(examples[0]))]
    like = [v for v, length in enumerate(lengths) if length <= _LIKE * lengths[0]]
    longer = [v for v in range(len(lengths)) if v not in like]
    return [like, longer] if longer else [like]
