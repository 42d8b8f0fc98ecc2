"""What editing asks of the model and its tokenizer: training rows, unrelated texts, and the unit of margins."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from wise_fast import tokens
from wise_fast.architectures import Architecture
from wise_fast.augment import drop_words, sample_texts, swap_subject
from wise_fast.capture import Capture
from wise_fast.chat import reworded
from wise_fast.config import WiseConfig
from wise_fast.data import Edit
from wise_fast.errors import EditDataError
from wise_fast.gradients import require_gradients
from wise_fast.memory import SideMemory
from wise_fast.routing import Routing
from wise_fast.rows import buckets
from wise_fast.subjects import Names, spellings
from wise_fast.tail import Tail
from wise_fast.texts import Texts
from wise_fast.training import Trainer

_QUIET_TEXTS, _QUIET_TOKENS = 16, 16
_QUIET_MOST = 48  # tokens of an unrelated text that are read: its routing score shows early, and padding costs
_REHEARSED = 48  # unrelated texts of earlier edits in the shard that a batch keeps quiet


class Material:
    """The part of an editor that reads the model, which it never changes."""

    model: nn.Module
    config: WiseConfig
    architecture: Architecture
    tail: Tail
    routing: Routing
    stop: int | None
    _watcher: Callable[[], None] | None = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Serve the unedited model inside the block."""
        with self.routing.disabled():
            yield

    @contextmanager
    def watched(self, alive: Callable[[], None]) -> Iterator[None]:
        """Have `alive` called inside the block after every step of a rehearsal and every part that is judged after it:
        that takes long, and others may wait."""
        before, self._watcher = self._watcher, alive
        try:
            yield
        finally:
            self._watcher = before

    def alive(self) -> None:
        """Tell whoever watches."""
        if self._watcher is not None:
            self._watcher()

    def asking(self, prompt_mask: Tensor) -> AbstractContextManager[None]:
        """Tell the router which tokens of the forward inside are prompt: `prompt_mask`, [B, T] bool."""
        return self.routing.prompt(prompt_mask)

    def head_at(self, positions: Tensor) -> AbstractContextManager[None]:
        """Let the LM head see only `positions` of the flattened [B*T] tokens: logits become [1, M, vocabulary]."""
        return self.tail.head_at(positions)

    def require_gradients(self) -> None:
        """Raise UnsupportedModelError unless edits can be trained through what lies behind the projection, and tell the
        tail what that takes."""
        self.tail.give_rows(require_gradients(self.model, self.architecture, self.projection.dtype))

    @property
    def device(self) -> torch.device:
        """Where the edited projection lives."""
        return self.projection.device

    @functools.cached_property
    def _samples(self) -> list[str]:
        """Prefixes, then unrelated texts, sampled from the model with the config's seed."""
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "texts"))
        lengths = [self.config.prefix_tokens] * self.config.prefixes + [_QUIET_TOKENS] * _QUIET_TEXTS
        with self.disabled():
            return sample_texts(self.model, self.tokenizer, lengths, generator)

    @property
    def prefixes(self) -> list[str]:
        """Augmentation texts that the model wrote itself."""
        return self._samples[: self.config.prefixes]

    @functools.cached_property
    def _prefix_tokens(self) -> list[int]:
        return [len(tokens.encode(self.tokenizer, f"{prefix}.")) for prefix in self.prefixes]

    @functools.cached_property
    def _quiet_pool(self) -> Texts:
        return self._texts({text: 1.0 for text in self._samples[self.config.prefixes :] if text.strip()})

    @functools.cached_property
    def unit(self) -> float:
        """What margins and learning rate are measured in: the main memory's own median response norm.

        Also where the layer normalises the projection's output, and size alone costs nothing: a memory that is so loud
        that the main one is no longer heard beside it answers what it has not learned at random.
        """
        if self.config.units == "absolute":
            return 1.0
        texts = self._samples[self.config.prefixes :][:4]
        batch, capture = self._captured([tokens.encode(self.tokenizer, text) for text in texts])
        return float(capture.main[batch.prompt_mask.flatten()].float().norm(dim=-1).median())

    def _prompt_activations(self, prompt: str) -> Tensor:
        """[n, d_ff], what the edited projection is given for a prompt."""
        return self._captured([tokens.encode(self.tokenizer, prompt)])[1].a

    def _captured(self, rows: Sequence[tuple[int, ...]]) -> tuple[tokens.Batch, Capture]:
        batch = tokens.collate([tokens.Example(row, ()) for row in rows], tokens.pad_token(self.tokenizer), self.device)
        return batch, self.tail.capture(batch.input_ids, batch.attention_mask)

    def trainer(
        self,
        memory: SideMemory,
        p: Tensor | None,
        examples: Sequence[Sequence[tokens.Example]],
        quiet: Texts | None,
        generator: torch.Generator,
        kind: type[Trainer] = Trainer,
    ) -> Trainer:
        """Of a batch that is written into `memory`.

        Args:
            p: the memory's protection matrix, or None.
            examples, quiet: its rows and unrelated texts, of the methods of like name.
            generator: of what steps draw.
            kind: of trainer.
        """
        quiet = self._quiet_pool if quiet is None else self._quiet_pool.join(quiet)
        pad = tokens.pad_token(self.tokenizer)
        return kind(self.tail, memory, p, examples, quiet, self.config, self.unit, generator, pad)

    def quiet_texts(
        self, edits: Sequence[Edit], before: Texts | None, held: Collection[str] | None = None
    ) -> Texts | None:
        """Unrelated texts of these edits behind those of `before`, less any prompt that is now to be edited or `held`:
        what the editor's edits have asked where None."""
        limits = {edit.irrelevant: 1.0 for edit in edits if edit.irrelevant}
        limits |= {text: self.config.near_limit for edit in edits for text in self._neighbours(edit)}
        held = {r.edit.prompt for r in self.edits} if held is None else held
        edited = {*held, *(e.prompt for e in edits)}
        limits = [(text, limit) for text, limit in limits.items() if text not in edited]
        most = min(len(limits), _REHEARSED)
        limits = dict(limits[i * len(limits) // most] for i in range(most))  # some of each kind and of each edit
        if before is not None:
            before = before.only([i for i, name in enumerate(before.names) if name not in edited | limits.keys()])
        if not limits:
            return before
        texts = self._texts(limits)
        texts = texts if before is None else before.join(texts)
        return texts.only(list(range(len(texts.names)))[-_REHEARSED:])

    def _neighbours(self, edit: Edit) -> list[str]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "near", edit.prompt))
        return reworded(edit, lambda text: swap_subject(text, edit.subject, self.config.near, generator))

    def _names(self, edits: Sequence[Edit], endings: Tensor) -> Names | None:
        """What these edits are about, [E, d_ff] endings of their prompts; None where scope does not ask."""
        if not self.config.by_subject:
            return None
        return Names.of([spellings(self.tokenizer, edit) for edit in edits], endings)

    def _texts(self, limits: dict[str, float]) -> Texts:
        most = min(_QUIET_MOST, self.architecture.context or _QUIET_MOST)
        names, ids = tuple(limits), [tokens.encode(self.tokenizer, text)[:most] for text in limits]
        a, text = [], []
        for numbers in buckets([len(row) for row in ids]):
            batch, capture = self._captured([ids[n] for n in numbers])
            mask = batch.prompt_mask.flatten()
            a.append(capture.a[mask])
            number = torch.tensor(numbers, device=self.device)
            text.append(number[:, None].expand_as(batch.prompt_mask).flatten()[mask])
        limit = torch.tensor(list(limits.values()), device=self.device)
        return Texts(names, torch.cat(a), torch.cat(text), limit)

    def examples(self, edits: Sequence[Edit], places: Sequence[int]) -> list[list[tokens.Example]]:
        """Training rows of these edits, the bare prompt first; `places` number them in the EditDataError of one that is
        too long."""
        rows = []
        for place, edit in zip(places, edits, strict=True):
            texts = [edit.prompt, *(f"{prefix}. {edit.prompt}" for prefix in self.prefixes), *self._shortened(edit)]
            made = [tokens.encode_target(self.tokenizer, text, edit.target) for text in texts]
            stop = () if self.stop is None else (self.stop,)
            context = [0, *self._prefix_tokens] + [0] * self.config.dropped
            made = [tokens.Example(r.prompt, r.target + stop, n) for r, n in zip(made, context, strict=True)]
            longest, context = max(len(r.prompt) + len(r.target) for r in made), self.architecture.context
            if context is not None and longest > context:
                raise EditDataError(
                    f"edit {place + 1} ({edit.prompt[:60]!r}) has {longest} tokens with its target and prefix, but the "
                    f"model's context is {context}; shorten it"
                )
            rows.append(made)
        return rows

    def _shortened(self, edit: Edit) -> list[str]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "drop", edit.prompt))

        def shortened(text: str) -> list[str]:
            rate = self.config.drop_rate
            return [drop_words(text, rate, generator, edit.subject) for _ in range(self.config.dropped)]

        return reworded(edit, shortened)


def seed_of(*parts) -> int:
    """A stable 63-bit seed from a config's seed, a purpose and a counter."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
