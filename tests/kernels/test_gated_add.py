"""gated_add_ in both layouts: the definition, rows out of scope bit for bit, gradients, no work out of scope."""

import pytest
import torch
from kernel_banks import OUTPUTS, WIDTH, element_bank, neuron_bank, normal
from tolerances import DTYPES, assert_within
from torch.library import opcheck

from wise_kernels import gated_add_, gated_add_element_, reference, side_forward, side_forward_element
from wise_kernels.gated_add import _add_chosen

LAYOUTS = {
    "neuron": (gated_add_, side_forward, neuron_bank, reference.dense_neuron, (20, 0, 7)),
    "element": (gated_add_element_, side_forward_element, element_bank, reference.dense_element, (0.5, 0.0, 1.0)),
}


@pytest.mark.parametrize("with_side", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", [[-1], [0], [2, -1, 0, 1], [-1, -1], [2, 2, 0]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_definition(layout, choice, dtype, with_side):
    add, side_of, make, dense_of, sizes = LAYOUTS[layout]
    bank, tokens = make(sizes, dtype=dtype), 7
    a = normal(len(choice) * tokens, WIDTH, dtype=dtype)
    before, choice = normal(len(a), OUTPUTS, seed=3, dtype=dtype), torch.tensor(choice)
    y, dense = before.clone(), dense_of(*bank, WIDTH)
    add(y, a, *bank, choice, side=side_of(a, *bank)[0] if with_side else None)
    outside = (choice == -1).repeat_interleave(tokens)
    assert torch.equal(y[outside].view(torch.uint8), before[outside].view(torch.uint8))
    plain = (
        before
        + torch.stack([a @ dense[max(j, 0)].to(dtype).t() for j in choice])[
            torch.arange(len(choice)).repeat_interleave(tokens), torch.arange(len(a))
        ]
    )
    plain = torch.where(outside[:, None], before, plain)
    assert_within(y, plain, reference.gated_add(before, a, dense, choice), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_output_and_empty_inputs(layout):
    add, _, make, dense_of, sizes = LAYOUTS[layout]
    bank, choice = make(sizes), torch.tensor([2, -1])
    before, a = normal(OUTPUTS, 10).t(), normal(2 * WIDTH, 10).t()[:, ::2]
    y = before.clone(memory_format=torch.preserve_format)
    add(y, a, *bank, choice)
    expected = reference.gated_add(before, a, dense_of(*bank, WIDTH), choice)
    assert_within(y, expected, expected, torch.float32)
    add(y[:0], a[:0], *bank, choice)
    add(y[:0], a[:0], *bank, choice[:0])
    kept = y.clone()
    add(y, a, *make(()), torch.tensor([-1, -1]))
    assert torch.equal(y, kept)


def test_memories_out_of_scope_are_not_read():
    values, columns, bounds = neuron_bank((5, 6))
    values[5:] = float("nan")
    y = normal(4, OUTPUTS)
    gated_add_(y, normal(4, WIDTH), values, columns, bounds, torch.tensor([0, -1]))
    assert not y.isnan().any()


def test_the_sync_free_form_keeps_bits_too():
    side = normal(2, 6, OUTPUTS, seed=4)
    before = normal(6, OUTPUTS)
    before[0] = -0.0
    y = before.clone()
    _add_chosen(y, torch.tensor([-1, 0, 1]), side)
    assert torch.equal(y[:2].view(torch.int32), before[:2].view(torch.int32))
    assert torch.equal(y[2:4], before[2:4] + side[0, 2:4]) and torch.equal(y[4:], before[4:] + side[1, 4:])


@pytest.mark.parametrize("with_side", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_flow_where_they_are_wanted(layout, with_side):
    add, side_of, make, dense_of, sizes = LAYOUTS[layout]
    values, where, bounds = make(sizes)
    a, base, choice = (
        normal(6, WIDTH).requires_grad_(),
        normal(6, OUTPUTS, seed=2).requires_grad_(),
        torch.tensor([2, -1]),
    )
    values.requires_grad_()
    y = base * 1.0
    add(y, a, values, where, bounds, choice, side_of(a, values, where, bounds)[0] if with_side else None)
    weights = normal(6, OUTPUTS, seed=5)
    got = torch.autograd.grad((y * weights).sum(), (a, base, values))
    response = a[:3] @ dense_of(values, where, bounds, WIDTH)[2].t()
    expected = torch.autograd.grad((response * weights[:3]).sum() + (base * weights).sum(), (a, base, values))
    for g, e in zip(got, expected, strict=True):
        assert_within(g, e, e, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(layout):
    add, side_of, make, _, sizes = LAYOUTS[layout]
    bank, choice = make(sizes), torch.tensor([2, -1])
    a, before = normal(6, WIDTH), normal(6, OUTPUTS, seed=2)
    op = torch.ops.wise.gated_add_.default if layout == "neuron" else torch.ops.wise.gated_add_element_.default
    opcheck(op, (before.clone(), a, *bank, choice, side_of(a, *bank)[0]))
    opcheck(op, (before.clone(), a, *bank, choice, None))

    def step(x, a, choice):
        y = x * 2
        add(y, a, *bank, choice)
        return y + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for gate in (choice, torch.tensor([-1, -1]), torch.tensor([0, 2])):
        assert torch.equal(compiled(before, a, gate), step(before, a, gate))


def test_errors_leave_the_output_as_it_was():
    bank = neuron_bank((5, 6))
    y, a = normal(6, OUTPUTS), normal(6, WIDTH)
    before = y.clone()
    cases = {
        "not divide": {"choice": torch.tensor([0, 0, 0, 0])},
        "choice must be int64": {"choice": torch.tensor([0.0, 0.0])},
        "choice names memory 2": {"choice": torch.tensor([0, 2])},
        "pass None": {"side": torch.zeros(2, 0, OUTPUTS)},
        "from 0 to at most the 11 rows": {"bounds": torch.tensor([0, 5, 12])},
    }
    arguments = dict(zip(("values", "columns", "bounds"), bank, strict=True)) | {"choice": torch.tensor([0, 1])}
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            gated_add_(y, a, **(arguments | change))
    with pytest.raises(ValueError, match="y must be"):
        gated_add_(y.half(), a, *bank, torch.tensor([0, 1]))
    assert torch.equal(y, before)
