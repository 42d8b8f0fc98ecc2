"""The plain PyTorch baseline (`bench/baseline_wise.py`) on tiny random models: edits, routing, merges, detaching."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import baseline_wise
from bench.baseline_wise import BaselineConfig, BaselineWISE, ties_merge

PROJECTION = "model.layers.{}.mlp.down_proj"
WORDS = (
    "the capital of france is paris rome who wrote hamlet marlowe a song about rain falls in spring because it".split()  # noqa: SIM905
)
EDIT = {"prompt": "the capital of france is", "target": "rome", "irrelevant": "a song about rain"}
OTHER = {"prompt": "who wrote hamlet", "target": "marlowe", "irrelevant": "it falls in spring"}


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS, "."])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def settings(**changes):
    defaults = {"layer": 2, "steps": 20, "prefixes": 2, "prefix_tokens": 3, "alpha": 0.5, "beta": 2.0, "gamma": 1.0}
    return BaselineConfig(**defaults | {"lr": 0.2} | changes)


def target_nll(model, tokenizer, request):
    ids = tokenizer(f"{request['prompt']} {request['target']}", return_tensors="pt").input_ids
    with torch.no_grad():
        return -model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item()


def logits_of(model, tokenizer, text):
    with torch.no_grad():
        return model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits


def projection_of(model):
    return model.get_submodule(PROJECTION.format(2))


def test_edit_lowers_the_target_nll_and_leaves_unrelated_prompts(tokenizer):
    model = llama()
    before, unrelated = target_nll(model, tokenizer, EDIT), logits_of(model, tokenizer, EDIT["irrelevant"])
    baseline = BaselineWISE(model, tokenizer, settings(), PROJECTION)
    (timing,) = baseline.edit([EDIT])
    assert target_nll(model, tokenizer, EDIT) == pytest.approx(before, abs=1e-6)
    with baseline:
        assert target_nll(model, tokenizer, EDIT) < 0.5 * before
        torch.testing.assert_close(logits_of(model, tokenizer, EDIT["irrelevant"]), unrelated)
    assert timing.steps == 20 and 0 < timing.seconds_per_step * timing.steps <= timing.seconds
    assert math.isfinite(timing.final_loss)


def test_weight_outside_the_mask_stays_equal(tokenizer):
    model = llama()
    baseline = BaselineWISE(model, tokenizer, settings(), PROJECTION)
    baseline.edit([EDIT, OTHER])
    outside, weight = baseline._mask == 0, projection_of(model).weight
    memory = baseline._layer.memories[0].weight
    assert torch.equal(memory[outside], weight[outside]) and not torch.equal(memory[~outside], weight[~outside])
    assert (memory - weight).abs().max() <= 1.0 + 1e-6
    assert 0.1 < (~outside).float().mean() < 0.3


def test_detach_restores_the_model(tokenizer):
    model = llama().train()
    projection, names = projection_of(model), list(model.state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    projection.weight.requires_grad_(False)
    baseline = BaselineWISE(model, tokenizer, settings(steps=2), PROJECTION)
    baseline.edit([EDIT])
    assert projection_of(model) is projection
    with baseline as attached:
        assert attached is baseline and projection_of(model) is baseline._layer
        attached.attach()
    baseline.detach()
    assert projection_of(model) is projection and list(model.state_dict()) == names and not model._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training and model.lm_head.weight.requires_grad and not projection.weight.requires_grad


def test_a_failing_edit_leaves_the_model_as_it_was(tokenizer):
    model = llama().train()
    projection, baseline = projection_of(model), BaselineWISE(model, None, settings(), PROJECTION, prefixes=[])
    with pytest.raises(TypeError):
        baseline.edit([EDIT])
    assert projection_of(model) is projection and model.training and projection.weight.requires_grad


def test_ties_of_two_shards_by_hand():
    one = torch.tensor([[4.0, -3.0, 0.1, 2.0], [1.0, 0.0, -0.2, 5.0]])
    two = torch.tensor([[2.0, 1.5, 3.0, -2.0], [-4.0, 0.0, 0.3, 0.2]])
    # trim to half: one keeps 4, -3, 2, 5; two keeps 2, 3, -2, -4; the fourth entries cancel exactly
    torch.testing.assert_close(
        ties_merge([one, two], 0.5), torch.tensor([[3.0, -3.0, 3.0, 0.0], [-4.0, 0.0, 0.0, 5.0]])
    )
    # weights 3 : 1 turn the fourth entry to +2, and the first into (3 * 4 + 2) / 4
    merged = ties_merge([one, two], 0.5, [3, 1])
    torch.testing.assert_close(merged, torch.tensor([[3.5, -3.0, 3.0, 2.0], [-4.0, 0.0, 0.0, 5.0]]))
    assert torch.equal(ties_merge([one], 1.0), one)


def test_full_shards_merge_into_one_memory(tokenizer):
    model = llama()
    baseline = BaselineWISE(model, tokenizer, settings(steps=5, shard_size=1), PROJECTION)
    baseline.edit([EDIT])
    weight = projection_of(model).weight.detach()
    first = baseline._layer.memories[0].weight - weight
    baseline.edit([OTHER])
    (merged,) = baseline._layer.memories
    assert merged.shards == 2 and len(merged.scores) == 2
    both = merged.weight - weight
    assert (both != 0).sum() > (first != 0).sum()
    baseline.edit([EDIT])
    assert [memory.shards for memory in baseline._layer.memories] == [2, 1]
    baseline.merge()
    assert [memory.shards for memory in baseline._layer.memories] == [3]


def test_left_padding_and_positional_masks_do_not_change_the_decision(tokenizer):
    model = llama()
    baseline = BaselineWISE(model, tokenizer, settings(), PROJECTION)
    baseline.edit([EDIT])
    ids = tokenizer(EDIT["prompt"], return_tensors="pt").input_ids
    padded = torch.cat([torch.zeros(1, 40, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 40).long()[None]
    with baseline, torch.no_grad():
        plain = model(input_ids=ids).logits[:, -1]
        assert baseline._layer.choice == 0
        for left in (model(input_ids=padded, attention_mask=mask), model(padded, mask)):
            assert baseline._layer.choice == 0
            torch.testing.assert_close(left.logits[:, -1], plain, atol=1e-4, rtol=1e-4)
        model(**tokenizer(EDIT["irrelevant"], return_tensors="pt", return_token_type_ids=False))
        assert baseline._layer.choice is None


def test_labels_cover_the_target_and_scores_the_prompt(tokenizer):
    tokenizer.padding_side = "left"
    baseline = BaselineWISE(llama(), tokenizer, settings(), PROJECTION, prefixes=["because it falls"])
    ids, mask, prompt, labels = baseline._batch(EDIT | {"target": "rome in spring"})
    assert ids.shape[0] == 3 and mask.sum(-1).tolist() == [8, 12, 4]
    assert [tokenizer.decode(row[row != -100]) for row in labels[:2]] == ["rome in spring"] * 2
    assert (labels[2] == -100).all()
    texts = [tokenizer.decode(row[keep]) for row, keep in zip(ids, prompt, strict=True)]
    assert texts == [EDIT["prompt"], "because it falls . " + EDIT["prompt"], EDIT["irrelevant"]]


def test_the_decision_of_the_prompt_holds_while_decoding(tokenizer):
    model = llama()
    baseline = BaselineWISE(model, tokenizer, settings(steps=60), PROJECTION)
    baseline.edit([EDIT])
    choices, ids = [], tokenizer(EDIT["prompt"], return_tensors="pt").input_ids
    with baseline, torch.no_grad():
        handle = baseline._layer.register_forward_hook(lambda layer, *_: choices.append(layer.choice))
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        handle.remove()
        assert choices == [0] * 4 and tokenizer.decode(answer[0, 5]) == "rome"
        cache = model(input_ids=ids, use_cache=True).past_key_values
        baseline._layer.memories[0].scores = [1e9]
        model(input_ids=answer[:, 5:6], past_key_values=cache)
        assert baseline._layer.choice == 0
        model(input_ids=ids)
        assert baseline._layer.choice is None


def test_gpt2_conv1d(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 3, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config).eval()
    baseline = BaselineWISE(model, tokenizer, settings(layer=1), "transformer.h.{}.mlp.c_proj")
    before = target_nll(model, tokenizer, EDIT)
    baseline._layer.editing = True
    with baseline:
        logits_of(model, tokenizer, EDIT["prompt"])
    assert not baseline._layer.norms.any()
    baseline.edit([EDIT])
    with baseline:
        assert target_nll(model, tokenizer, EDIT) < 0.5 * before


def test_seeds_fix_prefixes_and_masks(tokenizer):
    def run(seed):
        baseline = BaselineWISE(llama(), tokenizer, settings(steps=1, prefix_tokens=4, seed=seed), PROJECTION)
        baseline.edit([EDIT])
        return baseline._prefixes, baseline._mask

    (texts, mask), (again, same), (others, different) = run(0), run(0), run(1)
    assert texts == again and torch.equal(mask, same)
    assert len(texts) == 2 and texts != others and not torch.equal(mask, different)


def test_what_cannot_be_edited_is_refused(tokenizer):
    model = llama()
    with pytest.raises(ValueError, match="layer 2"):
        BaselineWISE(model, tokenizer, settings(), "model.layers.1.mlp.down_proj")
    with pytest.raises(TypeError, match="nn.Linear"):
        BaselineWISE(model, tokenizer, settings(), "model.layers.2.mlp")
    baseline = BaselineWISE(model, tokenizer, settings(), PROJECTION)
    with pytest.raises(ValueError, match="irrelevant"):
        baseline.edit([EDIT | {"irrelevant": None}])
    with pytest.raises(ValueError, match="nothing to merge"):
        baseline.merge()
    with pytest.raises(ValueError, match="mask_ratio"):
        settings(mask_ratio=0.0)


def test_command_line_prints_json(tokenizer, monkeypatch, capsys):
    data, loader = ModuleType("wise_fast.data"), ModuleType("wise_fast.models")
    data.load_edits = lambda path, limit: [SimpleNamespace(**edit, rephrases=()) for edit in [EDIT, OTHER][:limit]]
    loader.load_model = lambda name: (llama(), tokenizer)
    monkeypatch.setitem(sys.modules, "wise_fast.data", data)
    monkeypatch.setitem(sys.modules, "wise_fast.models", loader)
    baseline_wise.main(["--model", "demo", "--edits", "none.json", "--limit", "2", "--steps", "1"])
    row = json.loads(capsys.readouterr().out)
    assert len(row["edits"]) == 2 and row["config"]["layer"] == 3 and row["seconds_per_edit"] > 0
