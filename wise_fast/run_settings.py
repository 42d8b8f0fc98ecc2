"""What a lifelong run is told: how many edits of which task, when to evaluate, when to write checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from wise_fast.errors import ConfigError
from wise_fast.formats import suggestion

TASKS = ("qa", "hallucination", "temporal", "counterfact")
OPTIONS = (
    "model",
    "task",
    "edits",
    "irrelevant",
    "T",
    "mode",
    "out",
    "batch_size",
    "evaluate_at",
    "checkpoint_every",
    "generate",
    "seed",
    "device",
    "dtype",
    "settings",
)
_TEXTS = ("model", "task", "edits", "irrelevant", "mode", "out", "device", "dtype")
METHOD_OPTIONS = ("mode", "batch_size", "seed")  # settings of `WiseConfig` that are options of a run as well


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run beside those of its method.

    Attributes:
        task: which figures are taken: "qa", "hallucination", "temporal" or "counterfact".
        T: edits in all; None takes all that are given.
        evaluate_at: after how many edits to evaluate on all so far; None takes 1, 10, 100, 300, 1000, 3000, ... The end
            is always evaluated.
        generate: also evaluate by free generation, where the task does.
        checkpoint_every: edits between two checkpoints, which change nothing but how much resuming repeats.
    """

    task: str = "qa"
    T: int | None = None
    evaluate_at: tuple[int, ...] | None = None
    generate: bool = True
    checkpoint_every: int = 50

    def __post_init__(self):
        if self.task not in TASKS:
            raise ConfigError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        for name in ("T", "checkpoint_every"):
            value = getattr(self, name)
            if not _whole(value) and not (name == "T" and value is None):
                raise ConfigError(f"{name} is {value!r}, expected a whole number from 1")
        if self.evaluate_at is not None and not all(_whole(t) for t in self.evaluate_at):
            raise ConfigError(f"evaluate_at is {self.evaluate_at!r}, expected whole numbers from 1")
        if not isinstance(self.generate, bool):
            raise ConfigError(f"generate is {self.generate!r}, expected true or false")

    def edits_of(self, given: int) -> int:
        """T, where `given` edits are there; ConfigError if they are fewer."""
        if self.T is not None and given < self.T:
            raise ConfigError(f"T is {self.T}, but only {given} edits are given; give more of them or a smaller T")
        return given if self.T is None else self.T

    def points(self, T: int) -> tuple[int, ...]:
        """After how many of T edits to evaluate, ascending; the last is T."""
        wanted = self.evaluate_at
        if wanted is None:
            wanted = []
            for t in _usual():
                if t >= T:
                    break
                wanted.append(t)
        return tuple(sorted({t for t in wanted if t < T} | {T}))


def batches(T: int, batch_size: int, points: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of every batch of a run: of `batch_size` edits, fewer where an evaluation is due."""
    first = 0
    while first < T:
        end = min(first + batch_size, T, *(t for t in points if t > first))
        yield first, end
        first = end


def parse_points(value: object) -> tuple[int, ...]:
    """Evaluation points from "1,10,100", one number or a list of them. Raises ConfigError."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        found = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"evaluate_at is {value!r}, expected whole numbers from 1, such as 1,10,100")
    return found


def read_run_file(file: Path) -> dict:
    """The options of a run from YAML or JSON: names of `OPTIONS`, with `settings` holding those of `WiseConfig`.

    Raises:
        ConfigError: the file cannot be read, or holds anything else.
    """
    import yaml  # only runs from a file need it

    from wise_fast.value_files import parse_yaml

    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {file}: neither YAML nor JSON ({reason}); correct it") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"--config {file}: holds {values!r:.60}, expected named options such as 'task: qa'")
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in found:
        if name not in OPTIONS:
            raise ConfigError(
                f"--config {file}: unknown option {name!r}{suggestion(name, OPTIONS)}; known: {', '.join(OPTIONS)}. "
                "Settings of WiseConfig go under 'settings'"
            )
    for name in _TEXTS:
        if not isinstance(found.get(name), (str, type(None))):
            raise ConfigError(f"--config {file}: {name} is {found[name]!r}, expected text; put it in quotes")
    if not isinstance(found.get("settings") or {}, Mapping):
        raise ConfigError(f"--config {file}: 'settings' is {found['settings']!r:.60}, expected settings by name")
    return {name: value for name, value in found.items() if value is not None}


def method_settings(options: Mapping) -> dict:
    """What a run's options say of `WiseConfig`: their `settings`, and those that have options of their own on top."""
    own = {name: options[name] for name in METHOD_OPTIONS if options.get(name) is not None}
    return dict(options.get("settings") or {}) | own


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _usual() -> Iterator[int]:
    yield from (1, 10)
    for power in count(2):
        yield from (10**power, 3 * 10**power)
