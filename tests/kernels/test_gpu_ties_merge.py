"""The Triton kernels of ties_merge against the definition: on a device where there is one, else in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import generator, normal
from tolerances import DTYPES, assert_fp32, assert_within

from wise_kernels import reference, ties_merge

pytest.importorskip("triton")

from wise_kernels.gpu import ties_map as rows_map  # noqa: E402
from wise_kernels.gpu import ties_merge as gpu  # noqa: E402
from wise_kernels.gpu import ties_trim as trim  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch):
    empty = torch.empty

    def poison(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poison)


def keep_of(values, density):
    return [min(v.numel(), max(1, int(density * v.numel() + 0.5))) for v in values]


def merge(values, index, density, weights=None):
    values, index = [v.to(DEVICE) for v in values], [i.to(DEVICE) for i in index]
    out, rows = gpu.ties_merge(values, index, keep_of(values, density), weights or [1.0] * len(values))
    return out.cpu(), rows.cpu()


def thresholds(values, keep):
    return gpu.thresholds([v.to(DEVICE) for v in values], keep).cpu()


def shard(rows, m, seed, dtype=torch.float32, total=200):
    index = torch.randperm(total, generator=generator(seed))[:rows].sort().values
    return normal(rows, m, seed=seed, dtype=dtype), index


def check(shards, density, weights, dtype=torch.float32):
    values, index = zip(*shards, strict=True)
    got, rows = merge(values, index, density, weights)
    expected, rows_ref = reference.ties_merge(values, index, density, weights)
    assert got.dtype == dtype and torch.equal(rows, rows_ref)
    assert torch.equal(got.sign(), expected.to(dtype).sign())
    assert_within(got, expected.to(dtype), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 63, 64, 300])
def test_matches_the_definition(m, dtype, poisoned):
    check([shard(63, m, 1, dtype), shard(100, m, 2, dtype), shard(7, m, 3, dtype)], 0.3, [1.0, 2.5, 0.5], dtype)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (0, 5), (0,), (0, 0), (200, 200), (5, 0, 9, 1, 0, 17)])
@pytest.mark.parametrize("m", [1, 65])
def test_empty_and_one_row_shards(sizes, m, poisoned):
    check([shard(rows, m, seed) for seed, rows in enumerate(sizes)], 0.5, None)


@st.composite
def small_integers(draw):
    """Shards whose entries tie in magnitude and cancel often."""
    count, m, seed = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3])), draw(st.integers(0, 2**20))
    rng, shards = generator(seed), []
    for _ in range(count):
        index = (torch.rand(40, generator=rng) < draw(st.floats(0, 1))).nonzero().squeeze(1)
        shards.append((torch.randint(-4, 5, (len(index), m), generator=rng).float(), index))
    return shards


@settings(max_examples=15, deadline=None)
@given(small_integers(), st.floats(0.01, 1.0), st.booleans())
def test_any_shards_with_ties_and_cancellation(shards, density, weighted):
    check(shards, density, [0.5 + i for i in range(len(shards))] if weighted else None)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9000), st.sampled_from(DTYPES), st.integers(0, 2**20), st.floats(0, 1), st.integers(-30, 30))
def test_the_threshold_is_the_entry_a_sort_finds(size, dtype, seed, share, exponent):
    values = (normal(size, 1, seed=seed) * 2.0**exponent).to(dtype)
    keep = min(size, 1 + int(share * size))
    expected = values.abs().flatten().sort(descending=True).values[keep - 1]
    assert thresholds([values], [keep])[0] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_extreme_values(dtype):
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.tiny, info.tiny / 2, -info.smallest_normal, info.max, -info.max, float("inf"), 1.0, -1.0]
    values = torch.tensor(special).to(dtype)[:, None]
    for keep in range(1, len(special) + 1):
        expected = values.abs().flatten().sort(descending=True).values[keep - 1]
        assert thresholds([values], [keep])[0] == expected


def test_thresholds_of_shards_of_different_sizes_and_of_one_value():
    values = [torch.full((trim.BLOCK + 3, 1), -0.75), normal(3 * trim.BLOCK + 17, 1), normal(1, 1, seed=1)]
    keep = [5, trim.BLOCK, 1]
    got = thresholds(values, keep)
    for tau, shard_values, k in zip(got, values, keep, strict=True):
        assert tau == shard_values.abs().flatten().sort(descending=True).values[k - 1]


@pytest.mark.parametrize("margin,whole", [(0, True), (1024, True), (48, False)])
def test_where_the_sample_misleads_or_the_buffer_overflows_the_whole_shard_is_searched(margin, whole, monkeypatch):
    monkeypatch.setattr(trim, "SAMPLE", 1024)
    monkeypatch.setattr(trim, "MARGIN", margin)
    states, select = [], trim.select

    def watch(table, hist, state, values):
        states.append(state.clone())
        select(table, hist, state, values)

    monkeypatch.setattr(gpu, "select", watch)
    values = normal(8000, 1)
    for keep in (3000, 4000):
        expected = values.abs().flatten().sort(descending=True).values[keep - 1]
        assert thresholds([values], [keep])[0] == expected
    assert all(bool(state[trim.WHOLE.value]) == whole for state in states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_ties_at_the_threshold_are_kept_in_every_dtype(m, dtype):
    values = [torch.randint(-4, 5, (50, m), generator=generator(i)).to(dtype) for i in range(3)]
    index = [torch.randperm(70, generator=generator(i))[:50].sort().values for i in range(3)]
    got, rows = merge(values, index, 0.4)
    expected, rows_ref = ties_merge(values, index, 0.4)
    assert torch.equal(got, expected) and torch.equal(rows, rows_ref)


def test_a_program_walks_over_many_blocks(monkeypatch):
    monkeypatch.setattr(trim, "PROGRAMS", 2)
    monkeypatch.setattr(trim, "BLOCK", 64)
    values = normal(64 * 7 + 5, 1)
    assert thresholds([values], [100])[0] == values.abs().flatten().sort(descending=True).values[99]


@pytest.mark.parametrize("first,second", [(0.1, -0.1), (1.0, -1.0 - 2**-23), (1.0 + 2**-23, -1.0)])
def test_the_election_is_that_of_the_cpu_where_it_is_close(first, second):
    # Three shards, so that an fp32 sum would round: 2^25 + x - 2^25.
    big = 2.0**25
    values = [torch.tensor([[x], [y]]) for x, y in ((big, first), (0.75, second), (-big, 0.0))]
    index = [torch.tensor([3, 9])] * 3
    got, _ = merge(values, index, 1.0)
    assert torch.equal(got.sign(), ties_merge(values, index, 1.0)[0].sign())


def test_strided_and_misaligned_shards():
    values, index = shard(50, 6, 1)
    other, other_index = shard(30, 6, 2)
    wide = torch.zeros(50, 13)
    wide[:, 1::2] = values
    offset = torch.zeros(30 * 6 + 1)
    offset[1:] = other.flatten()
    spread = torch.zeros(100, dtype=torch.int64)
    spread[::2] = index
    got, rows = merge([wide[:, 1::2], offset[1:].view(30, 6)], [spread[::2], other_index], 0.4)
    expected, rows_ref = merge([values, other], [index, other_index], 0.4)
    assert torch.equal(got, expected) and torch.equal(rows, rows_ref)


def test_rows_that_are_far_apart_need_no_map_of_the_matrix():
    index = [torch.tensor([3, 10**12]), torch.tensor([10**12, 10**15])]
    got, rows = merge([torch.ones(2, 1), 3 * torch.ones(2, 1)], index, 1.0)
    assert rows.tolist() == [3, 10**12, 10**15] and got.flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("sizes", [(3000, 100), (0, 5000, 9, 2500), (700,) * 8, (300,) * 9])
def test_single_entries_over_many_tiles_of_the_map(sizes, poisoned, monkeypatch):
    monkeypatch.setattr(rows_map, "TILE", 256)
    shards = [shard(rows, 1, seed, total=6000) for seed, rows in enumerate(sizes)]
    values, index = zip(*shards, strict=True)
    got, rows = merge(values, index, 0.5)
    expected, rows_ref = ties_merge(values, index, 0.5)
    assert torch.equal(got, expected) and torch.equal(rows, rows_ref)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("rows", [[1, 1], [5, 3], [0, 900, 4], [-3, 2], [-7, -2], [9, 2, 700, 3]])
def test_unsorted_rows_are_refused(rows, m):
    with pytest.raises(ValueError, match=r"index\[1\] must be sorted"):
        merge([torch.ones(2, m), torch.ones(len(rows), m)], [torch.tensor([0, 1]), torch.tensor(rows)], 0.5)


def test_inputs_are_left_as_they_were_and_launches_repeat_to_the_bit():
    shards = [shard(63, 70, 1), shard(100, 70, 2)]
    values, index = zip(*shards, strict=True)
    copies = [v.clone() for v in values]
    first, _ = merge(values, index, 0.4)
    second, _ = merge(values, index, 0.4)
    assert torch.equal(first, second)
    assert all(torch.equal(v, c) for v, c in zip(values, copies, strict=True))


def test_what_the_kernels_do_not_take():
    assert gpu.supported([torch.ones(2, 2, dtype=torch.bfloat16)])
    assert not gpu.supported([torch.ones(2, 2, dtype=torch.float64)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,rows,total", [(4096, 2202, 11008), (640, 410, 2048), (1, 2_000_000, 9_000_000)])
def test_real_shapes_on_a_device(m, rows, total, dtype):
    values, index = zip(*(shard(rows, m, seed, dtype, total) for seed in range(3)), strict=True)
    on_device = [v.to(DEVICE) for v in values], [i.to(DEVICE) for i in index]
    got, union = ties_merge(*on_device, 0.53)
    expected, union_ref = ties_merge(values, index, 0.53)
    assert torch.equal(union.cpu(), union_ref) and torch.equal(got.cpu().sign(), expected.sign())
    assert_fp32(got.cpu(), expected.float())
