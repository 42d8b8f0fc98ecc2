"""The work behind the commands of `wise_fast.commands`, with its progress: load, ask, edit and save, evaluate."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from wise_fast import display, hub, storage
from wise_fast.atomic import read_directory
from wise_fast.config import WiseConfig
from wise_fast.data import Edit
from wise_fast.editor import WiseEditor
from wise_fast.errors import StorageError
from wise_fast.metrics import answer, matches
from wise_fast.models import load_model
from wise_fast.scores import Evaluation
from wise_fast.state import EditReport
from wise_fast.tasks import evaluate
from wise_fast.terminal import FAILED_EDITS, INTERRUPTED, Terminal


def new_editor(it: Terminal, model: str, dtype: str, device: str | None, config: WiseConfig) -> WiseEditor:
    """An editor on a freshly loaded model."""
    it.hush_transformers()
    with it.step(f"loading {model}"):
        return WiseEditor(*load_model(model, dtype=dtype, device=device), config)


def saved_editor(it: Terminal, model: str, dtype: str, device: str | None, pack: Path) -> WiseEditor:
    """An editor with the edits that were saved in `pack`."""
    pack = hub.local(str(pack))
    read_directory(pack, [storage.CONFIG])  # a wrong path is told before the model is loaded
    it.hush_transformers()
    with it.step(f"loading {model} and {pack}"):
        return WiseEditor.from_pretrained(*load_model(model, dtype=dtype, device=device), pack)


def check_out(out: Path) -> None:
    """Raise StorageError early, before hours of editing, if `out` cannot become a directory of edits."""
    if out.exists() and not out.is_dir():
        raise StorageError(f"--out {out}: is a file, expected a directory to save in; name another")
    foreign = {path.name for path in out.iterdir()} - {*storage.owned(out)} if out.exists() else ()
    if foreign:
        raise StorageError(
            f"--out {out}: holds other things ({min(foreign)!r}), which saving never replaces; name another"
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StorageError(f"--out {out}: {parent} cannot be written; name another place or change its permissions")


def edit_and_save(it: Terminal, editor: WiseEditor, edits: Sequence[Edit], out: Path) -> list[EditReport]:
    """Edit and save; an interrupt saves the edits that are whole and sets the exit code.

    Returns:
        One report per edit given, or after an interrupt one per edit that was kept.
    """
    it.kept = "no edit was finished or saved"
    try:
        reports = editor.edit(edits, progress=not it.quiet)
    except KeyboardInterrupt:
        reports = editor.edits
        if not reports:
            raise
        it.code = INTERRUPTED
    it.kept = f"{len(reports)} edits were made, but not saved"
    with it.step(f"saving {out}"):
        editor.save_pretrained(out)
    it.kept = f"all {len(reports)} edits are saved in {out}"
    if it.code == INTERRUPTED:
        first, last = reports[0].edit.prompt, reports[-1].edit.prompt
        it.warn(
            f"interrupted: the first {len(reports)} of {len(edits)} edits are kept, {first!r} to {last!r}, and saved "
            f"in {out}"
        )
    elif display.failed(reports):
        it.code = FAILED_EDITS
    return reports


def score(it: Terminal, editor: WiseEditor, edits: Sequence[Edit], generate: bool) -> Evaluation:
    """`evaluate` under a bar."""
    with it.bar("evaluating") as progress:
        return evaluate(editor, edits, generate=generate, progress=progress)


def summary(reports: Sequence[EditReport]) -> dict:
    """Counts and times of an editing run."""
    tried = [r for r in reports if not r.superseded]
    seconds = sum(r.seconds for r in tried)
    return {
        "edits": len(tried),
        "failed": len(display.failed(reports)),
        "superseded": len(reports) - len(tried),
        "seconds": seconds,
        "seconds_per_edit": seconds / len(tried) if tried else None,
    }


def spread(edits: Sequence[Edit], count: int) -> list[Edit]:
    """`count` edits, as many relations among them as there are; an id is its relation, a hyphen and a number."""
    seen: dict[str, int] = {}
    rank = []
    for edit in edits:
        relation = (edit.id or "").rpartition("-")[0]
        rank.append(seen.get(relation, 0))
        seen[relation] = rank[-1] + 1
    order = sorted(range(len(edits)), key=lambda i: rank[i])
    return [edits[i] for i in order[:count]]


def ask(it: Terminal, editor: WiseEditor, edits: Sequence[Edit], title: str) -> list[tuple[str, str, str]]:
    """(kind, prompt, answer) of each edit's prompt, first paraphrase and first unrelated prompt, in this order."""
    rows = []
    for edit in edits:
        rows.append(("prompt", edit.prompt))
        rows += [("paraphrase", text) for text in edit.rephrases[:1]]
        rows += [("unrelated", place.prompt) for place in edit.locality[:1]]
    with it.bar(title, len(rows)) as progress:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done)

        answers = answer(editor, [prompt for _, prompt in rows], advance=advance)
    return [(*row, text) for row, text in zip(rows, answers, strict=True)]


def compare(edits: Sequence[Edit], before: Sequence[tuple], after: Sequence[tuple]) -> list[dict]:
    """Rows of `display.demo_table` from what `ask` gave before and after editing."""
    rows, targets = [], iter(edits)
    target = ""
    for (kind, prompt, old), (_, _, new) in zip(before, after, strict=True):
        if kind == "prompt":
            target = next(targets).target
        if kind == "unrelated":
            verdict = "unchanged" if old == new else "changed"
        else:
            verdict = "right" if matches(new, target) else "wrong"
        rows.append({"kind": kind, "prompt": prompt, "target": target, "before": old, "after": new, "verdict": verdict})
    return rows


def exact(rows: Sequence[dict]) -> dict[str, float | None]:
    """Shares of right answers among the rows that `compare` made."""
    found = {}
    for name, kind in (("exact", "prompt"), ("exact_rephrased", "paraphrase")):
        right = [row["verdict"] == "right" for row in rows if row["kind"] == kind]
        found[name] = sum(right) / len(right) if right else None
    return found


def answers(editor: WiseEditor, prompts: Sequence[str], length: int, progress) -> Iterator[dict]:
    """Rows of `display.answers_table`: each prompt answered without and with the edits, and by which memory."""
    served = editor.projection.memories > 0
    for place, prompt in enumerate(prompts, 1):
        with editor.disabled():
            (before,) = answer(editor, [prompt], length)
        (after,) = answer(editor, [prompt], length)
        chosen = int(editor.routing.choice[0]) if served else -1
        scores = editor.routing.scores[0].tolist() if served else []
        limits = torch.atleast_2d(editor.routing.thresholds)[0].tolist() if served else []
        nearest = chosen if chosen >= 0 else _nearest(scores, limits)
        yield {
            "prompt": prompt,
            "before": before,
            "after": after,
            "memory": chosen + 1 if chosen >= 0 else None,
            "score": None if nearest is None else scores[nearest],
            "threshold": None if nearest is None else limits[nearest],
        }
        progress(place)


def _nearest(scores: Sequence[float], limits: Sequence[float]) -> int | None:
    """The memory whose threshold a prompt out of scope comes nearest to; None where it is closed to all."""
    open_ones = [j for j, limit in enumerate(limits) if math.isfinite(limit)]
    return max(open_ones, key=lambda j: scores[j] / limits[j] if limits[j] else 0.0, default=None)
