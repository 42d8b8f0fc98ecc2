"""dual_forward and side_forward in both layouts against the fp32 definition, with gradients and autocast."""

import pytest
import torch
import torch.nn.functional as F
from kernel_banks import ELEMENT_DENSITIES, NEURON_SIZES, OUTPUTS, WIDTH, element_bank, neuron_bank, normal
from tolerances import DTYPES, assert_within
from torch.library import opcheck

from wise_kernels import (
    dual_forward,
    dual_forward_element,
    popcount_table,
    reference,
    side_forward,
    side_forward_element,
)

LAYOUTS = {
    "neuron": (dual_forward, side_forward, neuron_bank, reference.dense_neuron),
    "element": (dual_forward_element, side_forward_element, element_bank, reference.dense_element),
}
BANKS = [("neuron", sizes) for sizes in NEURON_SIZES] + [("element", d) for d in ELEMENT_DENSITIES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 100])
@pytest.mark.parametrize("layout,sizes", BANKS)
def test_matches_the_definition(layout, sizes, tokens, dtype):
    dual, side_only, make, dense_of = LAYOUTS[layout]
    bank = make(sizes, dtype=dtype)
    a, weight, bias = normal(tokens, WIDTH, dtype=dtype), normal(OUTPUTS, WIDTH, seed=5, dtype=dtype), None
    dense = dense_of(*bank, WIDTH)
    y_ref, side_ref, norms_ref = reference.dual_forward(a, weight, bias, dense)
    y, side, norms = dual(a, weight, bias, *bank)
    assert torch.equal(y, F.linear(a, weight))
    assert side.dtype == dtype and norms.dtype == torch.float32
    plain = torch.stack([F.linear(a, d) for d in dense.to(dtype)]) if len(sizes) else side
    assert_within(side, plain, side_ref, dtype)
    assert_within(norms, plain.float().norm(dim=-1), norms_ref, dtype)
    assert_within(y, F.linear(a, weight), y_ref, dtype)
    for other_side, other_norms in (side_only(a, *bank), dual(a, weight, bias, *bank, response=False)[1:]):
        assert torch.equal(other_norms, norms)
        assert other_side.shape in (side.shape, (len(sizes), 0, OUTPUTS))
    assert side_only(a, *bank, response=False)[0].shape == (len(sizes), 0, OUTPUTS)


@pytest.mark.parametrize("layout,sizes", [("neuron", (20, 0, 7)), ("element", (0.5, 0.0, 1.0))])
def test_strided_activations_and_transposed_weight(layout, sizes):
    dual, _, make, dense_of = LAYOUTS[layout]
    bank = make(sizes)
    a, weight, bias = normal(2 * WIDTH, 14).t()[::2, ::2], normal(WIDTH, OUTPUTS, seed=5).t(), normal(OUTPUTS, seed=6)
    assert not a.is_contiguous() and not weight.is_contiguous()
    y, side, norms = dual(a, weight, bias, *bank)
    _, side_ref, norms_ref = reference.dual_forward(a, weight, bias, dense_of(*bank, WIDTH))
    assert torch.equal(y, F.linear(a, weight, bias))
    assert_within(side, side_ref, side_ref, torch.float32)
    assert_within(norms, norms_ref, norms_ref, torch.float32)


@pytest.mark.parametrize("response", [True, False])
@pytest.mark.parametrize("layout,sizes", [("neuron", (20, 0, 7)), ("element", (0.5, 0.0, 1.0))])
def test_gradients_match_autograd_through_the_dense_form(layout, sizes, response):
    dual, side_only, make, dense_of = LAYOUTS[layout]
    values, where, bounds = make(sizes)
    leaves = [t.requires_grad_() for t in (normal(9, WIDTH), normal(OUTPUTS, WIDTH, seed=5), normal(OUTPUTS), values)]
    a, weight, bias, values = leaves
    dense = dense_of(values, where, bounds, WIDTH)
    live = [j for j in range(3) if bounds[j] < bounds[j + 1]]

    def loss(y, side, norms):
        weights = normal(*norms.shape, seed=8)
        total = (y * normal(*y.shape, seed=7)).sum() + (norms * weights)[live].sum()
        return total + (side * normal(*side.shape, seed=9)).sum() if response else total

    y, side = F.linear(a, weight, bias), torch.stack([a @ d.t() for d in dense])
    norms = torch.stack([(s.square().sum(-1) + (j not in live)).sqrt() for j, s in enumerate(side)])
    expected = torch.autograd.grad(loss(y, side, norms), leaves)
    got = torch.autograd.grad(loss(*dual(a, weight, bias, values, where, bounds, response)), leaves)
    for g, e in zip(got, expected, strict=True):
        assert_within(g, e, e, torch.float32)
    split = torch.autograd.grad(loss(F.linear(a, weight, bias), *side_only(a, values, where, bounds, response)), leaves)
    for g, e in zip(split, expected, strict=True):
        assert_within(g, e, e, torch.float32)


@pytest.mark.parametrize("layout,sizes", [("neuron", (20, 7)), ("element", (0.5, 0.2))])
def test_opcheck_and_compile(layout, sizes):
    dual, side_only, make, _ = LAYOUTS[layout]
    values, where, bounds = make(sizes)
    a, weight, bias = normal(5, WIDTH), normal(OUTPUTS, WIDTH, seed=5), normal(OUTPUTS)
    suffix = "" if layout == "neuron" else "_element"
    grads = [t.clone().requires_grad_() for t in (a, weight, values)]
    op = getattr(torch.ops.wise, "dual_forward" + suffix).default
    opcheck(op, (grads[0], grads[1], bias, grads[2], where, bounds, True))
    opcheck(
        getattr(torch.ops.wise, "side_forward" + suffix).default,
        (a.t().contiguous().t(), values, where, bounds, False),
    )

    def step(a, weight, bias, values):
        return *dual(a, weight, bias, values, where, bounds), *side_only(a, values, where, bounds)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(a, weight, bias, values), step(a, weight, bias, values), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout,sizes", [("neuron", (20, 0, 7)), ("element", (0.5, 0.0, 1.0))])
@pytest.mark.parametrize("response", [True, False])
def test_the_backward_is_an_op_too(layout, sizes, response):
    _, side_only, make, _ = LAYOUTS[layout]
    bank, a = make(sizes), normal(5, WIDTH)
    side, norms = side_only(a, *bank, response=response)
    op = getattr(torch.ops.wise, "side_backward" + ("" if layout == "neuron" else "_element")).default
    opcheck(op, (torch.ones_like(side), torch.ones_like(norms), a, *bank, side, norms, response))


@pytest.mark.parametrize("layout,sizes", [("neuron", (20, 0, 7)), ("element", (0.5, 0.0, 1.0))])
def test_double_precision(layout, sizes):
    dual, _, make, dense_of = LAYOUTS[layout]
    bank = make(sizes, dtype=torch.float64)
    a = normal(5, WIDTH, dtype=torch.float64)
    y, side, norms = dual(a, normal(OUTPUTS, WIDTH, dtype=torch.float64), None, *bank)
    assert y.dtype == side.dtype == torch.float64 and norms.dtype == torch.float32
    expected = torch.stack([a @ d.double().t() for d in dense_of(*bank, WIDTH)])
    torch.testing.assert_close(side, expected, rtol=1e-5, atol=1e-5)  # the definition rounds D to fp32


def test_options_for_devices_change_nothing_on_cpu():
    a, weight = normal(4, WIDTH).requires_grad_(), normal(OUTPUTS, WIDTH, seed=5)
    bank = neuron_bank((5, 3))
    for one, two in zip(dual_forward(a, weight, None, *bank), dual_forward(a, weight, None, *bank, exact_main=False)):
        assert torch.equal(one, two)
    torch.autograd.grad(dual_forward(a, weight, None, *bank, exact_main=False)[2].sum(), a)
    bank = element_bank((0.5, 0.2))
    table = popcount_table(bank[1])
    assert table.shape == (2, OUTPUTS, 1) and int(table[1, 0, 0]) == 0
    for op, given in ((dual_forward_element, (a, weight, None, *bank)), (side_forward_element, (a, *bank))):
        for one, two in zip(op(*given), op(*given, popcounts=table), strict=True):
            assert torch.equal(one, two)
        torch.autograd.grad(op(*given, popcounts=table)[-1].sum(), a)


def test_autocast_gives_the_dtype_that_linear_gives():
    values, columns, bounds = neuron_bank((5,))
    a, weight = normal(4, WIDTH), normal(OUTPUTS, WIDTH, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, side, norms = dual_forward(a, weight, None, values, columns, bounds)
        assert torch.equal(y, F.linear(a, weight))
    assert y.dtype == side.dtype == torch.bfloat16 and norms.dtype == torch.float32


@pytest.mark.parametrize(
    "change,message",
    [
        ({"a": torch.zeros(2, 3, WIDTH)}, "flatten batch and time"),
        ({"weight": torch.zeros(WIDTH, OUTPUTS)}, "Conv1D"),
        ({"weight": torch.zeros(OUTPUTS + 1, WIDTH)}, "outputs"),
        ({"bias": torch.zeros(1)}, "bias must be"),
        ({"values": torch.zeros(5, OUTPUTS, dtype=torch.float16)}, "values must be"),
        ({"columns": torch.zeros(5)}, "columns must be int64"),
        ({"bounds": torch.tensor([0, 6])}, "from 0 to at most the 5 rows"),
        ({"bounds": torch.tensor([1, 5])}, "from 0 to at most the 5 rows"),
        ({"bounds": torch.tensor([0, 6, 5])}, "must not decrease"),
        ({"bounds": torch.tensor([0, 5], dtype=torch.int32)}, "bounds must be int64"),
        ({"bounds": torch.tensor([0, 5], device="meta")}, "on cpu like the bank"),
        ({"bounds": torch.zeros(0, dtype=torch.int64)}, "bounds must be int64"),
        ({"bounds": [0, 5]}, "must be a tensor"),
    ],
)
def test_errors(change, message):
    values, columns, bounds = neuron_bank((5,))
    arguments = {"a": normal(2, WIDTH), "weight": normal(OUTPUTS, WIDTH), "bias": None, "values": values}
    arguments |= {"columns": columns, "bounds": bounds} | change
    with pytest.raises(ValueError, match=message):
        dual_forward(**arguments)


def test_errors_of_the_element_layout():
    values, bits, bounds = element_bank((0.2,))
    with pytest.raises(ValueError, match="bits must be int32"):
        side_forward_element(normal(2, WIDTH + 32), values, bits, bounds)
