"""The small baselines of bench/: they teach, they leave no trace, and each does what its paper says."""

import json

import pytest
import torch

from bench import lifelong, records
from bench.ftl import FTL, FTLConfig
from bench.grace import Codebook
from bench.methods import NAMES, digest, make_method, served
from tests.edited import ELSEWHERE, FACTS, QUICK, TEXTS, logits, same, wide_model
from tests.tiny import tiny_model, tiny_tokenizer
from wise_fast import Edit, WiseConfig, WiseEditor, metrics
from wise_fast.errors import ConfigError, EditDataError

PAPER_MARGINS = dict(alpha=0.2, beta=1.0, gamma=0.5)
SETTINGS = {
    "wise_fast": QUICK.to_dict(),
    "wise": dict(steps=25, lr=0.5, prefixes=1, prefix_tokens=3, mask_ratio=0.6, **PAPER_MARGINS),
    "ft-l": dict(steps=60, lr=3e-3, norm_constraint=0.05, nll=0.05),
    "grace": dict(radius=0.05, steps=100, lr=0.3, nll=0.05, stop="none"),
}
BASELINES = [name for name in NAMES if name != "wise_fast"]


# GRACE's one vector, in a random model, reaches one token: its facts are a letter each, right behind the prompt.
LETTERS = tuple(Edit(f"{fact.prompt} ", fact.target[0]) for fact in FACTS)
NEAR = "Who leads Fry? "


def facts(name):
    return LETTERS if name == "grace" else FACTS


def make(name, family="mistral", model=None, **changes):
    model = wide_model(family) if model is None else model
    return make_method(name, model, tiny_tokenizer(), SETTINGS[name] | changes)


def answers(method, prompts):
    tokens = 1 if method.name == "grace" else 6
    return metrics.answer(method, prompts, max_new_tokens=tokens)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_teaches_and_leaves_no_trace(name):
    model = wide_model()
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    names = [key for key, _ in model.named_modules()]
    method, taught = make(name, model=model), facts(name)[:2]
    prompts, texts = [f.prompt for f in taught], [*(f.prompt for f in taught), *TEXTS]
    before, asked = logits(model, texts), answers(method, prompts)
    reports = method.edit(taught)
    assert [r.edit for r in reports] == list(taught) == [r.edit for r in method.edits]
    assert all(r.success and r.loss < r.loss_before and r.steps and r.seconds > 0 for r in reports)
    given, wanted = answers(method, prompts), [f.target for f in taught]
    assert given == wanted if name != "wise" else all(map(str.startswith, given, wanted))  # it trains no stop token
    assert not same(logits(model, texts), before)
    with method.disabled():
        assert same(logits(model, texts), before) and answers(method, prompts) == asked
    assert answers(method, prompts) == given
    assert method.unload() is model
    assert same(logits(model, texts), before) and "generate" not in model.__dict__
    assert [key for key, _ in model.named_modules()] == names
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_other_families(name, family):
    method = make(name, family)
    (report,) = method.edit([facts(name)[0]])
    assert report.loss < report.loss_before


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_records(name):
    method = make(name)
    empty = digest(method)
    assert method.ratios(["anything"]) is None and method.count == 0
    taught = facts(name)[:2]
    method.edit(taught)
    json.dumps(method.settings(), allow_nan=False)
    assert digest(method) != empty and len(digest(method)) == 64
    if name == "ft-l":
        assert method.ratios(["anything"]) is None and served(method) == 0 == method.count
        return
    assert served(method) > 0 < method.count
    inside = method.ratios([f.prompt for f in taught])
    assert all(ratio > 1 for ratio in inside)
    again = method.ratios([f.prompt for f in taught] * 9)[-2:]
    assert again == pytest.approx(inside, rel=1e-2) or name == "grace"  # there a ratio divides by next to nothing
    assert all(ratio > 1 for ratio in again)


@pytest.mark.parametrize("name", BASELINES)
def test_a_bad_edit_is_refused_before_any_is_learned(name):
    method = make(name)
    with pytest.raises(EditDataError):
        method.edit([FACTS[0], {"prompt": "no target"}])
    assert method.edits == [] and method.count == 0


def test_methods_are_made_by_name():
    with pytest.raises(ConfigError, match="no method 'rome'; there are: wise_fast, wise, ft-l, grace"):
        make_method("rome", None, None)
    with pytest.raises(ConfigError, match="grace has no setting 'radios'"):
        make_method("grace", None, None, {"radios": 2})
    for name, bad in (("ft-l", {"lr": 0}), ("grace", {"radius": -1}), ("wise", {"steps": 0}), ("ft-l", {"lr": "x"})):
        with pytest.raises(ConfigError):
            make_method(name, tiny_model("llama"), tiny_tokenizer(), bad)
    editor = WiseEditor(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(ConfigError, match="side memories already"):
        FTL(editor.model, editor.tokenizer)


class TestFTL:
    @pytest.mark.parametrize("family", ["mistral", "gpt2"])
    def test_no_entry_moves_further_than_the_constraint(self, family):
        method = FTL(wide_model(family), tiny_tokenizer(), FTLConfig(steps=20, lr=1e-2, norm_constraint=1e-3, nll=0))
        start = method.projection.weight.data.clone()
        before = start
        for number, fact in enumerate(FACTS[:3], start=1):
            method.edit([fact])
            now = method.projection.weight.data
            moved = (now - before).abs().max()
            assert 0.9e-3 < moved <= 1e-3 * (1 + 1e-4)
            assert (now - start).abs().max() <= number * 1e-3 * (1 + 1e-4)
            before = now.clone()

    def test_without_constraint_it_moves_further(self):
        method = FTL(wide_model(), tiny_tokenizer(), FTLConfig(steps=20, lr=1e-2, norm_constraint=None, nll=0))
        start = method.projection.weight.data.clone()
        method.edit([FACTS[0]])
        assert (method.projection.weight.data - start).abs().max() > 0.02

    def test_nothing_but_the_one_matrix_changes(self):
        model = wide_model()
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        method = make("ft-l", model=model)
        method.edit([FACTS[0]])
        moved = [key for key, value in model.state_dict().items() if not torch.equal(value, tensors[key])]
        assert moved == [f"{method.architecture.projection}.weight"]
        assert all(p.grad is None for p in model.parameters())

    def test_it_stops_where_its_loss_holds(self):
        method = make("ft-l", nll=1e9)
        (report,) = method.edit([FACTS[0]])
        assert report.steps == 0 and report.loss == report.loss_before


class TestGrace:
    @pytest.fixture(scope="class")
    @classmethod
    def taught(cls):
        """(method with all letters, their reports, logits and answers elsewhere before); tests leave it as it is."""
        method = make("grace")
        with method.disabled():
            before = logits(method.model, ELSEWHERE), answers(method, ELSEWHERE)
        return method, method.edit(LETTERS), *before

    def test_unrelated_prompts_are_bit_identical(self, taught):
        method, _, before, asked = taught
        assert same(logits(method.model, ELSEWHERE), before) and answers(method, ELSEWHERE) == asked
        assert (method.routing.choice == -1).all()

    def test_each_prompt_of_a_batch_has_its_own_entry(self, taught):
        method = taught[0]
        assert answers(method, [f.prompt for f in LETTERS] + list(ELSEWHERE))[: len(LETTERS)] == [
            f.target for f in LETTERS
        ]

    def test_far_edits_are_entries_of_their_own(self, taught):
        method, reports, *_ = taught
        assert method.count == len(LETTERS) and {r.note for r in reports} == {"new entry"}
        assert torch.equal(method.codebook.radii, torch.full((len(LETTERS),), 0.05))

    @pytest.fixture(scope="class")
    @classmethod
    def gap(cls):
        """How far the nearby prompt's key is from that of the first letter."""
        probe = make("grace")
        probe.edit([LETTERS[0]])
        list(probe._forward_prompts([NEAR]))
        return probe.layer.distances.item()

    def test_the_same_label_nearby_expands(self, gap):
        near = Edit(NEAR, LETTERS[0].target)
        method = make("grace", radius=0.6 * gap)
        assert [r.note for r in method.edit([LETTERS[0], near])] == ["new entry", "expanded the nearest entry"]
        assert method.count == 1 and method.codebook.radii.item() == pytest.approx(gap, rel=1e-3)
        list(method._forward_prompts([near.prompt]))
        assert method.routing.choice.tolist() == [0]  # the expanded radius takes it in
        assert method.edits[1].steps == 0

    def test_another_label_nearby_splits(self, gap):
        near = Edit(NEAR, "C")
        method = make("grace", radius=0.9 * gap)
        assert [r.note for r in method.edit([LETTERS[0], near])] == ["new entry", "split the nearest entry"]
        assert method.codebook.radii.tolist() == pytest.approx([gap / 2] * 2, rel=1e-3)
        assert answers(method, [LETTERS[0].prompt, near.prompt]) == [LETTERS[0].target, "C"]

    def test_the_same_prompt_again_replaces_its_entry(self):
        method = make("grace")
        again = Edit(LETTERS[0].prompt, "C")
        assert method.edit([LETTERS[0], again])[1].note == "replaced an entry"
        assert method.count == 1 and answers(method, [again.prompt]) == ["C"]
        assert method.edits[0].note.startswith("superseded")

    def test_the_nearest_key_wins_and_its_own_radius_decides(self):
        book = Codebook(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 1), torch.tensor([3.5, 1.0]))
        distance, nearest = book.nearest(torch.tensor([[1.0, 0.0], [2.5, 0.0], [0.0, 9.0]]))
        assert nearest.tolist() == [0, 1, 0] and distance.tolist() == pytest.approx([1, 1.5, 9])


class TestPlainWise:
    def test_decisions_are_per_sequence_and_held_while_decoding(self):
        method = make("wise")
        method.edit(FACTS[:2])
        alone = [answers(method, [prompt])[0] for prompt in TEXTS]
        assert answers(method, TEXTS) == alone
        with method.disabled():
            assert answers(method, ELSEWHERE) == alone[len(FACTS) :]

    def test_each_memory_is_a_dense_copy(self):
        method = make("wise", shard_size=1, shards=3, steps=2)
        method.edit(FACTS[:2])
        dense = method.projection.weight.nbytes
        assert method.count == 2 and served(method) == 2 * dense


@pytest.mark.usefixtures("little_to_read")
class TestSideBySide:
    EDITS = [
        {"prompt": "Who leads Fro?", "target": "Ann", "rephrases": ["Fro's head:"], "locality": [{"prompt": "0 + 7"}]},
        {"prompt": "Capital of Zed:", "target": "Bo | <b>", "locality": [{"prompt": "~~~", "answer": "x"}]},
        {"prompt": "The color is", "target": "red", "rephrases": ["Its colour:"]},
    ]

    QUICK = {
        "wise_fast": ("max_steps=2", "prefixes=1"),
        "wise": ("steps=1", "prefixes=1", "prefix_tokens=2"),
        "ft-l": ("steps=2", "norm_constraint=null", "lr=0.1"),
        "grace": ("steps=2",),
    }

    def only(self, *names):
        settings = [part for name in names for text in self.QUICK[name] for part in ("--set", f"{name}.{text}")]
        return ["--methods", ",".join(names), *settings]

    @pytest.fixture
    def arguments(self, tmp_path):
        tiny_model("llama").save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "edits.json").write_text(json.dumps(self.EDITS))
        paths = ["--model", tmp_path / "model", "--edits", tmp_path / "edits.json", "--out", tmp_path / "out"]
        return [*map(str, paths), "--results", str(tmp_path), "--T", "3", "--no-plots", "--no-generate"]

    def test_every_method_has_a_run_rows_and_a_place_in_the_report(self, arguments, tmp_path, capsys):
        lifelong.main([*arguments, *self.only(*NAMES), "--evaluate-at", "1"])
        table = capsys.readouterr().out
        rows = records.read(tmp_path / "lifelong.csv")
        assert [(row["method"], row["T"]) for row in rows] == [(name, t) for name in NAMES for t in (1, 3)]
        assert all(set(row) == set(lifelong.COLUMNS) and row["reliability"] is not None for row in rows)
        text = (tmp_path / "out" / "report" / "report.md").read_text()
        for name in NAMES:
            assert name in table and name.replace("_", "\\_") in text
            header = json.loads((tmp_path / "out" / name / "run.json").read_text())
            assert (header["method"], header["T"], header["evaluate_at"]) == (name, 3, [1, 3])
            lines = [json.loads(line) for line in (tmp_path / "out" / name / "journal.jsonl").open()]
            assert sum(len(line["reports"]) for line in lines) == 3 and all(len(line["digest"]) == 64 for line in lines)
            points = [json.loads(line) for line in (tmp_path / "out" / name / "evaluations.jsonl").open()]
            assert [point["t"] for point in points] == [1, 3]
            assert (points[-1]["routing"] is None) == (name == "ft-l")
            assert points[-1]["figures"]["perplexity_before"] == pytest.approx(rows[0]["perplexity_before"])

    def test_a_file_of_a_run_gives_what_no_option_does(self, arguments, tmp_path):
        file = tmp_path / "run.yaml"
        said = ("T: 2", "evaluate_at: [1]", "generate: true", "batch_size: 2", "settings: {lr: 1.5, seed: 3}")
        file.write_text("\n".join(said))
        lifelong.main([*arguments, "--methods", "wise_fast", "--config", str(file), "--set", "wise_fast.max_steps=2"])
        header = json.loads((tmp_path / "out" / "wise_fast" / "run.json").read_text())
        assert (header["T"], header["evaluate_at"], header["seed"], header["generate"]) == (3, [1, 3], 3, False)
        config = header["config"]
        assert (config["lr"], config["batch_size"], config["max_steps"], config["seed"]) == (1.5, 2, 2, 3)

    @pytest.mark.parametrize("file", sorted((records.RESULTS.parent / "recipes").glob("*.yaml")), ids=lambda f: f.stem)
    def test_recipes_are_runs(self, file):
        options = lifelong.parse(["--config", str(file), "--out", "unused"])
        settings = lifelong.settings_of(["wise_fast"], [], options.seed, options.ours)
        config = WiseConfig.from_dict(settings["wise_fast"])
        points = lifelong.parse_points(options.evaluate_at)
        run = lifelong.RunSettings(task=options.task, evaluate_at=points, generate=options.generate)
        assert run.points(options.T)[-1] == options.T and str(options.T) in file.stem
        assert config.mode == ("merge" if "merged" in file.stem else "retrieve")

    def test_a_directory_that_holds_things_is_left_alone(self, arguments, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(SystemExit, match="not empty"):
            lifelong.main([*arguments, *self.only("grace")])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]

    def test_methods_do_not_see_each_other(self, arguments, tmp_path):
        lifelong.main([*arguments, *self.only("grace")])
        lifelong.main([*arguments, *self.only("ft-l", "grace"), "--out", str(tmp_path / "after")])
        made = []
        for name in ("out", "after"):
            lines = map(json.loads, (tmp_path / name / "grace" / "journal.jsonl").open())
            made.append([(r["loss_before"], r["loss"]) for line in lines for r in line["reports"]])
        assert made[0] == made[1]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--set", "rome.lr=1"], "expected METHOD.KEY=VALUE"),
            (["--set", "grace.radios=1"], "grace has no setting 'radios'"),
            (["--T", "9"], "only 3 edits"),
            (["--config", "{file}"], "T is 2.5, expected a whole number"),
            (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        ],
    )
    def test_mistakes_end_with_one_line_before_anything_runs(self, arguments, tmp_path, more, message):
        (tmp_path / "run.yaml").write_text("T: 2.5")
        given = [word for word in arguments if word not in ("--T", "3")] if "{file}" in more else arguments
        with pytest.raises(SystemExit, match=message):
            lifelong.main([*given, *(word.format(file=tmp_path / "run.yaml") for word in more)])
        assert not (tmp_path / "out").exists() and not (tmp_path / "lifelong.csv").exists()

    def test_an_unknown_method_is_refused(self, arguments, capsys):
        with pytest.raises(SystemExit):
            lifelong.parse([*arguments, "--methods", "wise,rome"])
        assert "rome: expected some of" in capsys.readouterr().err
