"""masked_update_ in both layouts against the definition and against torch.optim on a dense masked parameter."""

import pytest
import torch
from kernel_banks import OUTPUTS, WIDTH, generator, normal
from tolerances import DTYPES, assert_fp32, assert_within
from torch.library import opcheck

from wise_kernels import masked_update_, masked_update_element_, pack_bits, reference

COLUMNS = torch.randperm(WIDTH, generator=generator(4))[:13].sort().values
SCATTERED = torch.rand(OUTPUTS, WIDTH, generator=generator(5)) < 0.3
STATE = ("exp_avg", "exp_avg_sq")
HYPER = [
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
    {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.3, "clamp": 0.5},
    {"optimizer": "adam", "lr": 0.02},
    {"optimizer": "adam", "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2, "clamp": 0.6},
]


class Neuron:
    mask = torch.zeros(OUTPUTS, WIDTH, dtype=torch.bool).index_fill(1, COLUMNS, True)

    def pack(dense):
        return dense[:, COLUMNS].t().contiguous()

    def update(values, a, dy, *state, **hyper):
        masked_update_(values, a[:, COLUMNS], dy, *state, **hyper)


class Element:
    mask = SCATTERED

    def pack(dense):
        return dense[SCATTERED]

    def update(values, a, dy, *state, **hyper):
        masked_update_element_(values, pack_bits(SCATTERED), a, dy, *state, **hyper)


LAYOUTS = pytest.mark.parametrize("layout", [Neuron, Element])


def state_for(values):
    return torch.zeros(values.shape), torch.zeros(values.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hyper", HYPER)
@LAYOUTS
def test_matches_the_definition(layout, hyper, dtype):
    dense = 0.5 * normal(OUTPUTS, WIDTH) * layout.mask
    full = {"momentum": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clamp": None} | hyper
    values = layout.pack(dense.to(dtype))
    exp_avg, exp_avg_sq = state_for(values)
    dense = dense.to(dtype).float()
    state = {"m": torch.zeros_like(dense), "v": torch.zeros_like(dense)}
    for step, tokens in enumerate((7, 0, 63), start=1):
        a, dy = normal(tokens, WIDTH, seed=step, dtype=dtype), normal(tokens, OUTPUTS, seed=9 + step, dtype=dtype)
        layout.update(values, a, dy, exp_avg, exp_avg_sq, step=step, **hyper)
        dense = reference.masked_update(dense, layout.mask, a, dy, state, step=step, **full).to(dtype).float()
    assert values.dtype == dtype
    assert_within(values, layout.pack(dense).to(dtype), layout.pack(dense), dtype)
    if hyper["optimizer"] == "adam":
        assert_fp32(exp_avg, layout.pack(state["m"]))
        assert_fp32(exp_avg_sq, layout.pack(state["v"]))


@pytest.mark.parametrize(
    "ours,make",
    [
        (HYPER[0], lambda p: torch.optim.SGD(p, lr=0.1)),
        (HYPER[1], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ({"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.3}, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3)),
        (HYPER[3], lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0)),
        (
            {"optimizer": "adam", "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2},
            lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.2),
        ),
    ],
)
@LAYOUTS
def test_matches_torch_optim_on_a_dense_masked_parameter(layout, ours, make):
    dense = (normal(OUTPUTS, WIDTH) * layout.mask).requires_grad_()
    values, optimizer = layout.pack(dense.detach()), make([dense])
    state = state_for(values)
    for step in range(1, 6):
        a, dy = normal(9, WIDTH, seed=step), normal(9, OUTPUTS, seed=20 + step)
        dense.grad = (dy.t() @ a) * layout.mask
        optimizer.step()
        layout.update(values, a, dy, *state, step=step, **ours)
    torch.testing.assert_close(values, layout.pack(dense.detach()), rtol=1e-5, atol=1e-6)
    assert not dense.detach()[~layout.mask].any()


def test_blocks_of_output_rows_give_the_same_step(monkeypatch):
    a, dy, expected = normal(9, WIDTH), normal(9, OUTPUTS, seed=1), Element.pack(normal(OUTPUTS, WIDTH, seed=2))
    got = expected.clone()
    Element.update(expected, a, dy, lr=0.1)
    monkeypatch.setattr("wise_kernels.masked_update.BLOCK_ENTRIES", 2 * WIDTH)
    Element.update(got, a, dy, lr=0.1)
    assert_fp32(got, expected)


@pytest.mark.parametrize("hyper", [HYPER[1], HYPER[4]])
@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_the_copy_is_the_new_values_in_its_own_dtype(layout, dtype, hyper):
    a, dy = normal(9, WIDTH), normal(9, OUTPUTS, seed=1)
    values = layout.pack(normal(OUTPUTS, WIDTH, seed=2))
    alone, copy = values.clone(), torch.full(values.shape, float("nan"), dtype=dtype)
    layout.update(alone, a, dy, *state_for(values), **hyper)
    layout.update(values, a, dy, *state_for(values), copy=copy, **hyper)
    assert torch.equal(values, alone) and torch.equal(copy, values.to(dtype))


def test_adam_steps_strided_memories_as_contiguous_ones():
    # Contiguous tensors go through torch's fused kernel, others through its operations one by one.
    a, dy, values = normal(9, 13), normal(9, OUTPUTS, seed=1), normal(13, OUTPUTS, seed=2)
    strided = values.t().contiguous().t()
    state, strided_state = state_for(values), state_for(values)
    for step in (1, 2, 3):
        masked_update_(values, a, dy, *state, step=step, **HYPER[4])
        masked_update_(strided, a, dy, *strided_state, step=step, **HYPER[4])
    for got, expected in zip((strided, *strided_state), (values, *state), strict=True):
        assert_fp32(got, expected)


def test_strided_inputs():
    values, a, dy = normal(13, OUTPUTS), normal(2 * WIDTH, 9).t()[:, ::2], normal(OUTPUTS, 9, seed=1).t()
    expected = values - 0.1 * (a[:, COLUMNS].t() @ dy)
    strided = values.t().contiguous().t()
    masked_update_(strided, a[:, COLUMNS], dy, lr=0.1)
    assert_fp32(strided, expected)


@pytest.mark.parametrize("hyper", [HYPER[1], HYPER[4]])
@LAYOUTS
def test_opcheck_and_compile(layout, hyper):
    a, dy, start = normal(9, WIDTH), normal(9, OUTPUTS, seed=1), layout.pack(normal(OUTPUTS, WIDTH, seed=2))
    numbers = (0.1, 2, hyper["optimizer"], 0.9, 0.9, 0.99, 1e-8, 0.1, 0.5)
    if layout is Neuron:
        arguments = (start.clone(), a[:, COLUMNS], dy, *state_for(start), start.bfloat16(), *numbers)
        opcheck(torch.ops.wise.masked_update_.default, arguments)
    else:
        arguments = (start.clone(), pack_bits(SCATTERED), a, dy, *state_for(start), start.bfloat16(), *numbers)
        opcheck(torch.ops.wise.masked_update_element_.default, arguments)

    bits = pack_bits(SCATTERED)

    def step(values, a, dy, exp_avg, exp_avg_sq):
        if layout is Neuron:
            masked_update_(values, a[:, COLUMNS], dy, exp_avg, exp_avg_sq, **hyper)
        else:
            masked_update_element_(values, bits, a, dy, exp_avg, exp_avg_sq, **hyper)

    expected, got = (start.clone(), *state_for(start)), (start.clone(), *state_for(start))
    step(expected[0], a, dy, *expected[1:])
    torch.compile(step, fullgraph=True, backend="aot_eager")(got[0], a, dy, *got[1:])
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
    assert not torch.equal(got[0], start)


def test_errors_leave_the_memory_as_it_was():
    values, a, dy = normal(13, OUTPUTS), normal(9, 13), normal(9, OUTPUTS)
    before = values.clone()
    cases = {
        "optimizer must be": {"optimizer": "lion"},
        "adam needs exp_avg": {"optimizer": "adam"},
        "sgd needs exp_avg": {"momentum": 0.9},
        "must be fp32": {"exp_avg": torch.zeros(13, OUTPUTS, dtype=torch.float16)},
        "step counts from 1": {"step": 0},
        "must not be negative": {"clamp": -1.0},
        "betas must be": {"betas": (0.9, 1.0)},
        "copy must be": {"copy": torch.zeros(13, OUTPUTS + 1)},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            masked_update_(values, a, dy, **({"lr": 0.1} | change))
    with pytest.raises(ValueError, match="features"):
        masked_update_(values, a[:, :12], dy, lr=0.1)
    with pytest.raises(ValueError, match="bits must be"):
        masked_update_element_(values[0], pack_bits(SCATTERED)[:2], normal(9, WIDTH), dy, lr=0.1)
    packed = normal(int(SCATTERED.sum()) + 3)
    with pytest.raises(ValueError, match="weights in the mask"):
        masked_update_element_(packed, pack_bits(SCATTERED), normal(9, WIDTH), dy, lr=0.1)
    assert torch.equal(values, before) and torch.equal(packed, normal(len(packed)))
