"""The device forwards of both layouts, through triton's interpreter where there is no device, on outputs that start as
NaN: few rows (split sums), many rows (grouped tiles), every table's largest and smallest tile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_banks import bounds_of, element_bank, neuron_bank, normal
from tolerances import DTYPES, assert_fp32, assert_within

pytest.importorskip("triton")

import wise_kernels  # noqa: E402
from wise_kernels import pack_bits, popcount_table, reference  # noqa: E402
from wise_kernels.bits import unpack_bits, unpack_dense  # noqa: E402
from wise_kernels.gpu import dual_forward_element as element  # noqa: E402
from wise_kernels.gpu import dual_tiles, element_tile  # noqa: E402
from wise_kernels.gpu.dual_forward import dual_forward  # noqa: E402
from wise_kernels.side_forward import element_side, element_side_gpu, neuron_side, neuron_side_gpu  # noqa: E402

# One either side of every change of kernel, 63 and 64 where they are cheap.
ROWS = [1, 7, 17, 65]


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -(10**6))

    monkeypatch.setattr(torch, "empty", poisoned)


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def check_neuron(device, a, weight, bias, bank, response=True):
    dtype, dense = a.dtype, reference.dense_neuron(*bank, a.shape[1])
    y_ref, side_ref, norms_ref = reference.dual_forward(a, weight, bias, dense)
    y, side, norms = dual_forward(*on(device, a, weight, bias, *bank), response)
    assert_within(y.cpu(), F.linear(a, weight, bias), y_ref, dtype)
    check_side(a, dense, side.cpu(), norms.cpu(), side_ref, norms_ref, response)
    nothing, *only = dual_forward(*on(device, a, None, None, *bank), response)
    assert nothing is None
    assert torch.equal(only[0].cpu(), side.cpu())
    # Of another compilation, which may contract sums of squares otherwise.
    assert_fp32(only[1].cpu(), norms.cpu())


def check_side(a, dense, side, norms, side_ref, norms_ref, response):
    plain = torch.stack([F.linear(a, d) for d in dense.to(a.dtype)])
    assert side.dtype == a.dtype and norms.dtype == torch.float32
    assert_within(norms, plain.float().norm(dim=-1), norms_ref, a.dtype)
    if response:
        assert_within(side, plain, side_ref, a.dtype)
    else:
        assert side.shape == (len(dense), 0, dense.shape[1])


def check_element(device, a, bank, response=True, popcounts=None):
    values, bits, bounds = bank
    spans = zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
    dense = torch.stack([unpack_dense(values[p:q], b, a.shape[1]) for (p, q), b in zip(spans, bits, strict=True)])
    _, side_ref, norms_ref = reference.dual_forward(a, dense[0], None, dense.float())
    side, norms = element.element_forward(*on(device, a, *bank), response, popcounts)
    check_side(a, dense.float(), side.cpu(), norms.cpu(), side_ref, norms_ref, response)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_neuron_matches_the_definition(device, rows, dtype):
    bank = neuron_bank((20, 0, 63), dtype=dtype)
    a, weight, bias = normal(rows, 63, dtype=dtype), normal(7, 63, seed=5, dtype=dtype), normal(7, dtype=dtype)
    check_neuron(device, a, weight, bias, bank, response=rows != 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_element_matches_the_definition(device, rows, dtype):
    check_element(device, normal(rows, 63, dtype=dtype), element_bank((0.5, 0.0, 1.0), dtype=dtype), rows != 7)


@pytest.mark.parametrize("rows", [16, 17, 64])
def test_rows_next_to_a_change_of_kernel(device, rows):
    a, weight = normal(rows, 33, dtype=torch.float16), normal(3, 33, seed=5, dtype=torch.float16)
    check_neuron(device, a, weight, None, neuron_bank((20,), 33, 3, torch.float16))
    check_element(device, a, element_bank((0.5,), 33, 3, torch.float16))


@pytest.mark.parametrize("sms", [-(10**9), 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_largest_and_smallest_tile_over_several_tiles(device, monkeypatch, sms, dtype):
    monkeypatch.setattr(dual_tiles, "SMS", sms)
    bank = neuron_bank((70, 129), width=140, outputs=260, dtype=dtype)
    a, weight = normal(140, 140, dtype=dtype), normal(260, 140, seed=5, dtype=dtype)
    check_neuron(device, a, weight, normal(260, dtype=dtype), bank)


@pytest.mark.parametrize("rows", [2, 130])
def test_element_over_several_tiles_words_and_splits(device, rows):
    bank = element_bank((0.2, 0.9), width=200, outputs=67, dtype=torch.float16)
    check_element(device, normal(rows, 200, dtype=torch.float16), bank)


@pytest.mark.parametrize("rows", [5, 70])
def test_element_over_splits_of_a_long_sum(device, rows):
    bank = element_bank((0.2, 0.7), width=600, outputs=33, dtype=torch.float16)
    check_element(device, normal(rows, 600, dtype=torch.float16), bank)


def edges(width, outputs):
    """Masks whose memories begin at odd places and end in a block's second word: one bit, all, none, last weights."""
    masks = torch.zeros(4, outputs, width, dtype=torch.bool)
    masks[0, -1, -1] = masks[3, :, -1] = masks[3, -1, 31:34] = True
    masks[1] = True
    return masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width,outputs,shift", [(63, 3, 0), (64, 5, 1), (129, 3, 1), (1, 1, 0)])
def test_element_memories_begin_and_end_anywhere(device, width, outputs, shift, dtype):
    masks = edges(width, outputs)
    bounds = bounds_of(int(mask.sum()) for mask in masks)
    # Not a number before and after the values: nothing of it may show.
    padded = torch.full((int(bounds[-1]) + shift + 8,), torch.nan).to(dtype).to(device)
    values = padded[shift : shift + int(bounds[-1])]
    values.copy_(normal(len(values), seed=1, dtype=dtype))
    a, bits = normal(3, width, dtype=dtype), pack_bits(masks)
    side, norms = element.element_forward(*on(device, a, values, bits, bounds))
    dense = torch.stack([unpack_dense(v, b, width) for v, b in zip(values.cpu().split(bounds.diff().tolist()), bits)])
    _, side_ref, norms_ref = reference.dual_forward(a, dense[0], None, dense.float())
    check_side(a, dense.float(), side.cpu(), norms.cpu(), side_ref, norms_ref, True)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40), st.integers(0, 3), st.sampled_from([torch.bfloat16, torch.float16]))
def test_element_any_octets(device, pattern, odd, dtype):
    mask = torch.tensor([pattern >> i & 1 for i in range(40)], dtype=torch.bool)[None]
    values = normal(odd + int(mask.sum()), dtype=dtype)
    before = torch.arange(40) < odd
    bank = values, pack_bits(torch.stack([before[None], mask])), bounds_of((odd, int(mask.sum())))
    found, _ = element.element_forward(*on(device, torch.eye(40, dtype=dtype), *bank))
    assert torch.equal(found[1, :, 0].cpu(), unpack_dense(values[odd:], bank[1][1], 40)[0])


@pytest.mark.parametrize("rows", [3, 18])
def test_neuron_over_several_splits(device, rows):
    bank = neuron_bank((700, 65), width=800, outputs=130, dtype=torch.float16)
    a, weight = normal(rows, 800, dtype=torch.float16), normal(130, 800, seed=5, dtype=torch.float16)
    check_neuron(device, a, weight, None, bank)


def test_more_memories_than_one_block_of_bounds(device, monkeypatch):
    monkeypatch.setattr(dual_tiles, "COMPACT_BOUNDS", 4)
    bank = neuron_bank((0, 3, 29, 0, 0, 7, 30, 1, 0, 5), width=30, outputs=5)
    check_neuron(device, normal(66, 30), normal(5, 30, seed=5), None, bank)


@pytest.mark.parametrize("rows", [5, 70])
def test_strided_activations_and_transposed_weight(device, rows):
    a, weight = normal(126, 2 * rows).t()[::2, ::2], normal(63, 7, seed=5).t()
    assert not a.is_contiguous() and not weight.is_contiguous()
    check_neuron(device, a, weight, None, neuron_bank((20, 7)))
    check_element(device, a, element_bank((0.5, 0.2)))


@pytest.mark.parametrize("rows", [0, 1, 65])
def test_nothing_to_read(device, rows):
    a, weight = normal(rows, 63), normal(7, 63, seed=5)
    check_neuron(device, a, weight, None, neuron_bank((0, 0)))
    check_element(device, a, element_bank((0.0,)))
    y, side, norms = dual_forward(*on(device, a, weight, None, *neuron_bank(())))
    assert_fp32(y.cpu(), F.linear(a, weight))
    assert side.shape == (0, rows, 7) and norms.shape == (0, rows)
    side, norms = element.element_forward(*on(device, a, *element_bank(())))
    assert side.shape == (0, rows, 7) and norms.shape == (0, rows)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 65, 100])
def test_popcount_table(device, width):
    bits = element_bank((0.5, 0.0, 1.0), width=width)[1]
    assert torch.equal(element_tile.popcount_table(bits.to(device)).cpu(), popcount_table(bits))


def test_popcount_table_over_several_blocks_of_words(device, monkeypatch):
    monkeypatch.setattr(element_tile, "POPCOUNT_WORDS", 8)
    bits = element_bank((0.4,), width=700, outputs=3)[1]
    table = element_tile.popcount_table(bits.to(device))
    assert torch.equal(table.cpu(), popcount_table(bits))
    assert int(table[0, 2, 1] - table[0, 2, 0]) == int(unpack_bits(bits[0], 700)[2, :64].sum())


def test_a_given_popcount_table_is_used(device):
    a, bank = normal(3, 63), element_bank((0.5, 0.2))
    check_element(device, a, bank, popcounts=element_tile.popcount_table(bank[1].to(device)))


def test_two_launches_give_the_same_bits(device):
    arguments = on(device, normal(70, 63), normal(7, 63, seed=5), None, *neuron_bank((20, 41)))
    for one, two in zip(dual_forward(*arguments), dual_forward(*arguments), strict=True):
        assert torch.equal(one, two)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([1, 16, 20, 65]),
    st.integers(1, 90),
    st.integers(1, 70),
    st.lists(st.integers(0, 90), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
)
def test_any_shape(device, rows, width, outputs, sizes, dtype):
    sizes = [min(size, width) for size in sizes]
    a, weight = normal(rows, width, dtype=dtype), normal(outputs, width, seed=5, dtype=dtype)
    check_neuron(device, a, weight, None, neuron_bank(sizes, width, outputs, dtype))
    densities = [size / width for size in sizes[:2]]
    check_element(device, a, element_bank(densities, width, outputs, dtype))


def test_tiles_fill_the_device():
    def many(rows, outputs, products, dtype=torch.bfloat16):
        return dual_tiles.many_rows_tile(torch.zeros(rows, 1, dtype=dtype), outputs, products)

    large, middle, small = dual_tiles.TILES["wgmma"]
    if torch.version.hip is None:
        assert many(2048, 4096, 1) == large and many(512, 4096, 1) == middle and many(100, 4096, 1) == small
        assert many(100, 4096, 64) == large
    assert many(2048, 4096, 1, torch.float32) == dual_tiles.TILES["fp32"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_ops_call_on_a_device_does_what_they_do_on_cpu(device, dtype):
    a, neuron, packed = normal(5, 63, dtype=dtype), neuron_bank((20, 7), dtype=dtype), element_bank((0.3,), dtype=dtype)
    found = neuron_side_gpu(*on(device, a, *neuron), True) + element_side_gpu(*on(device, a, *packed), True, None)
    for got, expected in zip(found, neuron_side(a, *neuron, True) + element_side(a, *packed, True), strict=True):
        assert got.dtype == expected.dtype
        assert_fp32(got.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 100])
def test_a_fused_main_output_is_close_and_the_default_is_exact(rows):
    a, weight, bias = (x.cuda() for x in (normal(rows, 63), normal(7, 63, seed=5), normal(7)))
    bank, plain = on("cuda", *neuron_bank((20, 7))), F.linear(a, weight, bias)
    assert torch.equal(wise_kernels.dual_forward(a, weight, bias, *bank)[0], plain)
    assert_fp32(wise_kernels.dual_forward(a, weight, bias, *bank, exact_main=False)[0], plain)


@pytest.mark.gpu
def test_a_captured_forward_follows_a_changed_bank():
    bank = on("cuda", *neuron_bank((20, 41), dtype=torch.float16))
    a = normal(70, 63, dtype=torch.float16).cuda()
    dual_forward(a, None, None, *bank)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, side, norms = dual_forward(a, None, None, *bank)
    bank[2].copy_(bounds_of((50, 11)))
    graph.replay()
    _, *expected = dual_forward(a, None, None, *bank)
    assert torch.equal(side, expected[0]) and torch.equal(norms, expected[1])


def test_values_are_read_in_pairs_that_lie_in_their_storage():
    spare = normal(8, dtype=torch.float16)
    for values, copied in ((spare, False), (spare[:7], False), (spare[1:8], True), (spare[:7].clone(), True)):
        pairs = element_tile.pairs_of(values)
        assert torch.equal(pairs, values) and (pairs.data_ptr() != values.data_ptr()) == copied
        assert pairs.data_ptr() % 4 == 0 and pairs.untyped_storage().nbytes() % 4 == 0
    whole = normal(7)
    assert element_tile.pairs_of(whole).data_ptr() == whole.data_ptr()
