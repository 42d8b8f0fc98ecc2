"""An edited model under lm-evaluation-harness: its own tasks in YAML, without a network, with the edits and without."""

import json
import math
import sys

import pytest
import torch

from tests.edited import ELSEWHERE, FACTS, make_editor, saved_model, untouched
from tests.test_cli import run
from wise_fast import harness, harness_command  # noqa: F401  the last registers its command
from wise_fast.errors import ConfigError, WiseError
from wise_fast.metrics import Row, readings
from wise_fast.tokens import encode

lm_eval = pytest.importorskip("lm_eval", reason="needs wise_fast[eval]")

HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "facts_choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "facts_free": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: " {{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "facts_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


@pytest.fixture(scope="module")
def editor():
    return make_editor(FACTS)


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """A directory of tasks: about the facts, each beside a question that no edit is about."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": fact.prompt,
            "a": fact.target,
            "choices": [fact.target[::-1], fact.target],
            "gold": 1,
            "text": ELSEWHERE[0] * (i + 1),
        }
        for i, fact in enumerate(FACTS)
    ]
    (directory / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}" + HEAD.format(data=directory / "docs.jsonl") + text)
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks compilers and drivers, slowly
        yield directory


def test_tasks_before_and_after(editor, include):
    with untouched(editor):
        found = harness.evaluate_tasks(editor, list(TASKS), include=include, before_after=True)
    before, after = found["before"], found["after"]
    assert list(found) == ["before", "after"] and before.keys() == after.keys()
    assert after["facts_choice acc"] == after["facts_free exact_match"] == 1.0
    assert before["facts_choice acc"] < 1.0 > before["facts_free exact_match"]
    assert after["facts_texts byte_perplexity"] == pytest.approx(before["facts_texts byte_perplexity"], rel=1e-4)
    texts = [ELSEWHERE[0] * (i + 1) for i in range(len(FACTS))]
    ids = [(256, *encode(editor.tokenizer, text)) for text in texts]  # the harness puts a BOS token in front
    found = [float(reading.logp.sum()) for reading in readings(editor, [Row(row, 1, len(row)) for row in ids])]
    expected = math.exp(-sum(found) / len("".join(texts)))
    assert after["facts_texts byte_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_task_by_its_file_and_fewer_documents(editor, include):
    found = harness.evaluate_tasks(editor, [str(include / "facts_choice.yaml")], limit=1)
    assert found == {"after": {"facts_choice acc": 1.0}}


def test_each_question_is_routed_by_itself_and_without_its_answer(editor):
    """In any order and company; the harness's own model would score the options and the padding with the question."""
    from lm_eval.models.huggingface import HFLM

    from wise_fast.harness_lm import EditedLM

    ours, plain = EditedLM(editor), HFLM(pretrained=editor.model, tokenizer=editor.tokenizer, batch_size=8)
    pairs = [(text, " Ann, or somebody else altogether") for text in (*ELSEWHERE, FACTS[0].prompt)]
    requests = [(pair, *ours._encode_pair(*pair)) for pair in (*pairs, (ELSEWHERE[0], " x"))]
    together = ours._loglikelihood_tokens(requests)
    alone = [ours._loglikelihood_tokens([request])[0] for request in requests]
    assert [same for _, same in together] == [same for _, same in alone]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], rel=1e-4)
    with editor.disabled():
        unedited = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    for place in range(len(ELSEWHERE)):
        assert together[place][0] == pytest.approx(unedited[place][0], rel=1e-4)
    assert together[len(ELSEWHERE)][0] != pytest.approx(unedited[len(ELSEWHERE)][0], rel=1e-2)


@torch.no_grad()
def test_long_requests_are_cut_on_the_left(editor):
    from wise_fast.harness_lm import EditedLM

    model = EditedLM(editor, max_length=6)
    assert model._row(("a", "b"), [1, 2, 3, 4, 5], [6, 7, 8]).ids == (2, 3, 4, 5, 6, 7, 8)  # the last is not read
    assert model._row(("a", "b"), [1, 2, 3, 4, 5], [6, 7, 8]).prompt == 4
    assert model._row(None, [0], [1, 2]).prompt == 2
    assert model._row(None, [0], [1, 2, 3, 4, 5, 6]).ids == (0, 1, 2, 3, 4, 5, 6)  # a whole window


class TestRefused:
    @pytest.mark.parametrize("tasks", [["facts_choice", "facts_absent"], [], ["absent.yaml"]])
    def test_tasks_that_are_not_there(self, include, tasks, monkeypatch):
        from lm_eval.tasks import TaskManager

        made = TaskManager(include_path=str(include), include_defaults=False)
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: made)  # reading thousands of YAML files takes long
        with pytest.raises(ConfigError, match="knows no task"):
            harness.find_tasks(tasks, include)

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="is no directory"):
            harness.find_tasks(["facts_choice"], tmp_path / "absent")

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        with pytest.raises(WiseError, match=r"wise_fast\[eval\]"):
            harness.find_tasks(["facts_choice"])


def test_the_command(editor, include, tmp_path):
    editor.save_pretrained(tmp_path / "pack")
    words = ["harness", "-m", saved_model(tmp_path / "model"), "-p", tmp_path / "pack", "--include", include]
    shown = run(*words, "-t", "facts_choice", "--before-after", "--limit", 2).stdout
    assert all(word in shown for word in ("before", "after", "facts choice acc", "1.000"))
