"""A shard of mode "retrieve" is rehearsed when it is full: what it keeps, and what goes on to the next."""

import pytest
import torch

from tests.edited import FACTS, logits, make_editor
from tests.rehearsed import PROMPTS, TARGETS, few_together  # noqa: F401
from wise_fast import rehearsal
from wise_fast.metrics import answer
from wise_fast.rehearsal import _Practice
from wise_fast.state import Shard
from wise_fast.training import EditDiverged, Trainer


@pytest.fixture
def feeble(monkeypatch):
    """One pass answers nothing."""
    monkeypatch.setattr(rehearsal, "_GENTLE", 0.1)


KINDS = [{}, {"mask_ratio": 0.4}, {"route_by": "score"}, {"seed": 3}]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_they_answer_all_that_they_hold(changes):
    settings = dict(mode="retrieve", shard_size=2, rehearsals=20) | changes
    plain, editor = (make_editor(FACTS, **settings | more) for more in ({"rehearsals": 0}, {}))
    assert [m.edits for m in editor.memories] == [(0, 1), (2, 3)] and answer(editor, PROMPTS) == TARGETS
    assert not any(torch.equal(a.values, b.values) for a, b in zip(plain.memories, editor.memories, strict=True))
    assert all(r.seconds > 0 and r.success for r in editor.edits)
    for fact, report in zip(FACTS, editor.edits, strict=True):
        logits(editor.model, [fact.prompt])
        assert float(editor.routing.scores.max()) == pytest.approx(report.score, rel=1e-3)
    if plain.memories[0].factor is not None:
        assert torch.equal(plain.memories[0].factor, editor.memories[0].factor)


def test_one_that_is_not_full_waits():
    plain, editor = (make_editor(FACTS[:3], shard_size=3 + n, rehearsals=20) for n in (1, 0))
    again = make_editor(FACTS[:3], shard_size=4, rehearsals=0)
    assert torch.equal(plain.memories[0].values, again.memories[0].values)
    assert not torch.equal(plain.memories[0].values, editor.memories[0].values)


def test_what_they_do_not_answer_is_learned_in_the_next(monkeypatch):
    monkeypatch.setattr(rehearsal._Rehearsal, "_left", lambda self, memory, lost: [1] if 1 in memory.edits else [])
    editor = make_editor(shard_size=3, rehearsals=20)
    reports = editor.edit(FACTS[:3])
    assert [m.edits for m in editor.memories] == [(0, 2), (1,)] and len(editor.edits) == 3
    assert all(m.names.are_sound(len(m.edits), m.shape[1]) for m in editor.memories)
    assert reports == editor.edits and all(report.success for report in reports)
    assert reports[1].steps > 0 and reports[1].loss_before > 1 and reports[1].loss < 0.5
    for own, fact, report in zip((0, 1, 0), FACTS[:3], reports, strict=True):
        logits(editor.model, [fact.prompt])
        assert editor.routing.choice.tolist() == [own]
        assert float(editor.routing.scores[0, own]) == pytest.approx(report.score, rel=1e-3)
    editor.edit(FACTS[3:])
    assert [m.edits for m in editor.memories] == [(0, 2), (1, 3)] and answer(editor, PROMPTS) == TARGETS
    editor.rollback(1)
    assert [m.edits for m in editor.memories] == [(0, 2), (1,)]
    editor.rollback(3)
    assert not editor.memories and not editor.edits


def test_what_diverges_in_the_next_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(rehearsal._Rehearsal, "_left", lambda self, memory, lost: [1])
    editor = make_editor(shard_size=3, rehearsals=20)
    run = Trainer.run

    def diverging(trainer):
        if trainer.count == 1:
            raise EditDiverged(0)
        return run(trainer)

    monkeypatch.setattr(Trainer, "run", diverging)
    reports = editor.edit(FACTS[:3])
    assert [report.success for report in reports] == [True, False, True] and "diverged" in reports[1].note
    assert [m.edits for m in editor.memories][0] == (0, 2)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_never_answered_stays_where_it_is(feeble, size):
    editor = make_editor(FACTS, shard_size=size, max_steps=1, rehearsals=1)
    assert [m.edits for m in editor.memories] == [tuple(range(i, i + size)) for i in range(0, 4, size)]
    assert not any(report.success for report in editor.edits) and len(editor.edits) == 4


def test_at_most_half_of_them_go_on():
    editor = make_editor(FACTS, shard_size=4, rehearsals=1)
    shard = rehearsal._Rehearsal(editor, editor.memories[0], Shard(editor.memories[0], None), editor.state, range(4))
    assert [shard._left(editor.memories[0], lost) for lost in ({2}, {3, 1}, {0, 1, 2})] == [[2], [1, 3], []]
    nameless = editor.memories[0].replace(names=None)
    assert shard._left(nameless, {2}) == []


def test_one_that_answers_less_than_half_stays_as_it_was_learned(feeble, caplog):
    plain, editor = (make_editor(FACTS, shard_size=4, rehearsals=n) for n in (0, 1))
    assert torch.equal(plain.memories[0].values, editor.memories[0].values)
    assert "they stay as learned (4)" in caplog.text


def test_what_was_answered_and_did_not_count_as_held_is_not_given_up(feeble, caplog):
    """Reports are stricter than answers: right, but not sure enough."""
    plain, editor = (make_editor(FACTS, shard_size=4, max_steps=3, rehearsals=n) for n in (0, 1))
    assert answer(plain, PROMPTS) == TARGETS and not any(report.success for report in plain.edits)
    assert torch.equal(plain.memories[0].values, editor.memories[0].values)
    assert "they stay as learned (4)" in caplog.text


def test_nobody_asks_again_where_all_held(monkeypatch):
    asked, judge = [], _Practice.judge
    monkeypatch.setattr(_Practice, "judge", lambda self, memory: (asked.append(memory), judge(self, memory))[1])
    make_editor(FACTS, shard_size=4, rehearsals=20)
    make_editor(FACTS, shard_size=4, rehearsals=20, max_steps=3)
    assert len(asked) == 1 + 2


def test_taking_it_back_takes_the_rehearsal_back():
    editor = make_editor(FACTS[:3], shard_size=4, batch_size=1, rehearsals=4)
    before = editor.memories[0].values
    editor.edit(FACTS[3:])
    assert not torch.equal(editor.memories[0].values, before)
    editor.rollback(1)
    assert torch.equal(editor.memories[0].values, before)


@pytest.mark.parametrize("lost,enough", [(0, True), (1, True), (2, False), (11, False)])
def test_a_shard_may_lose_a_tenth_of_what_it_held(monkeypatch, lost, enough):
    editor = make_editor(FACTS, shard_size=4, rehearsals=1)
    shard = rehearsal._Rehearsal(editor, editor.memories[0], Shard(editor.memories[0], None), editor.state, range(4))
    shard._before = set(range(10, 25))
    monkeypatch.setattr(rehearsal._Rehearsal, "_left", lambda self, memory, lost: sorted(lost) if len(lost) < 8 else [])
    found = rehearsal._Found(editor.memories[0], {}, [], frozenset(range(10, 25 - lost)))
    assert shard._is_enough(found) == enough
