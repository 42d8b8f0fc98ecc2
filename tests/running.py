"""Lifelong runs of a tiny model, for tests."""

from tests.killed import CONFIG, EDITS, SETTINGS, shallow_model
from tests.tiny import tiny_tokenizer
from wise_fast import WiseEditor
from wise_fast.journal import read_journal
from wise_fast.lifelong import Run


def new_editor(**changes):
    return WiseEditor(shallow_model(), tiny_tokenizer(), CONFIG.replace(**changes))


def new_run(out, settings=SETTINGS, resume=False, edits=EDITS, **changes):
    return Run(new_editor(**changes), edits, out, settings, resume=resume)


def lines(out, name="journal.jsonl"):
    return list(read_journal(out / name))
