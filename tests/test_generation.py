"""Edited models under `generate` and by hand: every row of a batch answers as it does alone."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.routed import FAMILIES, FIXED, NEW, PROMPTS, QUERY, generate, positions, world
from tests.test_ffn import make_bank
from tests.tiny import D_FF, HIDDEN


@pytest.fixture(params=FAMILIES)
def at(request):
    return world(request.param)


@pytest.fixture
def llama():
    return world("llama")


@pytest.mark.parametrize(
    "settings",
    [{}, dict(use_cache=False), dict(cache_implementation="static"), dict(cache_implementation="dynamic")],
    ids=["default", "uncached", "static", "dynamic"],
)
def test_a_mixed_batch_generates_what_each_row_generates_alone(at, settings):
    made = generate(at.model, at.tokenizer, PROMPTS, **settings)
    assert torch.equal(made, torch.stack(at.texts))
    assert torch.equal(at.editor.routing.choice, at.choices)
    assert (at.editor.routing.mask, at.editor.routing.held) == (None, None)


@pytest.mark.parametrize("returned", [1, 2])
def test_beam_search(at, returned):
    settings = dict(num_beams=3, num_return_sequences=returned)
    made = generate(at.model, at.tokenizer, PROMPTS, **settings)
    assert torch.equal(at.editor.routing.choice, at.choices.repeat_interleave(3))
    for i, prompt in enumerate(PROMPTS):
        alone = generate(at.model, at.tokenizer, [prompt], **settings)
        assert torch.equal(made[i * returned : (i + 1) * returned], alone)


def test_sampling_several_sequences(llama):
    torch.manual_seed(0)
    generate(llama.model, llama.tokenizer, PROMPTS, do_sample=True, num_return_sequences=3)
    assert torch.equal(llama.editor.routing.choice, llama.choices.repeat_interleave(3))


def test_drafted_tokens_keep_the_decision(llama):
    for prompt, choice, text in zip(PROMPTS, llama.choices, llama.texts, strict=True):
        made = generate(llama.model, llama.tokenizer, [prompt], prompt_lookup_num_tokens=2)
        assert torch.equal(made[0], text) and llama.editor.routing.choice.tolist() == [choice]


@pytest.mark.parametrize("kind", ["dynamic", "made by the model", "tuple", "static"])
@torch.no_grad()
def test_decoding_by_hand(at, kind):
    """Prefill, then one token at a time; what is decoded would route otherwise if it were asked."""
    given = at.tokenizer(list(PROMPTS), **QUERY)
    mask, out = given["attention_mask"], []
    cache = {"dynamic": DynamicCache, "static": lambda: StaticCache(at.model.config, 64)}.get(kind, lambda: None)()
    settings = dict(return_dict=kind != "tuple", use_cache=True)
    result = at.model(**given, past_key_values=cache, **positions(mask, mask), **settings)
    for _ in range(NEW):
        logits, cache = (result.logits, result.past_key_values) if kind != "tuple" else result[:2]
        logits[..., 257] = -torch.inf  # EOS, as in FIXED
        out.append(logits[:, -1].argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = dict(input_ids=out[-1][:, None], attention_mask=mask, **positions(mask, mask[:, -1:]))
        result = at.model(**step, past_key_values=cache, **settings)
        assert torch.equal(at.editor.routing.choice, at.choices)
    assert torch.equal(torch.stack(out, 1), torch.stack(at.texts))


def test_a_cache_that_is_handed_in(at):
    cache = DynamicCache(config=at.model.config)
    assert torch.equal(generate(at.model, at.tokenizer, PROMPTS, past_key_values=cache), torch.stack(at.texts))
    assert torch.equal(cache.routing_choice, at.choices)


def test_a_second_generate_on_the_same_cache_routes_anew(llama):
    quiet, loud = (PROMPTS[int((llama.choices == j).nonzero()[0, 0])] for j in (-1, 0))
    cache = DynamicCache(config=llama.model.config)
    ids = llama.tokenizer(quiet, return_tensors="pt")["input_ids"]
    first = llama.model.generate(ids, past_key_values=cache, **FIXED)
    assert cache.routing_choice.tolist() == [-1]
    bank = make_bank("neuron", (0.0, torch.inf), shape=(HIDDEN, D_FF))
    llama.editor.projection.set_bank(bank)
    try:
        more = llama.tokenizer(loud, return_tensors="pt", add_special_tokens=False)["input_ids"]
        llama.model.generate(torch.cat([first, more], 1), past_key_values=cache, **FIXED)
        assert cache.routing_choice.tolist() == [0]
        assert llama.editor.routing.choice.tolist() == [0]
    finally:
        llama.editor.projection.set_bank(llama.bank)


@torch.no_grad()
def test_the_decision_moves_with_the_caches_rows(llama):
    cache = llama.model(**llama.tokenizer(list(PROMPTS), **QUERY), use_cache=True).past_key_values
    expected, order = llama.choices, torch.tensor([3, 3, 0, 5, 1, 2])
    cache.reorder_cache(order)
    expected = expected[order]
    assert torch.equal(cache.routing_choice, expected)
    cache.batch_repeat_interleave(2)
    expected = expected.repeat_interleave(2)
    assert torch.equal(cache.routing_choice, expected)
    some = torch.tensor([11, 0, 7])
    cache.batch_select_indices(some)
    assert torch.equal(cache.routing_choice, expected[some])
    twin = copy.deepcopy(cache)
    assert type(twin) is type(cache) and twin.routing_choice is not cache.routing_choice
    twin.reorder_cache(torch.tensor([2, 1, 0]))
    assert torch.equal(twin.routing_choice, expected[some].flip(0))
    assert torch.equal(cache.routing_choice, expected[some])
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is type(cache) and torch.equal(loaded.routing_choice, cache.routing_choice)
    assert isinstance(loaded, DynamicCache) and loaded.get_seq_length() == cache.get_seq_length()


def test_generate_from_embeddings(llama):
    given = llama.tokenizer(list(PROMPTS), **QUERY)
    embeds = llama.model.get_input_embeddings()(given["input_ids"])
    for cached in (True, False):
        made = llama.model.generate(
            inputs_embeds=embeds, attention_mask=given["attention_mask"], use_cache=cached, **FIXED
        )
        assert torch.equal(made, torch.stack(llama.texts))


def test_two_editors_on_two_models_do_not_meet():
    one, other = world("llama"), world("gpt2")
    generate(one.model, one.tokenizer, PROMPTS)
    kept = one.editor.routing.choice
    with other.editor.disabled():
        made = generate(one.model, one.tokenizer, PROMPTS)
        generate(other.model, other.tokenizer, PROMPTS[:2])
    assert torch.equal(made, torch.stack(one.texts)) and torch.equal(one.editor.routing.choice, kept)


def test_a_deepcopy_of_an_edited_model_is_independent(llama):
    twin = copy.deepcopy(llama.model)
    module = twin.model.layers[2].mlp.down_proj
    assert module.routing is not llama.editor.routing
    assert torch.equal(generate(twin, llama.tokenizer, PROMPTS), torch.stack(llama.texts))
    assert torch.equal(module.routing.choice, llama.choices)
    module.set_bank(None)
    with llama.editor.disabled():
        assert module.routing.enabled
    assert torch.equal(generate(twin, llama.tokenizer, PROMPTS), torch.stack(llama.plain))
    assert torch.equal(generate(llama.model, llama.tokenizer, PROMPTS), torch.stack(llama.texts))
