"""A merged memory is trained on all of its edits: what that finds, what it reports, and what it leaves alone."""

import logging
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from tests.edited import ELSEWHERE, FACTS, logits, make_editor, same
from tests.rehearsed import PROMPTS, TARGETS, few_together  # noqa: F401
from wise_fast import rehearsal
from wise_fast.data import Edit
from wise_fast.memory import storable
from wise_fast.merging import merge_closed
from wise_fast.metrics import answer
from wise_fast.rehearsal import _Practice
from wise_fast.standing import Standing
from wise_fast.training import EditDiverged

REHEARSED = dict(mode="merge", merging="regmean", mask_ratio=1.0, shard_size=1, shards=4, batch_size=2, rehearsals=16)
NOT_REHEARSED = [
    {"rehearsals": 0},
    {"merging": "ties"},
    {"mode": "retrieve", "rehearsals": 0},
    {"mode": "retrieve", "protect": False, "merging": "ties"},
    {"mode": "retrieve", "layout": "element", "merging": "ties"},
]


@cache
def filled(settings):
    """The state of an editor that has learned the facts in shards of one; nothing of it is rehearsed yet."""
    return make_editor(FACTS, **dict(settings)).state


def waiting(**changes):
    """An editor whose shards wait for their merge, and its state."""
    settings = REHEARSED | {"shards": 9} | changes
    editor = make_editor(**settings)
    editor.state = filled(tuple(sorted((settings | {"rehearsals": 0}).items())))
    return editor, editor.state


def untimed(reports):
    return [report.replace(seconds=0.0) for report in reports]


@pytest.fixture
def spoilt(monkeypatch):
    """What is merged answers nothing, until it is rehearsed."""

    def merged(state, config):
        state = merge_closed(state, config)
        memory = state.merged[-1]
        return state.replace(merged=(*state.merged[:-1], memory.replace(values=0.0 * memory.values)))

    monkeypatch.setattr("wise_fast.merging.merge_closed", merged)


@pytest.fixture
def rounds(monkeypatch):
    """Three at most, as in earnest; how many edits are answered after each can be given."""
    monkeypatch.setattr(rehearsal, "_ROUNDS", 3)
    judged, judge = [], rehearsal._Rehearsal._judged

    def telling(*counts):
        def told(self, memory, passes):
            found = judge(self, memory, passes)
            judged.append((passes, memory))
            self._before = {0, 1, 2, 3}
            return replace(found, holds=frozenset(range(counts[len(judged) - 1])))

        monkeypatch.setattr(rehearsal._Rehearsal, "_judged", told)
        return judged

    return telling


@pytest.mark.parametrize(
    "answered,taken", [((4,), 0), ((2, 4), 1), ((0, 3, 4), 2), ((3, 2, 1), None), ((4, 0, 0), 0), ((2, 2, 3), None)]
)
@pytest.mark.parametrize("room", [rehearsal._KEPT, 0])
def test_it_goes_on_while_what_was_learned_would_stay(monkeypatch, rounds, answered, taken, room):
    """In rounds of as many passes, each from where the one before led; the best is taken."""
    monkeypatch.setattr(rehearsal, "_KEPT", room)
    judged = rounds(*answered)
    steps, practise = [], _Practice.practise

    def stepped(self, edits, z, moments, number, pace):
        before = z.clone()
        practise(self, edits, z, moments, number, pace)
        steps.append((number, before, z.clone()))

    monkeypatch.setattr(_Practice, "practise", stepped)
    editor, state = waiting(rehearsals=2)
    made = rehearsal.merge_closed(editor, state)
    count = next((i + 1 for i, n in enumerate(answered) if n == 4), 3)
    assert [passes for passes, _ in judged] == [2 * i for i in range(1, count + 1)]
    assert [number for number, *_ in steps] == list(range(4 * count))
    assert all(torch.equal(one[2], other[1]) for one, other in pairwise(steps))
    (plain,) = merge_closed(state, editor.config).merged
    kept = plain if taken is None else judged[taken][1]
    assert torch.equal(made.merged[0].values, kept.values)
    assert len({memory.values.sum().item() for _, memory in judged}) == count


def test_a_round_that_diverges_leaves_the_one_before(monkeypatch, rounds):
    judged, practise = rounds(3, 0, 0), _Practice.practise

    def breaking(self, edits, z, moments, number, pace):
        if number == 5:  # of the second round
            raise EditDiverged(0)
        practise(self, edits, z, moments, number, pace)

    monkeypatch.setattr(_Practice, "practise", breaking)
    monkeypatch.setattr(rehearsal._Rehearsal, "_is_enough", lambda self, found: False)
    monkeypatch.setattr(rehearsal._Rehearsal, "_left", lambda self, memory, lost: sorted(lost))
    editor, state = waiting(rehearsals=2)
    made = rehearsal.merge_closed(editor, state)
    assert len(judged) == 1 and torch.equal(made.merged[0].values, judged[0][1].values)
    assert made.merged[0].edits == (0, 1, 2)


@pytest.mark.parametrize("room", [rehearsal._KEPT, 0])
def test_it_finds_what_holds_all_edits_and_leaves_the_rest_alone(monkeypatch, room):
    monkeypatch.setattr(rehearsal, "_KEPT", room)
    editor, state = waiting(rehearsals=30)
    before = logits(make_editor().model, ELSEWHERE)
    editor.state = rehearsal.merge_closed(editor, state)
    assert [m.edits for m in editor.memories] == [tuple(range(len(FACTS)))]
    assert answer(editor, PROMPTS) == TARGETS
    assert all(report.success and report.loss < 0.6 for report in editor.edits)
    assert same(logits(editor.model, ELSEWHERE), before)


def test_the_more_passes_the_better_it_fits(spoilt):
    editor, state = waiting()
    losses = []
    for passes in (1, 8, 40):
        editor.config = editor.config.replace(rehearsals=passes)
        losses.append(sum(report.loss for report in rehearsal.merge_closed(editor, state).reports))
    assert losses[0] > 2 * losses[1] > 2 * losses[2]


def test_an_edit_that_is_not_answered_is_reported(spoilt):
    editor, state = waiting(rehearsals=1)
    assert all(report.success for report in state.reports)
    editor.state = rehearsal.merge_closed(editor, state)
    right = [said == target for said, target in zip(answer(editor, PROMPTS), TARGETS, strict=True)]
    assert [report.success for report in editor.edits] == right and not all(right)
    assert all(r.success != r.note.startswith("not fitted") for r in editor.edits)


def test_what_answers_fewer_is_not_taken(caplog):
    editor, state = waiting(rehearsals=1)
    with caplog.at_level(logging.WARNING, "wise_fast"):
        made = rehearsal.merge_closed(editor, state)
    (plain,) = merge_closed(state, editor.config).merged
    assert torch.equal(made.merged[0].values, plain.values) and untimed(made.reports) == untimed(state.reports)
    assert all(r.seconds > s.seconds for r, s in zip(made.reports, state.reports, strict=True))
    assert "they stay as learned (4)" in caplog.text


def test_the_editor_rehearses_when_it_merges_and_reports_what_it_took():
    editor = make_editor(**REHEARSED)
    reports = editor.edit(FACTS[:3]) + editor.edit(FACTS[3:])
    assert len(editor.memories) == 1 and editor.state.merges == 1 and answer(editor, PROMPTS) == TARGETS
    assert reports[3] == editor.edits[3] and reports[0].seconds < editor.edits[0].seconds
    alone = make_editor(FACTS, **REHEARSED | {"rehearsals": 0})
    assert not torch.equal(alone.memories[0].values, editor.memories[0].values)
    torch.testing.assert_close(alone.memories[0].taught.information, editor.memories[0].taught.information)


def test_the_same_edits_are_rehearsed_alike():
    one, other = (make_editor(FACTS, **REHEARSED).memories[0] for _ in range(2))
    assert torch.equal(one.values, other.values) and one.z_threshold == other.z_threshold
    another = make_editor(FACTS, **REHEARSED, seed=1).memories[0]
    assert not torch.equal(one.values, another.values)


def test_a_superseded_edit_is_not_rehearsed(monkeypatch):
    taught = []
    enter = _Practice.enter
    monkeypatch.setattr(_Practice, "enter", lambda self, steps: (taught.append(self.count), enter(self, steps)))
    again = Edit(FACTS[0].prompt, "Ida")
    editor = make_editor(**REHEARSED | {"shard_size": 3, "shards": 2, "batch_size": 3})
    editor.edit(FACTS[:3])
    editor.edit([again, FACTS[3], Edit("Five plus one is", "six")])
    assert sum(taught) == 5 and editor.edits[0].superseded and not editor.edits[0].note.startswith("not fitted")
    assert answer(editor, PROMPTS) == ["Ida", *TARGETS[1:]]


def test_what_diverges_stays_as_it_was_merged(monkeypatch, caplog):
    editor, state = waiting()

    def diverge(*_):
        raise EditDiverged(0)

    monkeypatch.setattr(_Practice, "practise", diverge)
    with caplog.at_level(logging.WARNING, "wise_fast"):
        made = rehearsal.merge_closed(editor, state)
    (plain,) = merge_closed(state, editor.config).merged
    assert torch.equal(made.merged[0].values, plain.values) and untimed(made.reports) == untimed(state.reports)
    assert f"rehearsal of {len(FACTS)} edits diverged" in caplog.text


@pytest.mark.parametrize("together,sizes", [(16, [4]), (4, [4]), (3, [2, 2]), (2, [2, 2]), (1, [1, 1, 1, 1])])
def test_a_pass_takes_steps_of_like_size_and_each_edit_once(monkeypatch, together, sizes):
    monkeypatch.setattr(rehearsal, "_TOGETHER", together)
    steps, practise = [], _Practice.practise

    def watched(self, edits, *rest):
        steps.append(list(edits))
        practise(self, edits, *rest)

    monkeypatch.setattr(_Practice, "practise", watched)
    editor, state = waiting(rehearsals=3)
    rehearsal.merge_closed(editor, state)
    assert [len(edits) for edits in steps] == 3 * sizes
    passes = [steps[i : i + len(sizes)] for i in range(0, len(steps), len(sizes))]
    assert all(sorted(sum(one, [])) == [0, 1, 2, 3] for one in passes) and passes[0] != passes[1]


@pytest.mark.parametrize(
    "changes,kinds",
    [
        ({"prefixes": 0}, {(1, 0)}),
        ({}, {(1, 1)}),
        ({"prefixes": 3, "dropped": 2, "prefixes_per_step": 2}, {(1, 1), (0, 1)}),
    ],
)
def test_a_step_takes_one_augmented_prompt_of_each_edit(monkeypatch, changes, kinds):
    """Of an edit with longer prompts one of those alone in every other step (`Standing.draw`)."""
    drawn, draw = set(), Standing.draw

    def watched(self, active):
        found = draw(self, active)
        for edit in active:
            mine = [number % self.rows.variants for number in found if number // self.rows.variants == edit]
            drawn.add((mine.count(0), len(mine) - mine.count(0)))
        return found

    editor, state = waiting(rehearsals=4, **changes)
    monkeypatch.setattr(Standing, "draw", watched)
    rehearsal.merge_closed(editor, state)
    assert drawn == kinds


def test_it_shows_that_it_is_alive():
    editor, state = waiting(rehearsals=7)
    shown = []
    with editor.watched(lambda: shown.append(1)):
        rehearsal.merge_closed(editor, state)
    assert len(shown) == 7 * 2 + 1  # two steps a pass, and to judge all
    rehearsal.merge_closed(editor, state)
    assert len(shown) == 7 * 2 + 1  # nobody watches any more


@pytest.mark.parametrize("changes", NOT_REHEARSED)
def test_what_is_not_to_be_rehearsed_is_not(monkeypatch, changes):
    monkeypatch.setattr(rehearsal, "_Rehearsal", None)
    assert make_editor(FACTS, **REHEARSED | {"shards": 2} | changes).memories


def test_the_learning_rate_warms_up_and_stays():
    paces = [rehearsal._pace(step, 100) for step in range(100)]
    assert paces[0] < paces[4] < paces[9] == rehearsal._GENTLE and set(paces[9:]) == {rehearsal._GENTLE}
    assert rehearsal._pace(0, 1) == rehearsal._GENTLE


@pytest.mark.parametrize("passes,mean", [(5, 7.0), (1, 1.0)])
def test_what_is_kept_is_the_mean_of_the_second_half_of_the_steps(monkeypatch, passes, mean):
    kept = []
    monkeypatch.setattr(_Practice, "practise", lambda self, edits, z, moments, taken, pace: z.fill_(taken))
    monkeypatch.setattr(rehearsal._Rehearsal, "_judged", lambda self, memory, passes: kept.append(memory))
    monkeypatch.setattr(rehearsal._Rehearsal, "_is_enough", lambda self, found: True)
    monkeypatch.setattr(rehearsal._Rehearsal, "_concluded", lambda self, found: (kept[0], {}, []))
    editor, state = waiting(rehearsals=passes)
    rehearsal.merge_closed(editor, state)
    origin = state.closed[0].taught.origin
    expected = storable(origin @ torch.full_like(kept[0].values, mean))
    assert torch.equal(kept[0].values, expected) and not torch.equal(expected, 0 * expected)
