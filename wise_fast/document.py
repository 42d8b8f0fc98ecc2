"""A report as a list of blocks, and those as Markdown. Every text is data: it is escaped where it is written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

_LONGEST = 240
NOTHING = "–"  # a cell without a value
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$!])")


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Grid:
    """A table; columns named in `numbers` are right-aligned. `folded` may be hidden at first, under `title`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[str] = frozenset()
    title: str = ""
    folded: bool = False

    def told(self) -> Grid:
        """Without the columns in which no row has a value. A text that is one dash is taken for none."""
        kept = [i for i in range(len(self.columns)) if any(row[i] != NOTHING for row in self.rows)]
        columns, rows = [self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=columns, rows=rows)


@dataclass(frozen=True)
class Picture:
    """A PNG, saved as `plots/<name>.png`; `caption` says what it shows to who cannot see it."""

    name: str
    png: bytes
    caption: str


Block = Heading | Paragraph | Grid | Picture


def shown(text: object, longest: int = _LONGEST) -> str:
    """A text as one visible line: white space folded, line ends as ⏎, other control characters as their codes."""
    text = str(text).strip().replace("\r\n", "\n")
    text = re.sub(r"[ \t]*[\n\r\v\f\x85\u2028\u2029]+[ \t]*", " ⏎ ", text)
    text = "".join(map(_visible, re.sub(r"[ \t]+", " ", text)))
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    # Cf holds the joiners that emoji are made of, and the overrides that turn the rest of a line around.
    hidden = (
        category in ("Cc", "Cs", "Co") or ("\u202a" <= character <= "\u202e") or ("\u2066" <= character <= "\u2069")
    )
    return f"\\u{ord(character):04x}" if hidden else character


def markdown(blocks: Sequence[Block]) -> str:
    """The document in GitHub's Markdown; pictures are links to their files."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def escaped(text: str) -> str:
    """Plain text for a line or a table cell of Markdown: nothing in it is read as markup or HTML."""
    return _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escaped(block.text)}"
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Picture):
        return f"![{escaped(block.caption)}](plots/{block.name}.png)"
    title = [f"{escaped(block.title)}\n"] if block.title else []
    marks = ["--:" if name in block.numbers else "---" for name in block.columns]
    lines = [[escaped(name) for name in block.columns], marks]
    lines += [[escaped(cell) for cell in row] for row in block.rows]
    return "\n".join(title + ["| " + " | ".join(line) + " |" for line in lines])
