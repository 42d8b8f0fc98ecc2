"""Scope by the subject: how names are written and found, and that a prompt about something else is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edited import make_editor
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseConfig, WiseEditor, subjects
from wise_fast.memory import Bank
from wise_fast.subjects import ANY, WIDTH, find_subject, joined, named, places, spellings, written

INF = float("inf")
ONES = torch.ones(2)
LEADS = Edit("Who leads Fro?", "Ann", subject="Fro")


def rows(*tokens):
    return written(tokens, ONES)


def thresholds(ids, *names, owners=None, mask=None, given=(0.5,)):
    """What `named` makes of these thresholds for one sequence."""
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.tensor([mask])
    owners = torch.zeros(len(names), dtype=torch.int64) if owners is None else torch.tensor(owners)
    return named(torch.tensor(given), ids, mask, places(rows(*names)), owners)[0].tolist()


@pytest.mark.parametrize(
    "prompt, subject, found",
    [
        ("Who leads Fro?", "Fro", "Fro"),
        ("who leads fro?", "Fro", "fro"),
        ("Who wrote The Old Tale of Fro?", None, "The Old Tale"),
        ("Who leads Fro?", "Zed", "Fro"),
        ("What is (a+b)?", "(a+b)", "(a+b)"),
        ("The color is", None, None),
    ],
)
def test_a_subject_is_what_is_given_or_the_longest_name(prompt, subject, found):
    place = find_subject(prompt, subject)
    assert (None if place is None else prompt[slice(*place)]) == found


def test_a_prompt_that_names_the_subject_keeps_its_threshold():
    assert thresholds([9, 5, 6, 7, 9], (5, 6, 7)) == [0.5]


def test_a_part_of_the_name_has_to_be_louder_and_none_of_it_is_out_of_scope():
    assert thresholds([9, 5, 6, 9], (5, 6, 7, 8)) == [0.5 * 2**3]
    assert thresholds([9, 9], (5, 6)) == [INF]


def test_the_tokens_of_a_name_count_behind_each_other():
    assert thresholds([6, 5], (5, 6)) == [0.5 * 2**3]  # the first token alone
    assert thresholds([6, 9, 7], (5, 6, 7)) == [INF]


def test_of_several_names_the_best_counts_for_each_memory():
    assert thresholds([5, 6], (5, 6), (7,), (5, 9), owners=[0, 0, 1], given=(0.5, 1.0)) == [0.5, 8.0]


def test_an_edit_without_a_subject_opens_its_memory_to_every_prompt():
    assert thresholds([3], (ANY,), (5,), owners=[0, 1], given=(0.5, 0.5)) == [0.5, INF]


def test_what_is_no_prompt_names_nothing():
    assert thresholds([5, 6], (5, 6), mask=[True, False]) == [0.5 * 2**3]
    assert thresholds([5, 6], (6,), mask=[True, False]) == [INF]


def test_closed_memories_stay_closed_and_packs_have_thresholds_of_their_own():
    found = named(
        torch.tensor([[0.5, INF], [INF, 0.25]]),
        torch.tensor([[5], [5]]),
        torch.ones(2, 1, dtype=torch.bool),
        places(rows((5,), (5,))),
        torch.tensor([0, 1]),
    )
    assert found.tolist() == [[0.5, INF], [INF, 0.25]]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 300_000), min_size=1, max_size=WIDTH),
    st.lists(st.integers(0, 300_000), max_size=9),
    st.lists(st.integers(0, 300_000), max_size=9),
)
def test_a_name_is_found_wherever_it_stands(name, before, behind):
    assert thresholds([*before, *name, *behind], tuple(name)) == [0.5]


def test_free_places_are_never_found():
    free = subjects.free(3, "cpu")
    every = torch.arange(300_000)[None]
    mask = torch.zeros_like(every, dtype=torch.bool)
    for prompt in (mask, ~mask):
        assert named(torch.tensor([0.5]), every, prompt, free, torch.zeros(3, dtype=torch.int64)).tolist() == [[INF]]


def test_spellings_are_those_of_the_prompt_alone_and_in_a_sentence():
    encode = lambda text: tuple(tiny_tokenizer()(text)["input_ids"])  # noqa: E731
    found = spellings(tiny_tokenizer(), LEADS)
    assert {encode("Fro")[1:], encode("fro")[1:]} == set(found)
    assert len(set(found)) == len(found)
    assert spellings(tiny_tokenizer(), Edit("The color is", "red")) == [(ANY,)]
    assert all(len(row) == WIDTH for row in spellings(tiny_tokenizer(), Edit(f"Who leads {'F' * 40}?", "Ann"))[:1])


def test_rows_are_kept_once_and_in_order():
    both = joined(rows((1, 2), (3,)), rows((3,), (4, 5)))
    assert torch.equal(both, rows((1, 2), (3,), (4, 5))) and torch.equal(joined(None, both), both)


def test_a_bank_knows_whose_names_they_are():
    editor = make_editor((LEADS, Edit("Capital of Zed:", "Bo"), Edit("My dog eats", "ham")), shard_size=1, batch_size=1)
    memories = editor.memories
    bank = Bank.join(memories, torch.float32)
    assert bank.owners.tolist() == [j for j, memory in enumerate(memories) for _ in memory.names]
    unasked = Bank.join([memories[0], memories[1].replace(names=None)], torch.float32)
    assert unasked.names[-1].eq(ANY).all() and unasked.owners[-1] == 1
    assert Bank.join([m.replace(names=None) for m in memories], torch.float32).names is None


@pytest.mark.parametrize("changes", [{}, {"route_by": "score"}, {"layout": "element", "protect": False}])
def test_the_same_question_about_something_else_is_out_of_scope(changes):
    """However loud: with thresholds of next to nothing every other prompt is in scope."""
    editor = make_editor((LEADS,), batch_size=1, **changes)
    state = editor.state
    loud = dict(threshold=1e-9, z_threshold=1e-9, last_limit=INF)
    editor.state = state.replace(shard=state.shard.replace(memory=state.shard.memory.replace(**loud)))
    asked = editor.tokenizer(["Who leads Fro?", "Who leads Zap?", "Fro is led by"], return_tensors="pt", padding=True)
    with torch.no_grad():
        editor.model(**asked)
    assert editor.routing.choice.tolist() == [0, -1, 0]
    embeddings = editor.model.get_input_embeddings()(asked["input_ids"]).detach()
    with torch.no_grad():
        editor.model(inputs_embeds=embeddings, attention_mask=asked["attention_mask"])
    assert editor.routing.choice.tolist() == [0, 0, 0]  # nobody knows what embeddings name


def test_without_asking_for_subjects_nothing_is_kept():
    editor = make_editor((LEADS,), batch_size=1, by_subject=False)
    assert editor.memories[0].names is None and editor.projection.names is None
    assert not WiseConfig.paper().by_subject


@pytest.mark.parametrize("settings", [{}, {"merging": "regmean", "mask_ratio": 1.0, "shards": 2}])
def test_merged_memories_know_all_names(settings):
    edits = (LEADS, Edit("Capital of Zed:", "Bo"))
    editor = make_editor(edits, mode="merge", shard_size=1, batch_size=1, **settings)
    (memory,) = editor.memories
    wanted = rows(*(row for edit in edits for row in spellings(editor.tokenizer, edit)))
    assert torch.equal(memory.names, joined(None, wanted))


def test_saved_names_come_back(tmp_path):
    editor = make_editor((LEADS,), batch_size=1)
    editor.save_pretrained(tmp_path / "pack")
    before, model = editor.memories[0].names, editor.unload()
    loaded = WiseEditor.from_pretrained(model, editor.tokenizer, tmp_path / "pack")
    assert torch.equal(loaded.memories[0].names, before) and loaded.memories[0].names.dtype == torch.int64
