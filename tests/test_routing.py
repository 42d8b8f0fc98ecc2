"""Routing through the model's own forward and generate: one decision a sequence, taken on its prompt and kept."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.routed import FAMILIES, FIXED, PROMPTS, QUERY, generate, positions, prefill, world
from tests.tiny import D_FF, tiny_model, tiny_tokenizer
from wise_fast import WiseEditor
from wise_fast.errors import WiseError
from wise_fast.routing import Routing, token_mask


@pytest.fixture(params=FAMILIES)
def at(request):
    return world(request.param)


@pytest.fixture
def llama():
    return world("llama")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_never_counts(at, side):
    given = at.tokenizer(list(PROMPTS), **QUERY, padding_side=side)
    at.model(**given, **positions(given["attention_mask"], given["attention_mask"]))
    torch.testing.assert_close(at.editor.routing.scores, at.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(at.editor.routing.choice, at.choices)


@torch.no_grad()
def test_a_cache_of_other_rows_is_refused_and_leaves_routing_usable(llama):
    cache = llama.model(**llama.tokenizer(list(PROMPTS), **QUERY), use_cache=True).past_key_values
    with pytest.raises(WiseError, match="6 sequences, but 2 were given"):
        llama.model(input_ids=torch.tensor([[1], [2]]), past_key_values=cache)
    assert_usable(llama)


def assert_usable(at):
    routing = at.editor.routing
    assert (routing.mask, routing.held) == (None, None)
    at.editor.projection(torch.randn(2, 3, D_FF))  # outside any forward: all tokens are prompt
    for prompt, choice in zip(PROMPTS, at.choices, strict=True):
        assert prefill(at.model, at.editor, prompt)[0].tolist() == [choice]


@pytest.mark.parametrize("before", [True, False], ids=["before the projection", "behind it"])
def test_an_exception_inside_a_forward_is_harmless(llama, before):
    def fail(*_):
        raise ZeroDivisionError

    handle = llama.model.model.layers[0 if before else 3].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        llama.model(**llama.tokenizer(list(PROMPTS), **QUERY))
    with pytest.raises(ZeroDivisionError):
        generate(llama.model, llama.tokenizer, PROMPTS)
    handle.remove()
    assert_usable(llama)
    assert torch.equal(generate(llama.model, llama.tokenizer, PROMPTS), torch.stack(llama.texts))


def test_disabled_is_the_unedited_model(at):
    with at.editor.disabled():
        made = generate(at.model, at.tokenizer, PROMPTS)
        assert at.editor.routing.choice is None
        with pytest.raises(ZeroDivisionError), at.editor.disabled():
            raise ZeroDivisionError
        assert not at.editor.routing.enabled
    assert torch.equal(made, torch.stack(at.plain))
    assert torch.equal(generate(at.model, at.tokenizer, PROMPTS), torch.stack(at.texts))


@pytest.mark.parametrize("empty", [True, False], ids=["empty bank", "disabled"])
@torch.no_grad()
def test_what_the_main_memory_prefilled_it_decodes(llama, empty):
    """A decision left over from another forward must not reach a cache whose prefill took none."""
    loud = PROMPTS[int((llama.choices == 0).nonzero()[0, 0])]
    prefill(llama.model, llama.editor, loud)
    given = llama.tokenizer(loud, return_tensors="pt")
    if empty:
        llama.editor.projection.set_bank(None)
        cache = llama.model(**given, use_cache=True).past_key_values
        llama.editor.projection.set_bank(llama.bank)
    else:
        with llama.editor.disabled():
            cache = llama.model(**given, use_cache=True).past_key_values
    assert cache.routing_choice.tolist() == [-1]
    llama.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert llama.editor.routing.choice.tolist() == [-1]


@torch.no_grad()
def test_a_held_decision_outlives_a_disabled_step(llama):
    loud = PROMPTS[int((llama.choices == 1).nonzero()[0, 0])]
    cache = llama.model(**llama.tokenizer(loud, return_tensors="pt"), use_cache=True).past_key_values
    with llama.editor.disabled():
        llama.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert llama.editor.routing.choice is None
    assert cache.routing_choice.tolist() == [1]
    cache.reset()
    assert cache.routing_choice is None


@torch.no_grad()
def test_no_mask_embeddings_and_single_tokens(at):
    embed = at.model.get_input_embeddings()
    for prompt, choice in zip(PROMPTS, at.choices, strict=True):
        ids = at.tokenizer(prompt, return_tensors="pt")["input_ids"]
        at.model(ids)
        assert at.editor.routing.choice.tolist() == [choice]
        if at.family != "gemma3":  # it scales what it embeds itself
            at.model(inputs_embeds=embed(ids))
            assert at.editor.routing.choice.tolist() == [choice]
    given = torch.tensor([[9]])
    made = at.model.generate(given, **FIXED)
    at.model(given)
    choice = at.editor.routing.choice
    assert torch.equal(at.model.generate(given, use_cache=False, **FIXED), made)
    assert torch.equal(at.editor.routing.choice, choice)


@torch.no_grad()
def test_a_prompt_mask_limits_what_is_scored(llama):
    """Prompt and target in one right-padded forward score as the prompt alone."""
    given = llama.tokenizer([p + " and more" for p in PROMPTS], **QUERY, padding_side="right")
    lengths = torch.tensor([len(llama.tokenizer(p)["input_ids"]) for p in PROMPTS])
    prompt = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # shorter than the batch
    with llama.editor.routing.prompt(prompt):
        llama.model(**given)
    assert torch.equal(llama.editor.routing.choice, llama.choices)
    torch.testing.assert_close(llama.editor.routing.scores, llama.scores, rtol=1e-4, atol=1e-4)


def test_the_whole_model_compiles():
    llama = world("llama", num_hidden_layers=2)
    ids = llama.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    torch._dynamo.reset()
    for cached in (False, True):
        compiled = torch.compile(
            lambda i, c=cached: llama.model(i, use_cache=c).logits, backend="aot_eager", fullgraph=True
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), llama.model(ids, use_cache=cached).logits)
        assert llama.editor.routing.choice.tolist() == llama.choices[:1].tolist()


def test_unload_detaches():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    projection = model.model.layers[2].mlp.down_proj
    editor = WiseEditor(model, tokenizer)
    assert editor.unload() is model
    assert model.model.layers[2].mlp.down_proj is projection and "generate" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert type(cache) is DynamicCache


def causal(real, offset=0, keys=None, fill=None):
    """4D mask of [B, T] real tokens behind `offset` cached ones."""
    batch, length = real.shape
    keys = offset + length if keys is None else keys
    seen = torch.cat([torch.ones(batch, offset, dtype=torch.bool), real], 1)
    seen = torch.nn.functional.pad(seen, (0, keys - seen.shape[1]))
    allowed = torch.arange(keys)[None] <= offset + torch.arange(length)[:, None]
    mask = (allowed & seen[:, None])[:, None]
    return mask if fill is None else torch.zeros(mask.shape).masked_fill(~mask, fill)


REAL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    "mask",
    [
        REAL.long(),
        torch.cat([torch.zeros(3, 2), REAL], 1),
        causal(REAL),
        causal(REAL, keys=9),
        causal(REAL, fill=torch.finfo(torch.float32).min),
        {"full_attention": causal(REAL), "sliding_attention": None},
        {"sliding_attention": causal(REAL)},
    ],
)
def test_token_mask_reads_every_form(mask):
    assert torch.equal(token_mask(mask, 3, 4, None, "cpu"), REAL)


@pytest.mark.parametrize("mask", [None, {"full_attention": None}, causal(torch.ones(1, 4, dtype=torch.bool))])
def test_token_mask_without_padding(mask):
    assert token_mask(mask, 3, 4, None, "cpu").all()


def test_token_mask_behind_a_full_sliding_window():
    """Key 0 of a sliding cache's mask is not token 0."""
    config = copy.deepcopy(world("mistral").model.config)
    cache = StaticCache(config, 64)
    assert cache.is_sliding[0] and config.sliding_window == 4
    layer = cache.layers[0]
    states = torch.zeros(3, 2, 10, 8)
    cache.update(states, states, 0)
    keys, offset = layer.get_mask_sizes(4)
    assert offset == 7
    mask = causal(REAL, offset=10 - offset, keys=keys)
    assert torch.equal(token_mask(mask, 3, 4, cache, "cpu"), REAL)


def test_a_fresh_routing_holds_nothing():
    routing = Routing()
    assert routing.enabled and (routing.mask, routing.held, routing.choice, routing.scores) == (None,) * 4
