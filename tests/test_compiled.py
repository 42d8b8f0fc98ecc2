"""The edited model under `torch.compile`: one graph, the same answers, no recompile when edits are added in place."""

import functools
import threading
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from tests.edited import FACTS, make_editor, wide_model
from tests.routed import FIXED, PROMPTS, generate, world
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor
from wise_fast.compiled import eagerly
from wise_fast.errors import WiseError

BACKEND = dict(backend="aot_eager", fullgraph=True)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def llama():
    return world("llama", num_hidden_layers=2)


def test_threads_that_run_eagerly_leave_the_stance_as_it_was():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with eagerly():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with eagerly():
        thread.start()
        assert entered.wait(10)
    leave.set()
    thread.join()
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1  # compiled, not run eagerly


def no_recompile():
    return torch.compiler.set_stance("fail_on_recompile")


def given(text):
    return tiny_tokenizer()(text, return_tensors="pt")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_nothing_of_ours_breaks_the_graph(family):
    at = world(family, **({} if family == "gpt2" else {"num_hidden_layers": 2}))
    ids = given(PROMPTS[0])["input_ids"]
    for use in (dict(use_cache=False), dict(past_key_values=DynamicCache(config=at.model.config))):
        assert torch._dynamo.explain(at.model)(ids, **use).graph_break_count == 0
    cache = at.model(ids, use_cache=True).past_key_values
    assert torch._dynamo.explain(at.model)(ids[:, :1], past_key_values=cache).graph_break_count == 0


@torch.no_grad()
def test_edits_added_in_place_do_not_recompile():
    """From no edit over a second memory to a rollback, at one shape of input: one graph."""
    editor = make_editor(shard_size=1, batch_size=1)
    editor.reserve(memories=2)
    compiled = torch.compile(editor.model, **BACKEND)
    facts = FACTS[0], Edit("Capital of Zed", "Bo")
    texts = [facts[1].prompt, facts[0].prompt, "Where is cold?", "~" * 14]
    ids = torch.cat([given(text)["input_ids"] for text in texts])
    masks = dict(attention_mask=torch.ones_like(ids), use_cache=False)
    expected = editor.model(ids, **masks).logits
    torch.testing.assert_close(compiled(ids, **masks).logits, expected)
    heard = []
    with no_recompile():
        for change in (lambda: editor.edit(facts[0]), lambda: editor.edit(facts[1]), editor.rollback):
            change()
            got = compiled(ids, **masks).logits
            torch.testing.assert_close(got, editor.model(ids, **masks).logits)
            heard.append(editor.routing.choice.tolist())
        editor.rollback()
        torch.testing.assert_close(compiled(ids, **masks).logits, expected)
    assert editor.projection.memories == 0 and len({tuple(choice) for choice in heard}) > 1


def test_more_memories_than_reserved_recompile_once():
    editor = make_editor(FACTS[:1], shard_size=1, batch_size=1)
    editor.reserve(memories=1)
    ids, counter = given(FACTS[0].prompt)["input_ids"], torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(editor.model, backend=counter, fullgraph=True, dynamic=False)
    graphs = []
    for fact in FACTS[1:]:
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, editor.model(ids, use_cache=False).logits)
        graphs.append(counter.frame_count)
        editor.edit(fact)
    assert editor.projection.thresholds.shape == (4,) and graphs == [1, 2, 3]
    editor.rollback()
    with torch.no_grad(), no_recompile():
        compiled(ids, use_cache=False)


@pytest.mark.parametrize("compiled_by", ["generate", "forward", "module"])
def test_generation_with_a_static_cache(llama, compiled_by, monkeypatch):
    """Prefill and decoding, prompts of every length: the eager answers."""
    settings = dict(cache_implementation="static", max_new_tokens=FIXED["max_new_tokens"])
    if compiled_by == "generate":
        config = CompileConfig(mode=None, **BACKEND)
        config._compile_all_devices = True
        settings["compile_config"] = config
    elif compiled_by == "forward":
        monkeypatch.setattr(llama.model, "forward", torch.compile(llama.model.forward, **BACKEND))
    else:
        llama.model.compile(**BACKEND)
    try:
        # The longest first: the static cache is then made once.
        order = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
        cache = StaticCache(config=llama.model.config, max_cache_len=64)
        settings |= {} if compiled_by == "generate" else {"past_key_values": cache, "cache_implementation": None}
        for place in order:
            cache.reset()
            made = generate(llama.model, llama.tokenizer, [PROMPTS[place]], **settings)
            assert torch.equal(made[0], llama.texts[place])
    finally:
        llama.model._compiled_call_impl = None


@torch.no_grad()
def test_decoding_is_one_graph_whatever_was_decided(llama):
    """Prompts of other lengths, in scope and not, decode through the graph that the first was compiled to."""
    compiled = torch.compile(llama.model, **BACKEND)
    cache, choices = StaticCache(config=llama.model.config, max_cache_len=64), []
    for prompt in PROMPTS:
        cache.reset()
        with llama.editor.routing.generation():
            llama.model(**given(prompt), past_key_values=cache)  # as generate prefills
            position = torch.tensor([[given(prompt)["input_ids"].shape[1]]])
            with no_recompile() if choices else nullcontext():
                compiled(torch.tensor([[7]]), position_ids=position, past_key_values=cache)
        choices.append(int(llama.editor.routing.choice))
    assert choices == llama.choices.tolist()


def test_an_editor_of_a_compiled_model():
    """`WiseEditor(torch.compile(model))` edits the model inside, eagerly, and the compiled one serves it."""
    model = wide_model()
    compiled = torch.compile(model, **BACKEND)
    ids = given(FACTS[0].prompt)["input_ids"]
    with torch.no_grad():
        plain = compiled(ids, use_cache=False).logits
    editor = WiseEditor(compiled, tiny_tokenizer(), make_editor().config)
    assert editor.model is model
    with no_recompile():  # what editing runs is not compiled
        assert editor.edit(FACTS[0])[0].success
    with torch.no_grad():
        edited = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(edited, model(ids, use_cache=False).logits)
        assert not torch.allclose(edited, plain, atol=1e-2) and editor.routing.choice.tolist() == [0]
        made = compiled.generate(ids, do_sample=False, max_new_tokens=6)
        assert torch.equal(made, model.generate(ids, do_sample=False, max_new_tokens=6))
        editor.unload()
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, plain)
    again = WiseEditor(compiled, tiny_tokenizer(), editor.config)
    again.state = editor.state
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, edited)
    assert again.routing.choice.tolist() == [0] and editor.routing.choice is not again.routing.choice


@pytest.mark.parametrize("where", ["model", "layers", "forward"])
def test_editing_a_model_that_compiles_itself(where, monkeypatch):
    model = wide_model()
    ids = given(FACTS[0].prompt)["input_ids"]
    if where == "model":
        model.compile(**BACKEND)
    elif where == "layers":
        for layer in model.model.layers:
            layer.compile(**BACKEND)
    else:
        model.forward = torch.compile(model.forward, **BACKEND)
    with torch.no_grad():
        model(ids, use_cache=False)
    editor = WiseEditor(model, tiny_tokenizer(), make_editor().config)
    with no_recompile():
        editor.edit(FACTS[:2])
    expected = make_editor(FACTS[:2])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected.model(ids, use_cache=False).logits)
    assert editor.routing.choice.tolist() == [0]


def test_frozen_weights_are_refused():
    """Inductor's freezing copies the bank into its graphs: edits would not be heard."""
    import torch._inductor.config as inductor

    editor = make_editor()
    with inductor.patch(freezing=True):
        for act in (lambda: editor.edit(FACTS[0]), functools.partial(WiseEditor, wide_model(), tiny_tokenizer())):
            with pytest.raises(WiseError, match="freezing is set"):
                act()
    assert editor.edits == [] and editor.edit(FACTS[0])[0].success
