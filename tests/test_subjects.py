"""Scope by the subject: how names are written and found, and that a prompt about something else is left alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edited import make_editor
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseConfig, WiseEditor, subjects
from wise_fast.memory import Bank
from wise_fast.subjects import ANY, WIDTH, Names, find_subject, named, places, spellings

INF = float("inf")
LEADS = Edit("Who leads Fro?", "Ann", subject="Fro")


def rows(*names):
    """Of one edit each, with endings of ones."""
    return Names.of([[name] for name in names], torch.ones(len(names), 2))


def thresholds(ids, *names, owners=None, mask=None, given=(0.5,), a=None, endings=None, alike=-1.0):
    """What `named` makes of these thresholds for one sequence; each name is another edit's."""
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.tensor([mask])
    owners = torch.zeros(len(names), dtype=torch.int64) if owners is None else torch.tensor(owners)
    known = rows(*names)
    a = torch.ones(ids.numel(), 2) if a is None else torch.tensor(a)
    endings = known.endings if endings is None else torch.tensor(endings)
    limits = torch.full((len(names),), alike)
    about = places(known.tokens), known.about, endings, limits, owners
    return named(torch.tensor(given), ids, mask, a, *about)[0].tolist()


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


@pytest.mark.parametrize("length,share", [(3, 1.0), (16, 1.0), (36, 2 / 3), (100, 0.4), (400, 0.4)])
def test_a_passage_that_names_the_whole_subject_may_be_quieter(length, share):
    passage = [9] * (length - 3) + [5, 6, 7]
    assert thresholds(passage, (5, 6, 7)) == pytest.approx([share * 0.5])
    assert thresholds(passage, (5, 6, 8, 7)) == [0.5 * 2**3]  # a part of it is no more than in a question
    assert thresholds(passage, (ANY,)) == [0.5]
    padded = [True] * 3 + [False] * (length - 3)
    assert thresholds([5, 6, 7] + [9] * (length - 3), (5, 6, 7), mask=padded) == [0.5]


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


def test_only_the_edit_that_is_named_says_how_a_prompt_ends():
    ends, ways = [[9.0, 9.0], [2.0, 0.1]], [[1.0, 0.0], [0.0, 1.0]]
    assert thresholds([5, 3], (5,), (6,), a=ends, endings=ways, alike=0.65) == [0.5]
    assert thresholds([6, 3], (5,), (6,), a=ends, endings=ways, alike=0.65) == [INF]
    assert thresholds([6, 3], (5,), (6,), a=ends, endings=ways) == [0.5]
    mask = [True, False]
    assert thresholds([6, 3], (5,), (6,), a=[[0.0, 1.0], [1.0, 0.0]], endings=ways, alike=0.65, mask=mask) == [0.5]


def test_of_several_memories_the_one_that_knows_the_ending_keeps_its_threshold():
    same, ways = [[0.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.6, 0.8]]
    two = dict(owners=[0, 1], given=(0.5, 0.5), endings=ways)
    assert thresholds([5, 3], (5,), (5,), a=same, **two) == pytest.approx([0.5, 0.5 * 40000**0.5])
    assert thresholds([5, 3], (5,), (6,), a=same, **two) == [0.5, INF]
    assert thresholds([6, 3], (5,), (6,), a=same, **two) == [INF, 0.5]  # a closed one makes no other louder
    first, second = thresholds([5, 3], (5,), (5,), a=[[0.0, 0.0], [1.0, 1.0]], **two)
    assert second == 0.5 and first == pytest.approx(0.5 * ((1 - 0.5**0.5) / (1 - 0.98**0.5)) ** 0.5, rel=1e-4)
    nothing = dict(owners=[0, 1], given=(0.5, 0.5), endings=[[1.0, 0.0], [0.0, 0.0]])
    assert thresholds([5, 3], (5,), (5,), a=same, **nothing) == [0.5, 0.5]  # of loaded ones nobody knows


def test_closed_memories_stay_closed_and_packs_have_thresholds_of_their_own():
    known = rows((5,), (5,))
    found = named(
        torch.tensor([[0.5, INF], [INF, 0.25]]),
        torch.tensor([[5], [5]]),
        torch.ones(2, 1, dtype=torch.bool),
        torch.ones(2, 2),
        places(known.tokens),
        known.about,
        known.endings,
        torch.full((2,), -1.0),
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
    length = max(16, len(before) + len(name) + len(behind))
    assert thresholds([*before, *name, *behind], tuple(name)) == pytest.approx([0.5 * (16 / length) ** 0.5])


def test_free_places_are_never_found():
    zeros = torch.zeros(3, dtype=torch.int64)
    about = subjects.free(3, "cpu"), zeros, torch.ones(3, 2), torch.full((3,), -1.0), zeros
    every = torch.arange(300_000)[None]
    mask = torch.zeros_like(every, dtype=torch.bool)
    for prompt in (mask, ~mask):
        assert named(torch.tensor([0.5]), every, prompt, torch.ones(300_000, 2), *about).tolist() == [[INF]]


def test_endings_count_where_those_of_different_edits_have_little_in_common():
    apart, alike = torch.eye(6), torch.ones(6, 6) + torch.eye(6)
    names = [[(5,)]] * 6
    assert Names.of(names, apart).limit == 0.65 and Names.of(names, alike).limit == -1
    assert Names.of(names[:3], apart[:3]).limit == -1
    both = Names.of(names[:3], apart[:3]).join(Names.of(names[3:], apart[3:]))
    assert both.limit == 0.65 and both.about.tolist() == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(both.endings, apart)


def test_spellings_are_those_of_the_prompt_alone_and_in_a_sentence():
    encode = lambda text: tuple(tiny_tokenizer()(text)["input_ids"])  # noqa: E731
    found = spellings(tiny_tokenizer(), LEADS)
    assert {encode("Fro")[1:], encode("fro")[1:]} == set(found)
    assert len(set(found)) == len(found)
    assert spellings(tiny_tokenizer(), Edit("The color is", "red")) == [(ANY,)]
    assert all(len(row) == WIDTH for row in spellings(tiny_tokenizer(), Edit(f"Who leads {'F' * 40}?", "Ann"))[:1])


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("Fro,", "Fro"),
        ("Fro is", "Fro"),
        ("Fro, also known as", "Fro"),
        ("The Who", "The Who"),
        ("Is it", "Is it"),
        ("Fro Inc.", "Fro Inc."),
        ("also", "also"),
        ("the who", "the who"),
        (" Fro is\n", "Fro"),
        ("of the", "of the"),
    ],
)
def test_first_words_of_a_passage_are_a_name_without_what_leads_on(prompt, name):
    encode = lambda text: tuple(tiny_tokenizer()(text)["input_ids"])  # noqa: E731
    assert spellings(tiny_tokenizer(), Edit(prompt, "a leader", subject=prompt.strip()))[-1] in (
        encode(name)[1:],
        encode(name.lower())[1:],
    )


def test_a_subject_inside_of_a_question_is_kept_as_it_is_given():
    encode = lambda text: tuple(tiny_tokenizer()(text)["input_ids"])  # noqa: E731
    assert encode("the is")[1:] in spellings(tiny_tokenizer(), Edit("Who saw the is?", "Ann", subject="the is"))


def test_a_bank_knows_whose_names_they_are():
    editor = make_editor((LEADS, Edit("Capital of Zed:", "Bo"), Edit("My dog eats", "ham")), shard_size=1, batch_size=1)
    memories = editor.memories
    bank = Bank.join(memories, torch.float32)
    assert bank.owners.tolist() == [0, 1, 2] and bank.endings.shape == (3, editor.architecture.d_ff)
    assert bank.about.tolist() == [j for j, memory in enumerate(memories) for _ in memory.names.tokens]
    unasked = Bank.join([memories[0], memories[1].replace(names=None)], torch.float32)
    assert unasked.names[-1].eq(ANY).all() and unasked.owners[-1] == 1 and unasked.alike[-1] == -1
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


@pytest.mark.parametrize("settings", [{"merging": "ties"}, {"merging": "regmean", "mask_ratio": 1.0, "shards": 2}])
def test_merged_memories_know_all_names(settings):
    edits = (LEADS, Edit("Capital of Zed:", "Bo"))
    editor = make_editor(edits, mode="merge", shard_size=1, batch_size=1, **settings)
    (memory,) = editor.memories
    wanted = Names.of([spellings(editor.tokenizer, edit) for edit in edits], memory.names.endings)
    assert torch.equal(memory.names.tokens, wanted.tokens) and torch.equal(memory.names.about, wanted.about)


def test_saved_names_come_back(tmp_path):
    editor = make_editor((LEADS,), batch_size=1)
    editor.save_pretrained(tmp_path / "pack")
    before, model = editor.memories[0].names, editor.unload()
    after = WiseEditor.from_pretrained(model, editor.tokenizer, tmp_path / "pack").memories[0].names
    assert all(torch.equal(getattr(after, name), getattr(before, name)) for name in ("tokens", "about", "endings"))
    assert after.limit == before.limit and after.are_sound(1, editor.architecture.d_ff)


@pytest.mark.parametrize(
    "change",
    [
        dict(tokens=torch.full((1, WIDTH), -2)),
        dict(tokens=torch.ones(1, WIDTH - 1, dtype=torch.int64)),
        dict(about=torch.tensor([1])),
        dict(about=torch.tensor([-1])),
        dict(endings=torch.full((1, 2), torch.nan)),
        dict(endings=torch.ones(1, 3)),
        dict(limit=1.5),
    ],
)
def test_names_that_would_read_elsewhere_are_not_sound(change):
    whole = rows((5, 6))
    assert whole.are_sound(1, 2) and not replace(whole, **change).are_sound(1, 2) and not whole.are_sound(2, 2)


@pytest.mark.parametrize(
    "prompt, subject, found",
    [
        ("Which woman rules Oman?", "Oman", "Oman"),
        ("The Italian coach is Ali", "Ali", "Ali"),
        ("Where from is fro?", "Fro", "fro"),
        ("Who runs iPhones?", "iPhone", "iPhone"),
    ],
)
def test_a_subject_is_a_word_where_it_can_be(prompt, subject, found):
    start, end = find_subject(prompt, subject)
    assert prompt[start:end] == found and prompt.rfind(found) == start


@pytest.mark.parametrize(
    "prompt", ["Who leads Fro?", "Fro's king", "Frozen by", "Led by (Fro)", "In Fro", "from Fro, to Fro"]
)
def test_the_own_prompt_names_all_of_its_subject(prompt):
    row = spellings(tiny_tokenizer(), Edit(prompt, "Ann", subject="Fro"))[0]
    ids = tiny_tokenizer()(prompt)["input_ids"]
    assert thresholds(ids, row) == pytest.approx([0.5 * (16 / max(16, len(ids))) ** 0.5])


def test_a_long_prompt_has_no_names_by_chance():
    ids = torch.randint(0, 200_000, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    absent = [(250_000 + i, 251_000 + i) for i in range(200)]
    assert thresholds(ids, *absent, owners=list(range(200)), given=(0.5,) * 200).count(INF) >= 198
    assert thresholds([*ids, *absent[7]], *absent, owners=list(range(200)), given=(0.5,) * 200)[7] == pytest.approx(0.2)


def test_names_are_looked_up_under_autocast():
    editor = make_editor((LEADS,), batch_size=1)
    asked = editor.tokenizer(["Who leads Fro?", "Who leads Zap?"], return_tensors="pt", padding=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        editor.model(**asked)
    assert editor.routing.choice.tolist() == [0, -1]


def test_edits_that_were_taught_without_names_stay_in_scope():
    editor = make_editor((Edit("Capital of Zed:", "Bo"),), batch_size=1, by_subject=False)
    editor.config = editor.config.replace(by_subject=True)
    editor.edit(LEADS)
    (memory,) = editor.memories
    assert memory.names.tokens[0].eq(ANY).all() and len(memory.names.endings) == 2
    with torch.no_grad():
        editor.model(**editor.tokenizer("Capital of Zed:", return_tensors="pt"))
    assert editor.routing.thresholds.isfinite().all()


def test_endings_of_zeros_stay_zeros_in_half_precision():
    assert not Names.of([[(5,)]], torch.zeros(1, 4, dtype=torch.float16)).endings.any()


def test_edits_taught_without_asking_leave_a_memory_with_names_open_to_them():
    editor = make_editor((LEADS,), batch_size=1)
    editor.config = editor.config.replace(by_subject=False)
    editor.edit(Edit("Capital of Zed:", "Bo"))
    names = editor.memories[0].names
    assert names.tokens[-1].eq(ANY).all() and names.about[-1] == 1 and not names.endings[1].any()


def test_a_superseded_edit_names_nothing_any_more():
    editor = make_editor((LEADS, Edit("Capital of Zed:", "Bo", subject="Zed")), batch_size=1)
    editor.edit(Edit("Who leads Fro?", "Bea", subject="leads"))
    names, fresh = editor.memories[0].names, spellings(editor.tokenizer, Edit("Who leads Fro?", "Bea", subject="leads"))
    assert set(names.about.tolist()) == {1, 2} and len(names.endings) == 3 and not names.endings[0].any()
    assert (names.about == 2).sum() == len(fresh)


def test_no_limit_where_all_endings_are_unknown():
    assert Names.open(5, 4, "cpu").limit == -1


def test_an_edit_that_is_superseded_in_a_later_memory_names_nothing_in_the_earlier():
    edits = (LEADS, Edit("Capital of Zed:", "Bo", subject="Zed"))
    editor = make_editor(edits, batch_size=2, shard_size=2)
    editor.edit(Edit("Who leads Fro?", "Bea", subject="Fro"))
    first, second = editor.memories
    assert set(first.names.about.tolist()) == {1} and set(second.names.about.tolist()) == {0}
