"""ties_merge against the definition, and the properties TIES promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import generator, normal
from tolerances import ATOL, DTYPES, assert_fp32
from torch.library import opcheck

from wise_kernels import reference, ties_merge


@st.composite
def shards(draw, least=1):
    count, width, seed = draw(st.integers(least, 4)), draw(st.sampled_from([1, 3])), draw(st.integers(0, 2**20))
    rng, values, index = generator(seed), [], []
    for _ in range(count):
        rows = (torch.rand(12, generator=rng) < 0.5).nonzero().squeeze(1)
        # Small integers make ties in magnitude and exact cancellation common.
        values.append(torch.randint(-4, 5, (len(rows), width), generator=rng).float())
        index.append(rows)
    return values, index


DENSITY = st.floats(0.05, 1.0)


@settings(max_examples=60, deadline=None)
@given(shards(), DENSITY, st.booleans())
def test_matches_the_definition(shards, density, weighted):
    values, index = shards
    weights = [0.5 + i for i in range(len(values))] if weighted else None
    got, rows = ties_merge(values, index, density, weights)
    expected, rows_ref = reference.ties_merge(values, index, density, weights)
    assert torch.equal(rows, rows_ref)
    assert torch.equal(got.sign(), expected.sign())
    assert_fp32(got, expected)


@settings(max_examples=30, deadline=None)
@given(shards())
def test_a_single_whole_shard_is_itself(shards):
    values, index = shards
    got, rows = ties_merge(values[:1], index[:1], 1.0)
    assert torch.equal(got, values[0]) and torch.equal(rows, index[0])


@settings(max_examples=30, deadline=None)
@given(shards(least=2), DENSITY, st.randoms(use_true_random=False))
def test_the_order_of_the_shards_does_not_matter(shards, density, random):
    values, index = shards
    order = random.sample(range(len(values)), len(values))
    got, rows = ties_merge([values[i] for i in order], [index[i] for i in order], density)
    expected, rows_ref = ties_merge(values, index, density)
    assert torch.equal(rows, rows_ref) and torch.equal(got.sign(), expected.sign())
    assert_fp32(got, expected)


@settings(max_examples=30, deadline=None)
@given(shards(), DENSITY)
def test_an_entry_lies_between_the_values_that_share_its_sign(shards, density):
    values, index = shards
    got, rows = ties_merge(values, index, density)
    dense = torch.zeros(len(values), 12, got.shape[1])
    for i, (shard, where) in enumerate(zip(values, index, strict=True)):
        dense[i, where] = shard
    agree = dense.sign() == got.new_zeros(dense.shape[1:]).index_copy(0, rows, got).sign()
    largest = (dense.abs() * agree).amax(0)[rows]
    assert (got.abs() <= largest + ATOL[torch.float32]).all()
    assert not got[(dense == 0).all(0)[rows]].any()


def test_by_hand():
    values = [torch.tensor([[4.0], [-1.0], [2.0]]), torch.tensor([[-3.0], [5.0], [0.5]])]
    index = [torch.tensor([0, 2, 5]), torch.tensor([0, 5, 9])]
    got, rows = ties_merge(values, index, 0.67)
    assert rows.tolist() == [0, 2, 5, 9]
    assert got.squeeze(1).tolist() == [4.0, 0.0, 3.5, 0.0]
    assert ties_merge(values, index, 0.67, [1.0, 3.0])[0].squeeze(1).tolist() == [4.0, 0.0, 4.25, 0.0]


def test_ties_at_the_threshold_are_kept_and_a_cancelled_entry_is_zero():
    same = torch.tensor([[2.0], [-2.0], [1.0]])
    rows = torch.tensor([1, 2, 3])
    assert ties_merge([same], [rows], 0.34)[0].squeeze(1).tolist() == [2.0, -2.0, 0.0]
    assert not ties_merge([same, -same], [rows, rows], 1.0)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 7), (63, 100, 0), (0,)])
def test_ragged_shards_and_dtypes(sizes, dtype):
    values = [normal(n, 3, seed=n, dtype=dtype) for n in sizes]
    index = [torch.randperm(120, generator=generator(n))[:n].sort().values for n in sizes]
    got, rows = ties_merge(values, index, 0.3)
    expected, rows_ref = reference.ties_merge(values, index, 0.3)
    assert got.dtype == dtype and torch.equal(rows, rows_ref)
    assert torch.equal(got, expected.to(dtype)) or (got.float() - expected).abs().max() <= ATOL[dtype]


def test_inputs_are_left_as_they_were():
    values, index = [normal(5, 2), normal(4, 2, seed=1)], [torch.arange(5), torch.arange(4)]
    copies = [v.clone() for v in values]
    ties_merge(values, index, 0.5, [1.0, 2.0])
    assert all(torch.equal(v, c) for v, c in zip(values, copies, strict=True))


def test_opcheck_and_compile():
    values, index = [normal(5, 2), normal(4, 2, seed=1)], [torch.arange(5), torch.arange(4) * 2]
    opcheck(torch.ops.wise.ties_merge.default, (values, index, 0.5, None))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(ties_merge, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(values, index, 0.5), ties_merge(values, index, 0.5), strict=True):
            assert torch.equal(got, want)


def test_errors():
    values, index = [normal(5, 2), normal(4, 2, seed=1)], [torch.arange(5), torch.arange(4)]
    cases = {
        "at least one shard": ([], [], 0.5),
        "one index for each": (values, index[:1], 0.5),
        "every shard must be": ([values[0], values[1].half()], index, 0.5),
        "index must be int64": (values, [index[0], index[0]], 0.5),
        "density": (values, index, 0.0),
        "positive numbers": (values, index, 0.5, [1.0, 0.0]),
        "sorted": (values, [index[0].flip(0), index[1]], 0.5),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            ties_merge(*arguments)
