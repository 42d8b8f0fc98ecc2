"""The project's documents taken apart: blocks of code, command lines, options in passing."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.tables import DOCUMENTS as NAMES

ROOT = Path(__file__).resolve().parents[1]
_FENCED = re.compile(r"^```(\S*)\n(.*?)^```", re.M | re.S)
_STARTS = ("wise-fast ", "torchrun ", "make ", ".venv/bin/python -m ", "python -m ")


@dataclass(frozen=True)
class Document:
    """One Markdown file, by its path from the project's root."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """(language, content) of every fenced block."""
        return _FENCED.findall(self.text)

    def fenced(self, language: str) -> list[str]:
        return [content for name, content in self.blocks if name == language]

    @cached_property
    def prose(self) -> str:
        """All but fenced blocks; `$B` stands for `.venv/bin/python -m bench`, as bench/README.md says."""
        return _FENCED.sub("", self.text).replace("$B.", ".venv/bin/python -m bench.")

    @cached_property
    def passing(self) -> list[str]:
        """Code within sentences and tables, a line each."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def lines(self) -> list[list[str]]:
        """Words of every command line: indented ones, and calls of a module or of make anywhere."""
        found = re.findall(r"^    (\S.*)", self.prose, re.M)
        found += [code for code in self.passing if not code.startswith("wise-fast ")]
        return [shlex.split(line, comments=True) for line in found if line.startswith(_STARTS)]

    def commands(self, *start: str) -> list[list[str]]:
        """What follows `start` in the command lines that begin so; `.venv/bin/python` counts as `python`."""
        lines = [[word.removeprefix(".venv/bin/") for word in line[:1]] + line[1:] for line in self.lines]
        return [line[len(start) :] for line in lines if tuple(line[: len(start)]) == start]


DOCUMENTS = [Document(name) for name in NAMES]
