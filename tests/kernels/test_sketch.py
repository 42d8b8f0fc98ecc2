"""Sketched routing: the choices are those of exact norms, exact norms are used where a sketch does not decide and
nowhere else, and a sketch errs as seldom as its bound says.
"""

import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_banks import WIDTH, generator, neuron_bank, normal
from tolerances import DTYPES, assert_fp32
from torch.library import opcheck

from wise_kernels import reference, route, side_forward, sketch_bound, sketch_values, sketched_route

try:
    from wise_kernels.gpu import sketch as gpu
except ImportError:
    gpu = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 24
WITHIN = sketch_bound(SIZE, 1e-6)


def launch(a, values, columns, bounds, sketched, mask, thresholds, within, leverage=None, reduction="mean"):
    """The kernels, on the device of the tests."""
    tensors = [t if t is None else t.to(DEVICE) for t in (a, values, columns, bounds, sketched, mask, thresholds)]
    others = [t if t is None else t.to(DEVICE) for t in (leverage,)]
    return [t.cpu() for t in gpu.sketched_route(*tensors, *within, *others, reduction)]


FORMS = [sketched_route, pytest.param(launch, marks=pytest.mark.skipif(gpu is None, reason="needs triton"))]


def case(sizes, batch, tokens, seed=0, dtype=torch.float32, spread=1.0):
    """A bank, its sketch, activations, a mask, and thresholds near the median score, `spread` apart."""
    values, columns, bounds = neuron_bank(sizes, dtype=dtype, outputs=40, seed=seed)
    sketched = sketch_values(values, columns, bounds, WIDTH, SIZE, generator(seed))
    a = normal(batch * tokens, WIDTH, seed=seed + 2, dtype=dtype)
    mask = torch.rand(batch, tokens, generator=generator(seed)) < 0.7
    norms = side_forward(a, values, columns, bounds, response=False)[1]
    scores = route(norms, mask, torch.zeros(len(sizes)))[0]
    near = scores.median(0).values if batch else torch.ones(len(sizes))
    thresholds = near * torch.exp(spread * normal(len(sizes), seed=seed + 3))
    return (a, values, columns, bounds, sketched, mask, thresholds), norms


def rows_of(sketched, memories):
    """[J, s, F] as the definition takes them, from [F, J s]."""
    return sketched.float().unflatten(1, (memories, -1)).permute(1, 2, 0)


def decided_by_rounding(ratios, error):
    """Whether a score is its threshold but for so large an error, or the two largest are one another."""
    ratios = ratios.nan_to_num(0.0)
    largest = ratios.topk(min(2, ratios.shape[1])).values
    tied = len(largest[0]) == 2 and (largest[:, 0] - largest[:, 1] < error * largest[:, 0]).any()
    return bool(tied or ((ratios - 1).abs() < error).any())


@pytest.mark.parametrize("form", FORMS)
def test_choices_are_those_of_exact_norms(form):
    @settings(max_examples=12)
    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 7),
        st.integers(0, 2**20), st.sampled_from(["mean", "max"]), st.booleans(),
        st.sampled_from(DTYPES), st.sampled_from([0.05, 1.0]),
    )  # fmt: skip
    def run(sizes, batch, tokens, seed, reduction, leveraged, dtype, spread):
        arguments, norms = case(sizes, batch, tokens, seed, dtype, spread)
        rng = generator(seed)
        leverage = torch.rand(len(sizes), batch * tokens, generator=rng) if leveraged else None
        mask, thresholds = arguments[-2:]
        exact, chosen = route(norms, mask, thresholds, leverage, reduction)
        assume(not decided_by_rounding(exact / thresholds, 1e-2 if dtype == torch.bfloat16 else 2e-3))
        scores, choice = form(*arguments, WITHIN, leverage, reduction)
        assert torch.equal(choice, chosen)
        a, values, columns, bounds, sketched = arguments[:5]
        dense = reference.dense_neuron(values, columns, bounds, WIDTH), rows_of(sketched, len(sizes))
        expected = reference.sketched_route(a, *dense, WITHIN, mask, thresholds, leverage, reduction)
        assert torch.equal(choice, expected[1])
        torch.testing.assert_close(scores, expected[0], rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3)

    run()


@pytest.mark.parametrize("form", FORMS)
def test_every_sequence_may_have_its_own_thresholds(form):
    (*bank, mask, thresholds), norms = case((9, 12, 30, 5), 3, 5)
    each = thresholds * torch.tensor([[0.3, 3.0, 0.5, 1.1], [torch.inf, 0.4, 2.0, 0.6], [torch.inf] * 4])
    scores, choice = form(*bank, mask, each, WITHIN)
    assert torch.equal(choice, route(norms, mask, each)[1]) and len(set(choice.tolist())) > 1
    for b in range(3):
        assert choice[b] == form(*bank, mask, each[b], WITHIN)[1][b]


@pytest.mark.parametrize("form", FORMS)
def test_only_open_pairs_are_computed(form):
    (a, values, columns, bounds, sketched, mask, thresholds), norms = case((20, 30, 7), 3, 5)
    scores = route(norms, mask, thresholds)[0]
    # Memory 0 is far below its threshold, 2 far above it and alone, 1 is open for every sequence.
    thresholds = torch.stack([100 * scores[:, 0].max(), scores[:, 1].median() * 0.999, torch.tensor(1e-6)])
    poisoned, (first, second) = values.clone(), bounds[1:3].tolist()
    poisoned[:first] = poisoned[second:] = float("nan")
    alone = torch.tensor([float("inf"), float("inf"), 1e-6])
    got = form(a, poisoned, columns, bounds, sketched, mask, alone, WITHIN)
    assert got[1].tolist() == [2, 2, 2] and got[0].isfinite().all()
    closed = torch.cat([thresholds[:2], torch.tensor([float("inf")])])
    got = form(a, poisoned, columns, bounds, sketched, mask, closed, WITHIN)
    assert torch.equal(got[1], route(norms, mask, closed)[1])
    assert_fp32(got[0][:, 1], scores[:, 1])
    leverage = torch.tensor([1e9, 1e9, 1e-3])[:, None].expand(3, 15)  # only memory 2 was taught any of it
    assert form(a, poisoned, columns, bounds, sketched, mask, thresholds, WITHIN, leverage)[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("form", FORMS)
def test_padding_many_memories_ties_and_degenerate_thresholds(form):
    arguments, norms = case((9,) * 34, 2, 3, spread=0.02)
    assert torch.equal(form(*arguments, WITHIN)[1], route(norms, *arguments[-2:])[1])
    (a, values, columns, bounds, sketched, mask, thresholds), norms = case((10, 10), 3, 20)
    mask[1] = False
    a[~mask.flatten()] = float("nan")
    clean = route(torch.where(mask.flatten(), norms, 0.0), mask, thresholds)
    scores, choice = form(a, values, columns, bounds, sketched, mask, thresholds, WITHIN)
    assert torch.equal(choice, clean[1]) and not scores[1].any() and scores.isfinite().all()
    same = [torch.cat([x[:10], x[:10]]) for x in (values, columns)] + [sketched[:, :SIZE].repeat(1, 2)]
    for thresholds in (torch.zeros(2), torch.full((2,), 1e-3), torch.full((2,), float("inf"))):
        scores, choice = form(a, same[0], same[1], bounds, same[2], mask, thresholds, WITHIN)
        assert choice.tolist() == [-1 if thresholds[0] > 1 else 0, -1, -1 if thresholds[0] > 1 else 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes,batch,tokens", [((), 2, 3), ((3, 2), 0, 3), ((3, 2), 2, 0)])
def test_empty(form, sizes, batch, tokens):
    values, columns, bounds = neuron_bank(sizes)
    bank = values, columns, bounds, sketch_values(values, columns, bounds, WIDTH, 4, generator(0))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    scores, choice = form(normal(batch * tokens, WIDTH), *bank, mask, torch.ones(len(sizes)), WITHIN)
    assert torch.equal(scores, torch.zeros(batch, len(sizes))) and choice.tolist() == [-1] * batch


@pytest.mark.parametrize("size", [1, 4, 32])
def test_a_sketch_errs_as_seldom_as_its_bound_says(size):
    failure, trials, rng = 0.1, 2000, generator(size)
    low, high = sketch_bound(size, failure)
    v = normal(1, 12, seed=5)
    bank = v, torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), 1
    rough = torch.stack([sketch_values(*bank, size, rng).norm() for _ in range(trials)])
    assert ((low * rough > v.norm()) | (high * rough < v.norm())).float().mean() <= failure
    assert rough.square().mean() == pytest.approx(float(v.square().sum()), rel=0.15)


@given(st.integers(1, 4096), st.floats(1e-12, 0.5))
def test_bounds_hold_one_and_narrow_with_size(size, failure):
    low, high = sketch_bound(size, failure)
    wider = sketch_bound(size, failure / 10)
    narrower = sketch_bound(2 * size, failure)
    assert 0 < wider[0] < low < narrower[0] < 1 < narrower[1] < high < wider[1]


def test_opcheck_compile_and_seeds():
    arguments, _ = case((10, 10), 2, 3)
    opcheck(torch.ops.wise.sketched_route.default, (*arguments, *WITHIN, None, "mean"))
    compiled = torch.compile(sketched_route, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments, WITHIN), sketched_route(*arguments, WITHIN), strict=True):
        assert torch.equal(got, want)
    bank = *arguments[1:4], WIDTH, 4
    assert torch.equal(sketch_values(*bank, generator(1)), sketch_values(*bank, generator(1)))


def test_a_sketch_lies_in_its_memorys_columns_and_leaves_room_out(monkeypatch):
    monkeypatch.setattr(sys.modules["wise_kernels.sketch"], "ROWS", 4)
    values, columns, bounds = neuron_bank((9, 0, 5), outputs=40)
    room = torch.cat([values, values[:3]]), torch.cat([columns, columns[:3]]), bounds
    sketched = sketch_values(*room, WIDTH, 6, generator(1))
    assert sketched.shape == (WIDTH, 18) and torch.equal(
        sketched, sketch_values(values, columns, bounds, WIDTH, 6, generator(1))
    )
    g = torch.randn(40, 6, generator=generator(1)) / 6**0.5
    dense = reference.dense_neuron(values, columns, bounds, WIDTH)
    assert_fp32(sketched, torch.cat([d.t() @ g for d in dense], 1))


def test_errors():
    (a, values, columns, bounds, sketched, mask, thresholds), _ = case((10, 10), 2, 3)
    bank = a, values, columns, bounds
    cases = {
        "sketched must be": (*bank, sketched[:, :3], mask, thresholds, WITHIN),
        "within must be": (*bank, sketched, mask, thresholds, (1.1, 2.0)),
        "prompt_mask must be": (*bank, sketched, mask.float(), thresholds, WITHIN),
        "thresholds must be": (*bank, sketched, mask, thresholds[:1], WITHIN),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            sketched_route(*arguments)
    for function, arguments in (
        (sketch_bound, (0, 0.1)),
        (sketch_bound, (4, 1.0)),
        (sketch_values, (values, columns, bounds, WIDTH, 0, generator(0))),
    ):
        with pytest.raises(ValueError):
            function(*arguments)
