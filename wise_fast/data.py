"""Edits: what is to be taught, how it will be scored, and the files they come from (`wise_fast.formats` reads records).

Texts are kept as they are, outer spaces included; joining prompt and target is the tokenizing side's business. An
`ood_prompts` entry of the temporal task is a whole passage, scored token by token as it stands (no target after it).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from wise_fast.errors import EditDataError
from wise_fast.formats import check_text, check_texts, read_record, shown
from wise_fast.messages import Messages, check_messages, check_prompt, to_json


@dataclass(frozen=True)
class Locality:
    """An unrelated prompt whose output must not change, and its reference answer if there is one."""

    prompt: str | Messages
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", check_prompt(self.prompt, "prompt"))
        if self.answer is not None:
            check_text(self.answer, "answer")


@dataclass(frozen=True)
class Edit:
    """One fact to teach: `prompt` is to be answered by `target`.

    Prompts (prompt, rephrases, locality) are text or chat messages, [{"role": "user", "content": ...}]; editing and
    evaluating render those with the tokenizer's chat template.

    Attributes:
        prompt: the question, or the beginning of a sentence.
        target: its new answer; the space between the two need not be given.
        subject: what the prompt is about, a part of it; guessed from capitals when None.
        rephrases: paraphrases of the prompt, for generalization.
        ood_prompts: out-of-distribution passages (temporal task).
        locality: unrelated prompts, for measuring only.
        irrelevant: text for the margin loss (paper, eq. 5).
        id: a name of the edit, for reports.
        truth: the answer that `target` replaces, for measuring only (CounterFact compares the two).
        messages: what a rendered `prompt` was made of.

    Raises:
        EditDataError: a text is blank or no text, or a list is none.
    """

    prompt: str | Messages
    target: str
    subject: str | None = None
    rephrases: tuple[str | Messages, ...] = ()
    ood_prompts: tuple[str, ...] = ()
    locality: tuple[Locality, ...] = ()
    irrelevant: str | None = None
    id: str | None = None
    truth: str | None = None
    messages: Messages = ()

    def __post_init__(self) -> None:
        for name in ("target", "subject", "irrelevant", "id", "truth"):
            value = getattr(self, name)
            if value is not None or name == "target":
                check_text(value, name)
        object.__setattr__(self, "prompt", check_prompt(self.prompt, "prompt"))
        object.__setattr__(self, "rephrases", _check_prompts(self.rephrases, "rephrases"))
        object.__setattr__(self, "ood_prompts", check_texts(self.ood_prompts, "ood_prompts"))
        object.__setattr__(self, "messages", check_messages(self.messages, "messages") if self.messages else ())
        places = self.locality
        if not isinstance(places, (list, tuple)) or not all(isinstance(place, Locality) for place in places):
            raise EditDataError(
                f"field 'locality': expected a tuple of Locality, got {shown(places)}; wrap each prompt"
            )
        object.__setattr__(self, "locality", tuple(places))

    def to_dict(self) -> dict:
        """The canonical record: JSON values only, absent fields left out. `from_dict` restores an equal Edit."""
        record: dict = {"prompt": to_json(self.prompt), "target": self.target}
        optional = {
            "subject": self.subject,
            "rephrases": [to_json(prompt) for prompt in self.rephrases],
            "ood_prompts": list(self.ood_prompts),
            "locality": [_place(p) for p in self.locality],
            "irrelevant": self.irrelevant,
            "id": self.id,
            "truth": self.truth,
            "messages": to_json(self.messages),
        }
        return record | {name: value for name, value in optional.items() if value}

    @classmethod
    def from_dict(cls, record: Mapping) -> "Edit":
        """An edit from a record of any format in `wise_fast.formats`. Raises EditDataError, naming the field."""
        fields = read_record(record)
        fields["locality"] = tuple(Locality(**place) for place in fields["locality"])
        return cls(**fields)


@dataclass(frozen=True)
class Superseded:
    """An edit that a later one of the same prompt replaces. Positions count from 0 in the list as it was given."""

    position: int
    edit: Edit
    by_position: int
    contradicting: bool


def load_edits(
    path: str | os.PathLike, *, limit: int | None = None, irrelevant: str | os.PathLike | None = None
) -> list[Edit]:
    """The edits of a file, each record in any format that `wise_fast.formats` knows.

    Args:
        path: a JSON list or JSON Lines, told by its content: canonical records, EasyEdit requests, MEND's ZsRE or
            CounterFact.
        limit: read so many records from the beginning only; later ones are not checked. All when None.
        irrelevant: a partner file with as many records, as the hallucination and temporal sets have; each gives the
            edit in its place its `irrelevant` text, which is its own such text, or else its first locality prompt with
            the answer.

    Returns:
        One edit a record, in order.

    Raises:
        EditDataError: the file or a record is not usable; file, record (from 1), line (JSON Lines) and field are named.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise EditDataError(f"limit: expected a whole number of at least 1, or None for all, got {shown(limit)}")
    edits = _edits_from_text(_read_text(Path(path)), str(path), limit)
    if irrelevant is None:
        return edits
    partners = _edits_from_text(_read_text(Path(irrelevant)), str(irrelevant), limit)
    if len(partners) != len(edits):
        raise EditDataError(
            f"{irrelevant}: has {len(partners)} records, expected {len(edits)}, one for every edit of {path}; give the "
            "partner of that file, or a limit that both have"
        )
    texts = [_irrelevant(f"{irrelevant}, record {n}", partner) for n, partner in enumerate(partners, start=1)]
    return [replace(edit, irrelevant=text) for edit, text in zip(edits, texts, strict=True)]


def _irrelevant(where: str, partner: Edit) -> str:
    if partner.irrelevant is not None:
        return partner.irrelevant
    if not partner.locality or not isinstance(partner.locality[0].prompt, str):
        raise EditDataError(
            f"{where}: holds no irrelevant text; expected 'loc_prompt', 'irrelevant' or a locality prompt"
        )
    place = partner.locality[0]
    return place.prompt if place.answer is None else joined(place.prompt, place.answer)


def as_edits(edits: Edit | Mapping | Iterable[Edit | Mapping]) -> list[Edit]:
    """One edit or record, or an iterable of them, as a list of edits. Raises EditDataError, numbering from 1."""
    if isinstance(edits, (Edit, Mapping)):
        edits = [edits]
    elif isinstance(edits, (str, bytes, os.PathLike)) or not isinstance(edits, Iterable):
        raise EditDataError(f"edits: expected Edit, dict, or a list of these, got {shown(edits)}; a file: load_edits")
    found = []
    for number, edit in enumerate(edits, start=1):
        found.append(edit if isinstance(edit, Edit) else _edit_at(f"edit {number}", edit))
    return found


def deduplicate(edits: Iterable[Edit]) -> tuple[list[Edit], list[Superseded]]:
    """Keeps the last edit of each prompt, in the order given; the rest come back as Superseded, by position.

    Prompts, and targets to tell a contradiction from a repetition, are compared with white space stripped and folded.
    """
    edits = list(edits)
    last = {_folded(edit.prompt): position for position, edit in enumerate(edits)}
    kept, superseded = [], []
    for position, edit in enumerate(edits):
        winner = last[_folded(edit.prompt)]
        if winner == position:
            kept.append(edit)
        else:
            contradicting = _folded(edit.target) != _folded(edits[winner].target)
            superseded.append(Superseded(position, edit, winner, contradicting))
    return kept, superseded


def demo_edits() -> list[Edit]:
    """The packaged set of counterfactual edits: 60 edits of 15 relations, each with everything a score needs."""
    file = resources.files("wise_fast") / "datasets" / "counterfactuals.json"
    return _edits_from_text(file.read_text(encoding="utf-8"), "counterfactuals.json", None)


def joined(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with a space between where neither brings white space."""
    return prompt + ("" if prompt[-1:].isspace() or answer[:1].isspace() else " ") + answer


def _check_prompts(values: object, field: str) -> tuple[str | Messages, ...]:
    if not isinstance(values, (list, tuple)):
        raise EditDataError(f"field '{field}': expected a list of texts, got {shown(values)}; put it in a list")
    return tuple(check_prompt(value, f"{field}[{i}]") for i, value in enumerate(values))


def _place(place: Locality) -> dict:
    return {"prompt": to_json(place.prompt)} | ({"answer": place.answer} if place.answer else {})


def _folded(text: str) -> str:
    return " ".join(text.split())


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise EditDataError(f"{path}: is a directory, expected a file of edits; name one of the files in it")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise EditDataError(f"{path}: no such file, expected a file of edits; check the path") from None
    except UnicodeDecodeError as error:
        raise EditDataError(
            f"{path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise EditDataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _edits_from_text(text: str, source: str, limit: int | None) -> list[Edit]:
    edits = []
    for number, (line, record) in enumerate(_records(text, source), start=1):
        where = f"{source}, record {number}" + (f" (line {line})" if line else "")
        edits.append(_edit_at(where, record))
        if number == limit:
            break
    return edits


def _edit_at(where: str, record: object) -> Edit:
    try:
        return Edit.from_dict(record)
    except EditDataError as error:
        raise EditDataError(f"{where}: {error}") from None


def _records(text: str, source: str) -> Iterator[tuple[int | None, object]]:
    """Each record with its line (None in a JSON list). A text that does not open with '[' is taken as JSON Lines."""
    content = text.strip()
    if not content:
        raise EditDataError(f"{source}: the file is empty, expected a JSON list or JSON Lines of edits; check the path")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if content[0] == "[":
            raise _syntax_error(source, error, 1) from None
        yield from _lines(text, source)
        return
    if isinstance(document, list) and not document:
        raise EditDataError(f"{source}: the list is empty, expected at least one edit; check the path")
    if isinstance(document, list):
        yield from ((None, record) for record in document)
    elif isinstance(document, dict) and "\n" not in content:
        yield text[: text.index("{")].count("\n") + 1, document
    else:
        raise EditDataError(
            f"{source}: top level is {shown(document)}, expected a list of edits or JSON Lines (an object a line); "
            "put the records in [...]"
        )


def _lines(text: str, source: str) -> Iterator[tuple[int, object]]:
    number = 0
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            number += 1
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise _syntax_error(f"{source}, record {number}", error, line) from None
            yield line, record


def _syntax_error(where: str, error: Exception, first_line: int) -> EditDataError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"line {first_line + error.lineno - 1} column {error.colno}: {error.msg}"
    return EditDataError(f"{where}: not valid JSON ({reason}), expected a JSON list or one object a line; correct it")
