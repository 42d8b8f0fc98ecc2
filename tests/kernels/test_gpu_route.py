"""The route kernels against the definition: choices exactly, whatever padding holds, however wide or long the case."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import generator
from test_route import INF, by_sequence, case
from tolerances import assert_fp32

from wise_kernels import reference

gpu = pytest.importorskip("wise_kernels.gpu.route")


def on(device, tensors):
    return [t if t is None else t.to(device) for t in tensors]


def check(device, norms, mask, thresholds, leverage=None, reduction="mean"):
    scores, choice = gpu.route(*on(device, (norms, mask, thresholds, leverage)), reduction)
    scores_ref, choice_ref = reference.route(norms, mask, thresholds, leverage, reduction)
    assert scores.dtype == torch.float32 and choice.dtype == torch.int64
    assert_fp32(scores.cpu(), scores_ref)
    assert torch.equal(choice.cpu(), choice_ref)


@pytest.fixture(params=["one launch", "two launches"])
def launches(request, monkeypatch):
    if request.param == "two launches":
        monkeypatch.setattr(gpu, "WHOLE_ELEMENTS", 0)
    return request.param


def test_ragged_cases_match_the_definition(device, launches, poisoned):
    @settings(max_examples=15)
    @given(
        st.sampled_from([1, 2, 3, 5, 17]), st.integers(1, 5), st.sampled_from([1, 7, 9]),
        st.sampled_from(["mean", "max"]), st.integers(0, 2**20), st.booleans(),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )  # fmt: skip
    def run(memories, batch, tokens, reduction, seed, leveraged, dtype):
        norms, mask, thresholds, leverage = case(memories, batch, tokens, seed, dtype)
        leverage = leverage if leveraged else None
        check(device, norms, mask, thresholds, leverage, reduction)
        check(device, norms, mask, by_sequence(thresholds, batch, seed), leverage, reduction)

    run()


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("memories,batch,tokens", [(1, 2, 1025), (4, 1, 513), (64, 2, 100), (65, 1, 63), (130, 1, 7)])
def test_many_memories_and_long_prompts(device, poisoned, memories, batch, tokens, reduction):
    norms, mask, thresholds, leverage = case(memories, batch, tokens, memories)
    check(device, norms, mask, thresholds, None, reduction)
    check(device, norms, mask, thresholds, leverage, reduction)
    check(device, norms, mask, by_sequence(thresholds, batch, 1), leverage, reduction)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_padding_never_counts_and_strides_do_not_matter(device, launches, poisoned, reduction):
    norms, mask, thresholds, leverage = case(3, 4, 9, 1)
    mask[2] = False
    norms[:, ~mask.flatten()], leverage[:, ~mask.flatten()] = float("nan"), INF
    check(device, norms, mask, thresholds, leverage, reduction)
    wide = torch.zeros(4, 20, dtype=torch.bool)
    wide[:, 1:19:2] = mask
    strided = torch.stack([norms, norms], 1)[:, 0], wide[:, 1:19:2], torch.stack([thresholds, thresholds], 1)[:, 0]
    check(device, *strided, leverage.t().contiguous().t(), reduction)
    check(device, norms, mask, by_sequence(thresholds, 4, 1).t().contiguous().t(), leverage, reduction)
    check(device, norms, mask, thresholds.expand(4, 3), leverage, reduction)


def test_degenerate_thresholds_and_ties(device, launches):
    mask = torch.ones(1, 2, dtype=torch.bool)
    norms = torch.tensor([[0.0, 0.0], [3.0, 3.0], [3.0, 3.0]])
    for thresholds in ((0.0, 1.0, 1.0), (0.0, INF, 1.0), (0.0, 1.0, 0.0), (INF,) * 3, (0.0, 3.0, 3.0), (0.0,) * 3):
        check(device, norms, mask, torch.tensor(thresholds))
        check(device, norms, mask, torch.tensor(thresholds), torch.tensor([[0.1], [0.5], [0.5]]).expand(3, 2))
    check(device, torch.full((5, 2), 2.0), mask, torch.ones(5))
    infinite = torch.full((3, 2), INF), mask, torch.tensor([INF, INF, 1.0]), None
    assert gpu.route(*on(device, infinite), "mean")[1].tolist() == [2]


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_nan_in_a_prompt_closes_its_memory(device, launches, reduction):
    norms, mask = torch.full((3, 4), 5.0), torch.ones(2, 2, dtype=torch.bool)
    norms[0, 1] = float("nan")
    scores, choice = gpu.route(*on(device, (norms, mask, torch.ones(3), None)), reduction)
    assert scores.isnan().tolist() == [[True, False, False], [False] * 3] and choice.tolist() == [1, 0]
    scores, choice = gpu.route(*on(device, (norms, mask, torch.ones(3), norms)), reduction)
    assert choice.tolist() == [1, 0]


@pytest.mark.parametrize("memories,batch,tokens", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)])
def test_empty(device, launches, memories, batch, tokens):
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    norms, thresholds = torch.rand(memories, batch * tokens, device=device), torch.zeros(memories, device=device)
    for leverage in (None, norms):
        scores, choice = gpu.route(norms, mask, thresholds, leverage, "mean")
        assert torch.equal(scores.cpu(), torch.zeros(batch, memories))
        assert torch.equal(choice.cpu(), torch.full((batch,), -1))


def test_equal_launches_give_equal_bits(device, launches):
    norms, mask, thresholds, leverage = on(device, case(5, 3, 100, 7))
    first = gpu.route(norms, mask, thresholds, leverage, "mean")
    again = gpu.route(norms, mask, thresholds, leverage, "mean")
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@settings(max_examples=10)
@given(st.integers(0, 2**20))
def test_a_sequence_does_not_depend_on_its_batch(seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norms, mask, thresholds, leverage = on(device, case(3, 4, 9, seed))
    scores, choice = gpu.route(norms, mask, thresholds, leverage, "mean")
    b = int(torch.randint(4, (), generator=generator(seed)))
    part = norms[:, 9 * b : 9 * b + 9], mask[b : b + 1], thresholds, leverage[:, 9 * b : 9 * b + 9]
    alone = gpu.route(*part, "mean")
    assert torch.equal(alone[0][0], scores[b]) and torch.equal(alone[1][0], choice[b])
