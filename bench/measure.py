"""What every section measures with: copies of one model that share its weights, alternating runs, a clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from bench.baseline_wise import BaselineConfig, BaselineWISE
from wise_fast import Edit, WiseConfig, WiseEditor
from wise_fast.architectures import find_architecture

PAPER_STEPS = BaselineConfig(layer=0).steps
UNRELATED = (
    "Bread rises because yeast turns sugar into gas, and the gas stays in the dough.",
    "The committee will meet on Thursday to discuss the budget for the new library.",
    "To sort a list in place, compare neighbours and swap them until nothing moves.",
    "It rained all night, so the children stayed inside and built a castle of blankets.",
    "A good knife is sharp, well balanced and kept away from the dishwasher.",
    "The old bridge was closed for repairs, and the ferry ran twice an hour instead.",
    "She tuned the violin, nodded to the pianist, and waited for the room to fall silent.",
    "Water boils at a lower temperature in the mountains, so beans take longer to cook.",
)


@dataclass
class Setting:
    """What a run measures: one model, the edits for it, ours and the baseline's settings.

    Attributes:
        model: unedited; sections edit `twin`s of it.
        config: ours; its batch size is set by the sections.
        baseline_edits, baseline_steps: how much of the baseline is run; `PAPER_STEPS` are the paper's.
        rounds: timed runs of every case of the serving section.
        sizes: prefill sizes of the serving section, (sequences, tokens).
        decode: its (tokens of the prompt, tokens decoded), and batches.
    """

    model: nn.Module
    tokenizer: object
    edits: list[Edit]
    config: WiseConfig
    baseline_edits: int = 1
    baseline_steps: int = PAPER_STEPS
    rounds: int = 21
    sizes: Sequence[tuple[int, int]] = ((1, 32), (8, 64))
    decode: tuple[int, int] = (32, 16)
    decode_batches: Sequence[int] = (1, 8)
    edited: WiseEditor | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def editor(self, **changes) -> WiseEditor:
        """A new editor on a twin of the model."""
        return WiseEditor(twin(self.model), self.tokenizer, self.config.replace(**changes))

    def filled(self) -> WiseEditor:
        """An editor that holds all edits, learned in batches of 8 unless the editing section has one already."""
        if self.edited is None:
            self.edited = self.editor(batch_size=8)
            self.edited.edit(self.edits)
        return self.edited

    def baseline(self, steps: int) -> BaselineWISE:
        """The baseline on a twin of the model, at the same layer."""
        return make_baseline(twin(self.model), self.tokenizer, self.config.layer, steps)


def make_baseline(model: nn.Module, tokenizer, layer: int | None, steps: int) -> BaselineWISE:
    """The baseline on the projection that `WiseEditor` would edit, with the paper's settings and its 10 prefixes."""
    architecture = find_architecture(model, layer)
    config = BaselineConfig(layer=architecture.layer, steps=steps)
    return BaselineWISE(model, tokenizer, config, architecture.projection)


def requests(edits: Sequence[Edit]) -> list[dict[str, str]]:
    """Edits as the baseline takes them; those without irrelevant text get an unrelated sentence."""
    return [
        {"prompt": e.prompt, "target": e.target, "irrelevant": e.irrelevant or UNRELATED[i % len(UNRELATED)]}
        for i, e in enumerate(edits)
    ]


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same weights: editing one leaves the others' modules alone."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(arms: dict[str, Callable[[], float]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every arm, `rounds` times, interleaved call by call.

    Each arm times itself, so what it prepares is left out. The order rotates every round, so that no arm always
    follows the same other; `warmup` rounds are run first and dropped.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            took = arms[name]()
            if number >= 0:
                seconds[name].append(took)
    return seconds
