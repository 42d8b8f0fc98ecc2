"""The gated_add_ kernels against the definition, and what they promise: rows out of scope keep their bits, and values
of memories that no row has chosen are not read.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import WIDTH, element_bank, neuron_bank, normal
from tolerances import DTYPES, assert_within

from wise_kernels import popcount_table, reference

gpu = pytest.importorskip("wise_kernels.gpu.gated_add")
element = pytest.importorskip("wise_kernels.gpu.gated_add_element")
rows = pytest.importorskip("wise_kernels.gpu.gated_rows")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(before, a, dense, choice):
    """The same sum in the dtype of the inputs."""
    by_row = choice.repeat_interleave(len(a) // len(choice))
    responses = torch.stack([a @ d.to(a.dtype).t() for d in dense] + [torch.zeros_like(before)])
    return torch.where((by_row < 0)[:, None], before, before + responses[by_row, torch.arange(len(a))])


def check(sizes, choice, tokens, dtype=torch.float32, outputs=7, before=None, a=None, layout="neuron"):
    """Sizes are columns in the neuron layout, densities in per cent in the element layout."""
    if layout == "neuron":
        add, dense_of, bank = gpu.gated_add, reference.dense_neuron, neuron_bank(sizes, outputs=outputs, dtype=dtype)
    else:
        add, dense_of = element.gated_add_element, reference.dense_element
        bank = element_bank([min(1.0, s / 100) for s in sizes], outputs=outputs, dtype=dtype)
    a = normal(len(choice) * tokens, WIDTH, dtype=dtype) if a is None else a
    before = normal(len(a), outputs, seed=3, dtype=dtype) if before is None else before
    choice = torch.tensor(choice)
    y = before.clone(memory_format=torch.preserve_format).to(DEVICE)
    add(y, *(t.to(DEVICE) for t in (a, *bank, choice)))
    outside = (choice < 0).repeat_interleave(tokens)
    assert torch.equal(y.cpu()[outside].view(torch.uint8), before[outside].view(torch.uint8))
    dense = dense_of(*bank, WIDTH)
    assert_within(y.cpu(), plain(before, a, dense, choice), reference.gated_add(before, a, dense, choice), dtype)


CHOICES = [([-1], 7), ([0], 1), ([2, -1, 0, 1], 1), ([-1, -1], 7), ([2, 2, 0], 5), ([0, -1, 2], 33), ([1], 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice,tokens", CHOICES)
@pytest.mark.parametrize("layout", ["neuron", "element"])
def test_matches_the_definition(poisoned, layout, choice, tokens, dtype):
    check((20, 0, 7) if layout == "neuron" else (50, 0, 100), choice, tokens, dtype, 7, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["neuron", "element"])
def test_many_short_sequences_each_with_its_own_memory(poisoned, layout, dtype):
    # In each order of sequences of one and of three tokens, with more rows than the smallest tile.
    choice = [(7 * i) % 6 - 1 for i in range(18)]
    check((20, 63, 0, 7, 33), choice, 1, dtype, 9, layout=layout)
    check((20, 63, 0, 7, 33), choice[:7], 3, dtype, 9, layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_prompts_of_the_element_layout(poisoned, dtype):
    check((20, 40), [1, -1, 0], 90, dtype, 65, layout="element")


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4), st.data(), st.integers(1, 6), st.integers(1, 9),
    st.sampled_from([1, 31, 65]), st.sampled_from(DTYPES), st.sampled_from(["neuron", "element"]),
)  # fmt: skip
def test_ragged_cases(sizes, data, batch, tokens, outputs, dtype, layout):
    choice = data.draw(st.lists(st.integers(-1, len(sizes) - 1), min_size=batch, max_size=batch))
    check(sizes, choice, tokens, dtype, outputs, layout=layout)


@pytest.mark.parametrize("tokens", [3, 20])
def test_strides_and_empty_inputs(poisoned, tokens):
    a = normal(2 * WIDTH, 2 * tokens).t()[:, ::2]
    check((20, 7), [1, -1], tokens, before=normal(7, 2 * tokens).t(), a=a)
    values, columns, bounds = (t.to(DEVICE) for t in neuron_bank((20, 7)))
    y, a, choice = normal(2 * tokens, 7).to(DEVICE), a.to(DEVICE), torch.tensor([1, -1], device=DEVICE)
    expected, kept = y.clone(), y.clone()
    gpu.gated_add(expected, a, values, columns, bounds, choice)
    wide = torch.stack([values, values], 2)[:, :, 0]
    gpu.gated_add(y, a, wide, torch.stack([columns, columns], 1)[:, 0], bounds, choice)
    assert torch.equal(y, expected) and not torch.equal(y, kept)
    gpu.gated_add(y[:0], a[:0], values, columns, bounds, choice)
    gpu.gated_add(y, a, *(t.to(DEVICE) for t in neuron_bank(())), choice)
    gpu.gated_add(y, a, *(t.to(DEVICE) for t in neuron_bank((0, 0))), choice)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("choice,tokens", [([0, -1], 4), ([0, -1], 40), ([0, -1] * 20, 1)])
def test_values_of_other_memories_are_not_read(poisoned, choice, tokens):
    # Their columns point far outside of `a`: a read would fault, or be NaN. So would a product with their values.
    values, columns, bounds = neuron_bank((5, 6, 7))
    values[5:], columns[5:] = float("nan"), 1 << 40
    y, a = normal(len(choice) * tokens, 7), normal(len(choice) * tokens, WIDTH)
    moved = [t.to(DEVICE) for t in (y, a, values, columns, bounds, torch.tensor(choice))]
    gpu.gated_add(*moved)
    assert not moved[0].isnan().any()
    values[:], columns[:] = float("nan"), 1 << 40
    before = moved[0].clone()
    nowhere = torch.full((len(choice),), -1)
    gpu.gated_add(moved[0], *(t.to(DEVICE) for t in (a, values, columns, bounds, nowhere)))
    assert torch.equal(moved[0], before)


@pytest.mark.parametrize("tokens", [4, 80])
def test_element_layout_strides_scope_and_empty_inputs(poisoned, tokens):
    a = normal(2 * WIDTH, 2 * tokens).t()[:, ::2]
    check((50, 20), [1, -1], tokens, before=normal(7, 2 * tokens).t(), a=a, layout="element")
    values, bits, bounds = element_bank((0.2, 0.3, 0.4))
    values[: int(bounds[1])] = float("nan")
    values[int(bounds[2]) :] = float("nan")
    y, choice = normal(2 * tokens, 7).to(DEVICE), torch.tensor([1, -1], device=DEVICE)
    moved = [t.to(DEVICE) for t in (a, values, bits, bounds)]
    element.gated_add_element(y, *moved, choice)
    assert y.isfinite().all()
    before = y.clone()
    element.gated_add_element(y, *moved, torch.tensor([-1, 7], device=DEVICE))
    element.gated_add_element(y, a.to(DEVICE), *(t.to(DEVICE) for t in element_bank(())), choice)
    element.gated_add_element(y[:0], a.to(DEVICE)[:0], *moved[1:], choice)
    assert torch.equal(y, before)


@pytest.mark.parametrize("width,tokens,outputs", [(170, 2, 50), (170, 9, 50), (600, 2, 17), (600, 70, 17)])
def test_element_layout_with_rows_of_many_words_and_splits_of_a_long_sum(poisoned, width, tokens, outputs):
    bank, a = element_bank((0.2, 0.6), width=width, outputs=outputs), normal(2 * tokens, width)
    y, choice = torch.zeros(2 * tokens, outputs), torch.tensor([1, 0])
    got = y.to(DEVICE, copy=True)
    element.gated_add_element(got, *(t.to(DEVICE) for t in (a, *bank, choice)))
    expected = reference.gated_add(y, a, reference.dense_element(*bank, width), choice)
    assert_within(got.cpu(), expected, expected, torch.float32)


@pytest.mark.parametrize("width,tokens,outputs", [(170, 2, 50), (170, 9, 50), (130, 70, 17)])
def test_who_knows_where_values_begin_gets_the_same(poisoned, width, tokens, outputs):
    bank, a = element_bank((0.2, 0.6), width=width, outputs=outputs), normal(2 * tokens, width)
    got, counted = (torch.zeros(2 * tokens, outputs).to(DEVICE) for _ in range(2))
    given = [t.to(DEVICE) for t in (a, *bank, torch.tensor([1, 0]))]
    element.gated_add_element(got, *given)
    element.gated_add_element(counted, *given, popcount_table(bank[1]).to(DEVICE))
    assert torch.equal(counted, got) and got.count_nonzero() == got.numel()


@pytest.mark.parametrize("choice,tokens", [([0, -1, 1], 30), ([1], 90)])
def test_element_rows_past_32_bit_offsets_are_taken_in_parts(poisoned, monkeypatch, choice, tokens):
    whole = normal(len(choice) * tokens, 7, seed=3).to(DEVICE)
    parts, choice = whole.clone(), torch.tensor(choice, device=DEVICE)
    bank = [t.to(DEVICE) for t in (normal(len(whole), WIDTH), *element_bank((0.4, 0.7)))]
    element.gated_add_element(whole, *bank, choice)
    monkeypatch.setattr(element, "LARGEST", 40 * WIDTH)
    element.gated_add_element(parts, *bank, choice)
    assert_within(parts.cpu(), whole.cpu(), whole.cpu(), torch.float32)


@pytest.mark.parametrize("tokens", [4, 40])
def test_a_choice_outside_of_the_bank_adds_nothing(tokens):
    values, columns, bounds = (t.to(DEVICE) for t in neuron_bank((5, 6)))
    y, a = normal(2 * tokens, 7).to(DEVICE), normal(2 * tokens, WIDTH).to(DEVICE)
    before = y.clone()
    gpu.gated_add(y, a, values, columns, bounds, torch.tensor([2, 1000], device=DEVICE))
    assert torch.equal(y, before)


@pytest.mark.parametrize("tokens", [4, 40])
def test_values_that_are_not_finite_stay_in_the_rows_that_chose_them(tokens):
    values, columns, bounds = neuron_bank((5, 6))
    values[5:] = float("inf")
    y, a = normal(3 * tokens, 7).to(DEVICE), normal(3 * tokens, WIDTH).to(DEVICE)
    gpu.gated_add(y, a, *(t.to(DEVICE) for t in (values, columns, bounds, torch.tensor([0, 1, -1]))))
    assert y[:tokens].isfinite().all() and y[2 * tokens :].isfinite().all()
    assert not y[tokens : 2 * tokens].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice,tokens", CHOICES)
def test_known_responses_are_added(choice, tokens, dtype):
    side, before = normal(3, len(choice) * tokens, 9, seed=1, dtype=dtype), normal(len(choice) * tokens, 9, dtype=dtype)
    side[1] = float("nan") if 1 not in choice else side[1]
    y = before.clone().to(DEVICE)
    rows.add_side(y, side.to(DEVICE), torch.tensor(choice, device=DEVICE))
    by_row = torch.tensor(choice).repeat_interleave(tokens)
    expected = torch.where((by_row < 0)[:, None], before, before + side[by_row, torch.arange(len(by_row))])
    assert torch.equal(y.cpu(), expected)
    strided, turned = before.t().clone().t().to(DEVICE), side.to(DEVICE).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    rows.add_side(strided, turned, torch.tensor(choice, device=DEVICE))
    assert torch.equal(strided.cpu(), expected)


@settings(max_examples=15)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=150))
def test_sequences_come_in_the_order_of_their_memories(choice):
    choice = torch.tensor(choice, device=DEVICE)
    key = torch.where((choice < 0) | (choice >= 4), 4, choice)
    assert torch.equal(rows.ordered(choice, 4), key.argsort(stable=True))


def test_equal_launches_give_equal_bits_and_rows_do_not_depend_on_each_other():
    values, columns, bounds = (t.to(DEVICE) for t in neuron_bank((20, 30)))
    a, choice = normal(4, WIDTH).to(DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)
    y, again, alone = (torch.zeros(4, 7, device=DEVICE) for _ in range(3))
    gpu.gated_add(y, a, values, columns, bounds, choice)
    gpu.gated_add(again, a, values, columns, bounds, choice)
    for n in range(4):
        gpu.gated_add(alone[n : n + 1], a[n : n + 1], values, columns, bounds, choice[n : n + 1])
    assert torch.equal(y, again) and torch.equal(y, alone)
