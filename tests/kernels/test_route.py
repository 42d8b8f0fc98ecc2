"""route against the definition; gates must match exactly. Padding, empty prompts, ties and degenerate thresholds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import generator
from tolerances import assert_fp32
from torch.library import opcheck

from wise_kernels import reference, route

INF = float("inf")


def case(memories, batch, tokens, seed, dtype=torch.float32):
    rng = generator(seed)
    norms, leverage = (torch.rand(memories, batch * tokens, generator=rng).to(dtype) for _ in range(2))
    mask = torch.rand(batch, tokens, generator=rng) < 0.6
    return norms, mask, 0.7 * torch.rand(memories, generator=rng), leverage


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["mean", "max"]), st.integers(0, 2**20),
    st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_matches_the_definition(memories, batch, tokens, reduction, seed, leveraged, dtype):
    norms, mask, thresholds, leverage = case(memories, batch, tokens, seed, dtype)
    leverage = leverage if leveraged else None
    scores, choice = route(norms, mask, thresholds, leverage, reduction)
    scores_ref, choice_ref = reference.route(norms, mask, thresholds, leverage, reduction)
    assert scores.dtype == torch.float32 and choice.dtype == torch.int64
    assert_fp32(scores, scores_ref)
    assert torch.equal(choice, choice_ref)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_padding_never_counts(reduction):
    norms, mask, thresholds, leverage = case(3, 4, 9, 1)
    expected = route(norms, mask, thresholds, leverage, reduction=reduction)
    norms, leverage = norms.clone(), leverage.clone()
    norms[:, ~mask.flatten()], leverage[:, ~mask.flatten()] = float("nan"), INF
    for got, want in zip(route(norms, mask, thresholds, leverage, reduction=reduction), expected, strict=True):
        assert torch.equal(got, want)


def test_a_sequence_does_not_depend_on_its_batch():
    norms, mask, thresholds, _ = case(3, 5, 8, 2)
    scores, choice = route(norms, mask, thresholds)
    for b in range(5):
        alone = route(norms.view(3, 5, 8)[:, b], mask[b : b + 1], thresholds)
        assert torch.equal(alone[0][0], scores[b]) and torch.equal(alone[1][0], choice[b])


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("memories,batch,tokens", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)])
def test_empty(memories, batch, tokens, reduction):
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    scores, choice = route(torch.rand(memories, batch * tokens), mask, torch.zeros(memories), reduction=reduction)
    assert torch.equal(scores, torch.zeros(batch, memories))
    assert torch.equal(choice, torch.full((batch,), -1))


def test_degenerate_thresholds_and_ties():
    mask = torch.ones(1, 2, dtype=torch.bool)
    norms = torch.tensor([[0.0, 0.0], [3.0, 3.0], [3.0, 3.0]])

    def choice(*thresholds):
        return int(route(norms, mask, torch.tensor(thresholds))[1])

    assert choice(0.0, 1.0, 1.0) == 1
    assert choice(0.0, INF, 1.0) == 2
    assert choice(0.0, 1.0, 0.0) == 2
    assert choice(INF, INF, INF) == -1
    assert choice(0.0, 3.0, 3.0) == -1


def test_what_a_memory_was_not_taught_counts_little_however_loud():
    norms, mask, thresholds = torch.tensor([[9.0, 3.0], [2.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool), torch.ones(2)
    leverage = torch.tensor([[30.0, 42.0], [0.5, 0.0]])
    assert route(norms, mask, thresholds)[1].tolist() == [0]
    scores, choice = route(norms, mask, thresholds, leverage)
    assert_fp32(scores, torch.tensor([[6 / 36**0.5, 2 / 0.25**0.5]]))
    assert choice.tolist() == [1]
    assert route(norms, mask, torch.tensor([1.0, 5.0]), leverage)[1].tolist() == [-1]
    scores, choice = route(norms, mask, thresholds, torch.zeros(2, 2))
    assert scores.isfinite().all() and choice.tolist() == [0]


def by_sequence(thresholds, batch, seed):
    """Thresholds [B, J] of each sequence, some of them closed."""
    closed = torch.rand(batch, len(thresholds), generator=generator(seed)) < 0.4
    return (thresholds * torch.linspace(0.5, 1.5, batch)[:, None]).masked_fill(closed, INF)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 4), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["mean", "max"]), st.integers(0, 2**20),
    st.booleans(),
)  # fmt: skip
def test_every_sequence_may_have_its_own_thresholds(memories, batch, tokens, reduction, seed, leveraged):
    norms, mask, thresholds, leverage = case(memories, batch, tokens, seed)
    thresholds, leverage = by_sequence(thresholds, batch, seed), leverage if leveraged else None
    scores, choice = route(norms, mask, thresholds, leverage, reduction)
    scores_ref, choice_ref = reference.route(norms, mask, thresholds, leverage, reduction)
    assert_fp32(scores, scores_ref)
    assert torch.equal(choice, choice_ref)
    for b in range(batch):  # as under these thresholds alone
        assert route(norms, mask, thresholds[b], leverage, reduction)[1][b] == choice[b]


def test_a_closed_memory_is_not_chosen_whatever_it_holds():
    norms, mask = torch.tensor([[9.0, INF, float("nan")], [2.0, 2.0, 2.0]]), torch.ones(3, 1, dtype=torch.bool)
    thresholds = torch.tensor([[INF, 1.0], [INF, INF], [INF, 1.0]])
    assert route(norms, mask, thresholds)[1].tolist() == [1, -1, 1]
    assert reference.route(norms, mask, thresholds)[1].tolist() == [1, -1, 1]


@pytest.mark.parametrize("leveraged", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_scores_carry_the_gradient_of_the_definition(reduction, leveraged):
    norms, mask, thresholds, leverage = case(3, 4, 9, 6)
    leverage = leverage if leveraged else None
    mask[2] = False
    norms.requires_grad_()
    weights = torch.rand(4, 3, generator=generator(7))
    (got,) = torch.autograd.grad((route(norms, mask, thresholds, leverage, reduction)[0] * weights).sum(), norms)
    (expected,) = torch.autograd.grad(
        (reference.route(norms, mask, thresholds, leverage, reduction)[0] * weights).sum(), norms
    )
    assert_fp32(got, expected)


def test_opcheck_and_compile():
    norms, mask, thresholds, leverage = case(3, 2, 5, 3)
    opcheck(torch.ops.wise.route.default, (norms, mask, thresholds, leverage, "mean"))
    opcheck(torch.ops.wise.route.default, (norms.clone().requires_grad_(), mask, thresholds, None, "max"))
    opcheck(torch.ops.wise.route.default, (norms.clone().requires_grad_(), mask, thresholds.expand(2, 3), None, "mean"))
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(norms, mask, thresholds), route(norms, mask, thresholds), strict=True):
        assert torch.equal(got, want)


def test_errors():
    norms, mask, thresholds, leverage = case(3, 2, 5, 3)
    cases = {
        "prompt_mask must be bool": (norms, mask.float(), thresholds),
        "B T = 10": (norms, mask[:1], thresholds),
        "thresholds must be": (norms, mask, thresholds[:1]),
        r"thresholds must be \[3\] or \[2, 3\], got \(1, 3\)": (norms, mask, thresholds[None]),
        "leverage must be": (norms, mask, thresholds, leverage[:1]),
        "reduction must be": (norms, mask, thresholds, leverage, "sum"),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            route(*arguments)
