"""gated_linear: F.linear and the chosen response, the kernel against the definition, and what it does not read."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import WIDTH, neuron_bank, normal
from tolerances import DTYPES, assert_within
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from wise_kernels import gated_add_, gated_linear, reference

gpu = pytest.importorskip("wise_kernels.gpu.gated_linear")
op = sys.modules["wise_kernels.gated_linear"]  # the package's name for it is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("a", "weight", "bias", "values", "columns", "bounds", "choice")


def case(sizes, choice, tokens=1, dtype=torch.float32, outputs=7, bias=True, width=WIDTH):
    a, weight = normal(len(choice) * tokens, width, dtype=dtype), normal(outputs, width, seed=5, dtype=dtype) / 8
    given_bias = normal(outputs, seed=6, dtype=dtype) if bias else None
    return a, weight, given_bias, *neuron_bank(sizes, width, outputs, dtype), torch.tensor(choice)


def defined(a, weight, bias, values, columns, bounds, choice):
    y = F.linear(a.double(), weight.double(), None if bias is None else bias.double())
    return reference.gated_add(y, a, reference.dense_neuron(values, columns, bounds, a.shape[1]), choice)


def launched(inputs):
    return gpu.gated_linear(*(t if t is None else t.to(DEVICE) for t in inputs)).cpu()


def check(inputs):
    assert_within(launched(inputs), gated_linear(*inputs), defined(*inputs), inputs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "choice,tokens", [([-1], 1), ([0], 1), ([2, -1, 0, 1], 1), ([-1, -1], 7), ([2, 2, 0], 5), ([0] * 16, 1)]
)
def test_the_kernel_matches_the_definition(poisoned, choice, tokens, dtype):
    check(case((20, 0, 7), choice, tokens, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memories_of_several_steps(poisoned, dtype):
    *_, block_k, _, _ = gpu.TILES["fp32" if dtype == torch.float32 else gpu.family(torch.empty(0, dtype=dtype))]
    width = 2 * block_k + 8
    check(case((width, 3, width - 1), [0, 2, -1, 1], dtype=dtype, outputs=33, width=width))


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data(), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from([1, 31, 65]), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_any_shape(sizes, data, batch, tokens, outputs, dtype, bias):
    choice = data.draw(st.lists(st.integers(-1, len(sizes) - 1), min_size=batch, max_size=batch))
    check(case(sizes, choice, tokens, dtype, outputs, bias))


def test_strides_and_empty_inputs(poisoned):
    a, weight, bias, values, columns, bounds, choice = inputs = case((20, 7), [1, -1, 0])
    expected = launched(inputs)
    spread = [torch.stack([t, t], -1)[..., 0] for t in (a, weight, bias, values, columns)]
    assert not spread[0].is_contiguous()
    assert torch.equal(launched((*spread, bounds, choice)), expected)
    transposed = weight.t().contiguous().t()
    assert torch.equal(launched((a, transposed, bias, values, columns, bounds, choice)), expected)
    strided = torch.stack([choice, choice - 9], -1)[..., 0]
    assert torch.equal(launched((a, weight, bias, values, columns, bounds, strided)), expected)
    assert launched((a[:0], weight, bias, values, columns, bounds, choice)).shape == (0, 7)
    assert_within(launched(case((0, 0), [1, 0])), *2 * (defined(*case((0, 0), [1, 0])),), torch.float32)


def test_values_of_other_memories_are_not_read(poisoned):
    # Their columns point far outside of `a`: a read would fault, or be NaN. So would a product with their values.
    a, weight, bias, values, columns, bounds, _ = case((5, 6, 7), [0])
    values[5:], columns[5:] = float("nan"), 1 << 40
    a = normal(2, WIDTH)
    assert not launched((a, weight, bias, values, columns, bounds, torch.tensor([0, -1]))).isnan().any()
    values[:], columns[:] = float("nan"), 1 << 40
    outside = launched((a, weight, bias, values, columns, bounds, torch.tensor([-1, -1])))
    assert_within(outside, *2 * (F.linear(a.double(), weight.double(), bias.double()),), torch.float32)


def test_a_response_that_is_not_finite_stays_in_its_rows(poisoned):
    a, weight, bias, values, columns, bounds, _ = case((5, 6), [0])
    values[:5] = float("inf")
    y = launched((normal(3, WIDTH), weight, bias, values, columns, bounds, torch.tensor([0, 1, -1])))
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("exact_main", [True, False])
def test_on_the_cpu_it_is_the_two_ops(exact_main):
    a, weight, bias, *bank, choice = case((20, 7), [1, -1, 0], tokens=9)
    expected = F.linear(a, weight, bias)
    gated_add_(expected, a, *bank, choice)
    assert torch.equal(gated_linear(a, weight, bias, *bank, choice, exact_main), expected)
    outside = torch.full_like(choice, -1)
    assert torch.equal(gated_linear(a, weight, bias, *bank, outside, exact_main), F.linear(a, weight, bias))


@pytest.mark.parametrize("exact_main", [True, False])
def test_gradients(exact_main):
    inputs = dict(zip(NAMES, case((5, 6), [0, -1]), strict=True))
    floats = [inputs[name].double().requires_grad_() for name in ("a", "weight", "bias", "values")]

    def call(a, weight, bias, values):
        return gated_linear(a, weight, bias, values, *(inputs[n] for n in NAMES[4:]), exact_main)

    assert torch.autograd.gradcheck(call, floats)


def test_opcheck_and_compile():
    inputs = case((5, 6), [0, -1, 1])
    opcheck(torch.ops.wise.gated_linear.default, inputs)
    compiled = torch.compile(gated_linear, fullgraph=True, backend="aot_eager")
    for choice in (inputs[-1], torch.tensor([-1, -1, -1])):
        given_inputs = (*inputs[:-1], choice)
        for exact_main in (True, False):
            assert torch.equal(compiled(*given_inputs, exact_main), gated_linear(*given_inputs))


@pytest.mark.parametrize(
    "fused,change",
    [
        (True, {}),
        (False, {"exact_main": True}),
        (False, {"rows": 17}),
        (False, {"dtype": torch.float64}),
        (False, {"memories": 0}),
        (False, {"gradient": True}),
    ],
)
def test_when_a_device_takes_one_launch(monkeypatch, fused, change):
    """On fake tensors, which need no device, and nothing is computed."""
    monkeypatch.setattr(op, "_gated_linear", lambda *given: "two")
    monkeypatch.setattr(op, "_gated_linear_op", lambda *given: "one")
    given = {"exact_main": False, "rows": 16, "dtype": torch.bfloat16, "memories": 2, "gradient": False} | change
    kind = {"device": "cuda", "dtype": given["dtype"]}
    with FakeTensorMode():
        a, weight = torch.empty(given["rows"], WIDTH, **kind), torch.empty(7, WIDTH, **kind)
        values, columns = torch.empty(9, 7, **kind), torch.empty(9, device="cuda", dtype=torch.int64)
        bounds, choice = (torch.empty(n, device="cuda", dtype=torch.int64) for n in (given["memories"] + 1, 1))
        a.requires_grad_(given["gradient"])
        found = gated_linear(a, weight, None, values, columns, bounds, choice, given["exact_main"])
    assert found == ("one" if fused else "two")


def test_the_launch_refuses_more_rows_than_it_has():
    with pytest.raises(ValueError, match="17 rows"):
        launched(case((5, 6), [0] * 17))


@pytest.mark.parametrize(
    "message,change",
    {
        "weight must be": {"weight": torch.zeros(7, WIDTH + 1)},
        "weight has 8 outputs": {"weight": torch.zeros(8, WIDTH)},
        "bias must be": {"bias": torch.zeros(8)},
        "choice must be int64": {"choice": torch.tensor([0.0, 0.0])},
        "not divide": {"choice": torch.tensor([0, 0, 0])},
        "choice names memory 2": {"choice": torch.tensor([0, 2])},
        "from 0 to at most the 11 rows": {"bounds": torch.tensor([0, 5, 12])},
        "bounds must be contiguous": {"bounds": torch.tensor([[0, 9], [5, 9], [11, 9]])[:, 0]},
    }.items(),
)
def test_errors(message, change):
    with pytest.raises(ValueError, match=message):
        gated_linear(**(dict(zip(NAMES, case((5, 6), [0, -1]), strict=True)) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 16, 17])
def test_real_shapes_on_a_device(device, rows, dtype):
    choice = [0] if rows < 8 else [n % 4 - 1 for n in range(rows)]
    inputs = case((2202, 300, 0), choice, dtype=dtype, outputs=4096, width=11008)
    inputs = (inputs[0], inputs[1] / 16, *inputs[2:3], inputs[3] / 32, *inputs[4:])
    moved = [t.to(device) for t in inputs]
    got = gated_linear(*moved, exact_main=False)
    assert_within(
        got, gated_linear(*moved), gated_linear(*(t.double() if t.is_floating_point() else t for t in moved)), dtype
    )
