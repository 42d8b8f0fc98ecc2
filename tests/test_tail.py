"""Tail replay against the whole model: logits, loss and the gradient at the projection, for every family."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.replays import LENGTHS, TOLERANCE, compare, make_tail, replayed, right_padded, targets, whole
from tests.test_architectures import assert_unchanged, snapshot
from tests.tiny import FAMILIES, HIDDEN, tiny_model, tiny_tokenizer
from wise_fast import WiseConfig, WiseEditor
from wise_fast.architectures import find_architecture, linear_weight
from wise_fast.tail import Tail

ATTENTION = [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if a == "eager" or f not in ("gemma2", "gptj")]


@pytest.mark.parametrize("family, attention", ATTENTION)
def test_replay_is_the_whole_model(family, attention):
    tail = make_tail(family, attn_implementation=attention)
    assert tail.model.config._attn_implementation == attention
    before = snapshot(tail.model)
    capture = tail.capture(*right_padded(LENGTHS))
    compare(tail, capture)
    for rows in ([2], [3, 0], [1, 1, 2]):
        compare(tail, capture.rows(torch.tensor(rows)))
        compare(tail, capture.rows(torch.tensor(rows), max(LENGTHS[row] for row in rows)))
    compare(tail, capture)  # replay leaves the tape as it was
    for parameter in tail.model.parameters():
        parameter.grad = None
    assert_unchanged(tail.model, before)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt_projected", "gemma3"])
@pytest.mark.parametrize("layer", [0, -1])
def test_first_and_last_layer(family, layer):
    tail = make_tail(family, layer)
    capture = tail.capture(*right_padded(LENGTHS))
    compare(tail, capture.rows(torch.tensor([2, 0])))


@pytest.mark.parametrize(
    "lengths, rows",
    [
        ((4, 2, 4, 3), [3]),  # B == T
        ((4, 2, 4, 3), [2, 1, 0]),
        ((6,), [0]),  # one row
        ((6,), [0, 0]),
        ((1,), [0]),  # one token
        ((1, 1, 1), [2, 0]),
        ((2, 1), [1, 0]),
        ((1, 6), [0]),  # padding that no kept row needs
        ((3, 5, 4, 2, 5, 1) + (2,) * 26, [31, 4]),  # B == hidden size
        ((2, 8), [1]),  # B * T == number of heads times head dim / 2, B == kv heads
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "gptj"])
def test_rows_of_batches_whose_sizes_coincide(family, lengths, rows):
    tail = make_tail(family)
    compare(tail, tail.capture(*right_padded(lengths)).rows(torch.tensor(rows)))


class Positions(nn.Module):
    """Position embeddings as [T, hidden], shared by all sequences."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, ids):
        return self.base(ids)[0]


@pytest.mark.parametrize("lengths", [(4, 2, 4, 3), (2, 1), (1,)])
def test_what_sequences_share_is_not_indexed_by_sequence(lengths):
    model = tiny_model("gpt2")
    model.transformer.wpe = Positions(model.transformer.wpe)
    tail = Tail(model, find_architecture(model))
    tail._read_axes = lambda *captures: captures[0].axes  # nothing reads positions again: keep them all the same
    capture = tail.capture(*right_padded(lengths))
    rows = capture.rows(torch.arange(len(lengths)).flip(0))
    assert torch.equal(rows.tape["transformer.wpe"][0], capture.tape["transformer.wpe"][0])
    compare(tail, rows)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 7), min_size=1, max_size=7), st.data())
def test_rows_are_what_capturing_them_gives(lengths, data):
    tail = make_tail("gpt_neox")
    ids, mask = right_padded(lengths)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5)))
    some, alone = tail.capture(ids, mask).rows(rows), tail.capture(ids[rows], mask[rows])
    assert some.shape == alone.shape and some.tape.keys() == alone.tape.keys()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(getattr(some, name), getattr(alone, name))
    real = mask[rows].flatten().bool()
    for name in ("a", "main"):
        torch.testing.assert_close(getattr(some, name)[real], getattr(alone, name)[real], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampled_weight_gradient(family):
    """dY^T a, sampled at the mask, is the masked dense gradient (DESIGN section 3)."""
    tail = make_tail(family)
    ids, mask = right_padded(LENGTHS)
    capture = tail.capture(ids, mask)
    gradient = replayed(tail, capture, torch.zeros_like(capture.main))[2]
    whole(tail, ids, mask, torch.zeros_like(capture.main))
    tail.model.zero_grad()
    positions, labels = targets(mask)
    logits = tail.model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[positions]
    nn.functional.cross_entropy(logits, labels).backward()
    module = tail.model.get_submodule(tail.architecture.projection)
    dense = module.weight.grad.t() if family == "gpt2" else module.weight.grad
    chosen = torch.rand(dense.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    torch.testing.assert_close((gradient.t() @ capture.a)[chosen], dense[chosen], **TOLERANCE)
    columns = torch.arange(0, dense.shape[1], 5)
    torch.testing.assert_close(capture.a[:, columns].t() @ gradient, dense[:, columns].t(), **TOLERANCE)


def test_capture_holds_the_projections_input_and_output():
    tail = make_tail("gpt2")
    capture = tail.capture(*right_padded(LENGTHS))
    module = tail.model.get_submodule(tail.architecture.projection)
    assert capture.main.shape == (4 * 7, HIDDEN) and not capture.main.requires_grad
    expected = nn.functional.linear(capture.a, linear_weight(module), module.bias)
    torch.testing.assert_close(capture.main, expected, **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_bf16(family):
    tail = make_tail(family)
    tail.model.bfloat16()
    capture = tail.capture(*right_padded(LENGTHS))
    compare(tail, capture, dict(rtol=0.02, atol=0.02), torch.bfloat16)
    compare(tail, capture.rows(torch.tensor([2, 0])), dict(rtol=0.02, atol=0.02), torch.bfloat16)


def test_training_mode_comes_back_and_dropout_stays_off():
    tail = make_tail("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids, mask = right_padded(LENGTHS)
    capture = tail.capture(ids, mask)
    shift = torch.zeros_like(capture.main)
    expected = replayed(tail, capture, shift)
    tail.model.train()
    again = tail.capture(ids, mask)
    assert torch.equal(again.a, capture.a)
    for got, want in zip(replayed(tail, again, shift), expected, strict=True):
        assert torch.equal(got, want)
    assert all(m.training for m in tail.model.modules())


def test_eval_mode_is_entered_once():
    tail = make_tail("gpt2", resid_pdrop=0.5)
    tail.model.train()
    ids, mask = right_padded(LENGTHS)
    with pytest.raises(KeyError), tail.evaluating():
        capture = tail.capture(ids, mask)
        first, again = (tail.replay(capture, capture.main, targets(mask)[0]) for _ in range(2))
        assert torch.equal(first, again) and not any(m.training for m in tail.model.modules())
        raise KeyError
    assert all(m.training for m in tail.model.modules())
    tail.capture(ids, mask)
    assert all(m.training for m in tail.model.modules())


def test_only_wanted_logits():
    tail = make_tail("opt")
    capture = tail.capture(*right_padded(LENGTHS))
    positions, vocabulary = targets(capture.attention_mask)[0], torch.tensor([7, 3, 250])
    every = tail.replay(capture, capture.main, positions)
    some = tail.replay(capture, capture.main, positions, tail.head_of(vocabulary))
    torch.testing.assert_close(some, every[:, vocabulary])


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_replayed_together(family):
    tail, parts = make_tail(family), []
    for seed, lengths in enumerate((LENGTHS, (3,), (1, 2))):
        capture = tail.capture(*right_padded(lengths, seed))
        parts.append((capture, capture.main.clone().requires_grad_(), targets(capture.attention_mask)[0]))
    inputs, apart = [y for _, y, _ in parts], torch.cat([tail.replay(*part) for part in parts])
    together = tail.replay_all(parts)
    torch.testing.assert_close(together, apart, **TOLERANCE)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(0))
    for got, want in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (together, apart)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_module_shared_by_both_sides_still_runs_in_the_tail():
    model = tiny_model("llama")
    model.model.norm = model.model.layers[2].input_layernorm  # taped as the edited layer's, live as the final norm
    tail = Tail(model, find_architecture(model))
    compare(tail, tail.capture(*right_padded(LENGTHS)))


def test_an_error_in_the_model_leaves_no_patch():
    tail = make_tail("llama")
    before = snapshot(tail.model)
    capture = tail.capture(*right_padded(LENGTHS))
    with pytest.raises((IndexError, RuntimeError)):
        tail.capture(torch.full((1, 3), 10**6), torch.ones(1, 3, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        tail.replay(capture, capture.main, torch.tensor([10**6]))
    assert_unchanged(tail.model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_editing_does_not_depend_on_the_callers_grad_mode(mode):
    model = tiny_model("llama")
    with mode():
        editor = WiseEditor(model, tiny_tokenizer(), WiseConfig(prefixes=1, prefix_tokens=3, max_steps=3))
        report = editor.edit({"prompt": "Who is it?", "target": "Bob"})[0]
    assert report.steps == 3 and report.loss < report.loss_before
