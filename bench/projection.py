"""What the small baselines share: one projection of one model, taught one edit at a time, scored like any method."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wise_fast import tokens
from wise_fast.architectures import evaluating, find_architecture
from wise_fast.data import Edit, as_edits
from wise_fast.errors import ConfigError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.routing import Generation, Routing
from wise_fast.state import EditReport
from wise_fast.tail import Tail


class ProjectionMethod:
    """A method that edits the value projection that `WiseEditor` would edit, one edit at a time.

    Args:
        model, tokenizer: as `WiseEditor` takes them; the model is edited in place until `unload`.
        config: a dataclass of settings with at least `layer` (None: the default layer) and `stop` (see `WiseConfig`).

    Attributes:
        edits: reports of the edits held, in order.
        routing: the router's context, or None for a method without a router.

    Raises:
        ConfigError: the model has an editor already, or there is no such layer.
    """

    name: str
    routed = False

    def __init__(self, model: nn.Module, tokenizer, config):
        if any(isinstance(m, DualMemoryLinear) for m in model.modules()):
            raise ConfigError("the model has side memories already; unload() the editor that put them there first")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.architecture = find_architecture(model, config.layer)
        self.tail = Tail(model, self.architecture)
        self.stop = tokens.stop_token(tokenizer, config.stop)
        self.edits: list[EditReport] = []
        self.projection = model.get_submodule(self.architecture.projection)
        self.routing = Routing() if self.routed else None
        if self.routing is not None:
            self.routing.attach(model.get_submodule(self.architecture.decoder))
            self._generate = model.__dict__.get("generate")
            model.generate = Generation(model.generate, self.routing).generate

    # -- the protocol -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @torch.inference_mode(False)
    @torch.enable_grad()
    def edit(self, edits: Edit | Mapping | Iterable[Edit | Mapping], progress: bool = False) -> list[EditReport]:
        """Teach the edits in order; all of them are tokenized before the first is learned. `progress` is ignored.

        Raises:
            EditDataError: an edit is unusable or tokenizes to nothing; nothing was learned.
        """
        given = as_edits(edits)
        rows = [self._row(edit) for edit in given]
        made = []
        for edit, row in zip(given, rows, strict=True):
            before, _ = self._look(row)
            start = time.perf_counter()
            with evaluating(self.model):
                steps, note = self._learn(edit, row)
            seconds = time.perf_counter() - start
            loss, right = self._look(row)
            report = EditReport(edit, steps, before, loss, success=right, seconds=seconds, note=note)
            self.edits = [_stale(r) if r.edit.prompt == edit.prompt else r for r in self.edits] + [report]
            made.append(report)
        return made

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Serve the unedited model inside the block."""
        with self.routing.disabled():
            yield

    def asking(self, prompt_mask: Tensor):
        """Say which tokens [B, T] of the coming forwards are prompt."""
        return nullcontext() if self.routing is None else self.routing.prompt(prompt_mask)

    def head_at(self, positions: Tensor):
        """Let the LM head see only these of the flattened tokens."""
        return self.tail.head_at(positions)

    # -- what a run records -------------------------------------------------------------------------------------

    def settings(self) -> dict:
        """Settings in JSON's types."""
        return asdict(self.config)

    @property
    def count(self) -> int:
        """Memories held, in the method's own sense."""
        return 0

    def tensors(self) -> list[Tensor]:
        """Everything that editing made and serving reads."""
        return []

    def ratios(self, prompts: Sequence[str]) -> list[float] | None:
        """Per prompt, how far it is in scope: 1.0 is the threshold, more is in scope; None without a router."""
        return None

    def unload(self) -> nn.Module:
        """Leave the model as it was found, and return it."""
        if self.routing is not None:
            self.routing.detach()
            del self.model.generate
            if self._generate is not None:
                self.model.generate = self._generate
        return self.model

    # -- for the methods ----------------------------------------------------------------------------------------

    def _learn(self, edit: Edit, row: tokens.Example) -> tuple[int, str]:
        """Learn one edit: (optimiser steps, note)."""
        raise NotImplementedError

    def _row(self, edit: Edit) -> tokens.Example:
        row = tokens.encode_target(self.tokenizer, edit.prompt, edit.target)
        return tokens.Example(row.prompt, row.target + (() if self.stop is None else (self.stop,)))

    def _batch(self, rows: Sequence[tokens.Example]) -> tokens.Batch:
        return tokens.collate(rows, tokens.pad_token(self.tokenizer), self.device)

    @torch.no_grad()
    def _look(self, row: tokens.Example) -> tuple[float, bool]:
        """Mean token NLL of a row's target as the method serves it, and whether every token is the argmax."""
        batch = self._batch([row])
        with evaluating(self.model), self.asking(batch.prompt_mask), self.head_at(batch.positions):
            made = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = made.logits[0].float()
        return F.cross_entropy(logits, batch.labels).item(), bool((logits.argmax(-1) == batch.labels).all())

    @torch.no_grad()
    def _forward_prompts(self, prompts: Sequence[str], size: int = 16) -> Iterator[tokens.Batch]:
        """Run prompts in batches, yielding after each one, so that what the router left behind can be read."""
        rows = [tokens.Example(tokens.encode(self.tokenizer, prompt), ()) for prompt in prompts]
        for first in range(0, len(rows), size):
            batch = self._batch(rows[first : first + size])
            last = batch.prompt_mask.flatten().nonzero()[-1]
            with evaluating(self.model), self.asking(batch.prompt_mask), self.head_at(last):
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            yield batch


def _stale(report: EditReport) -> EditReport:
    return report.replace(note="superseded by a later edit")
