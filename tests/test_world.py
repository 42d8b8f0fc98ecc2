"""The synthetic world and the benchmark of four families on it. Nothing here asserts quality: no model is trained."""

import itertools
import json

import pytest
import torch

from bench import families, pretrain, records
from bench.world import SPECIAL, WorldSettings, make_edits, make_tokenizer, make_world
from bench.world_words import RELATIONS
from wise_fast.errors import ConfigError, EditDataError, WiseError
from wise_fast.tokens import encode, encode_target

SMALL = WorldSettings(people=12, countries=8, fillers=40, vocabulary=600)
MICRO = [
    *("--world", "people=12", "--world", "countries=8", "--world", "fillers=40", "--world", "vocabulary=600"),
    *("--shape", "width=32", "--shape", "d_ff=64", "--train", "steps=3", "--train", "batch=8", "--train", "knows=0"),
    *("--T", "2", "--set", "max_steps=2", "--set", "prefixes=1", "--json"),
]


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


@pytest.fixture(scope="module")
def tokenizer(world):
    return make_tokenizer(world)


def test_the_same_settings_make_the_same_world(world, tokenizer):
    again = make_world(SMALL)
    assert again == world and again.digest() == world.digest()
    assert make_tokenizer(again).get_vocab() == tokenizer.get_vocab()
    assert make_edits(again, 20) == make_edits(world, 20)
    assert make_edits(world, 20, seed=1) != make_edits(world, 20)
    assert make_world(WorldSettings(**{**vars(SMALL), "seed": 1})).digest() != world.digest()


def test_every_fact_has_an_object_of_its_pool_and_words_of_its_own(world):
    assert len({(fact.entity, fact.relation) for fact in world.facts}) == len(world.facts)
    assert all(fact.object in world.pools[RELATIONS[fact.relation].pool] for fact in world.facts)
    prompts = [fact.prompt(template) for fact in world.facts for template in fact.templates]
    assert len(set(prompts)) == len(prompts)
    assert all(4 <= len(relation.templates) <= 6 for relation in RELATIONS.values())


def test_held_out_questions_are_not_taught(world, tokenizer):
    taught, others = (dict(world.questions(held_out=out)) for out in (False, True))
    assert not taught.keys() & others.keys()
    assert len(others) == len(world.facts)  # one template of every fact
    assert len(taught) + len(others) == sum(len(fact.templates) for fact in world.facts)
    rows = {encode(tokenizer, f"{prompt} {answer}")[1:] for prompt, answer in others.items()}
    batches = pretrain._batches(world, pretrain.Training(lead=0.0), tokenizer)
    for ids, weights in itertools.islice(batches, 4):
        for row, weight in zip(ids.tolist(), weights.tolist()):
            text = tuple(token for token, w in zip(row, weight) if w > 0)
            assert text[-1] == tokenizer.eos_token_id and text[:-1] not in rows


def test_edits_teach_what_is_not_true_and_ask_what_stays(world):
    facts = {f.prompt(t): f for f in world.facts for t in f.templates}
    edits = make_edits(world, 40)
    edited = {facts[e.prompt] for e in edits}
    assert len(edited) == 40
    for edit in edits:
        fact = facts[edit.prompt]
        assert edit.truth == fact.object != edit.target
        assert edit.target in world.pools[RELATIONS[fact.relation].pool]
        asked = {facts[prompt] for prompt in edit.rephrases}
        assert asked == {fact} and {edit.prompt, *edit.rephrases} == {fact.prompt(t) for t in fact.templates}
        same, other = (facts[place.prompt] for place in edit.locality)
        assert same.relation == fact.relation != other.relation
        for place, untouched in zip(edit.locality, (same, other)):
            assert untouched.entity != edit.subject and untouched not in edited
            assert place.answer == untouched.object


def test_edits_are_taken_from_what_the_model_knows(world):
    known = {fact.prompt(1) for fact in world.facts[::2]}
    for edit in make_edits(world, 5, known=known):
        assert edit.prompt in known and {place.prompt for place in edit.locality} <= known
        assert len(edit.rephrases) == 4
    with pytest.raises(EditDataError, match="knows 3 facts"):
        make_edits(world, 5, known={fact.prompt(0) for fact in world.facts[:3]})


def test_the_tokenizer_round_trips(world, tokenizer):
    questions = [*world.questions(held_out=False), *world.questions(held_out=True)]
    for text in (*world.fillers, *(f"{prompt} {answer}" for prompt, answer in questions), "Who is Ada Lovelace?"):
        ids = encode(tokenizer, text)
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for prompt, answer in questions:
        example = encode_target(tokenizer, prompt, answer)
        assert example.prompt == encode(tokenizer, prompt)
        assert tokenizer.decode(example.target) == answer
    assert [tokenizer.convert_tokens_to_ids(name) for name in SPECIAL] == list(range(4))


def test_names_share_tokens():
    world = make_world()
    tokenizer = make_tokenizer(world)
    entities = {fact.entity for fact in world.facts}
    ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in sorted(entities)]
    assert {len(name) for name in ids} == {1, 2, 3}
    assert len({token for name in ids for token in name}) < len(entities)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wise_fast" / "worlds"


def test_a_run_from_end_to_end(cache, tmp_path, capsys, monkeypatch):
    families.main([*MICRO, "--out", str(tmp_path), "--families", "llama", "gptj"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in rows] == ["llama", "gptj"]
    recorded = records.read(tmp_path / "families.csv")
    assert len(recorded) == len(rows) and tuple(recorded[0]) == families.COLUMNS
    for row in rows:
        assert row["T"] == 2 and json.loads(row["settings"]) == {"max_steps": 2, "prefixes": 1}
        assert 0 <= row["locality"] <= 1 and row["parameters"] > 0
        assert row["locality"] == pytest.approx((row["locality_same"] + row["locality_other"]) / 2)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(pretrain, "train", None)  # the second time, nothing is trained
    families.main([*MICRO, "--out", str(tmp_path), "--families", "gptj"])
    assert json.loads(capsys.readouterr().out)[0]["reliability"] == rows[1]["reliability"]


@pytest.mark.parametrize("family", pretrain.FAMILIES)
def test_every_family_is_trained_from_its_seed(family, world, tokenizer):
    shape, training = pretrain.Shape(width=16, d_ff=32, layers=2, heads=2), pretrain.Training(steps=2, again=0, batch=4)
    models = [pretrain.train(family, world, shape, training, tokenizer) for _ in range(2)]
    assert models[0].config.model_type == family and not models[0].training
    for one, other in zip(*(model.parameters() for model in models)):
        assert torch.equal(one, other)


def test_a_model_that_does_not_know_enough_is_refused(cache, world):
    training = pretrain.Training(steps=1, again=0, batch=4)
    with pytest.raises(WiseError, match="expected 0.99; train longer"):
        pretrain.prepared("llama", world, pretrain.Shape(width=16, d_ff=32, layers=2, heads=2), training)
    assert not cache.exists()


@pytest.mark.parametrize("change", ["steps=many", "stpes=3", "steps=1.5"])
def test_a_setting_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="expected one like|unknown setting"):
        families._changed(pretrain.Training(), [change])
