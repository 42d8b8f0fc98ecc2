"""The Triton kernels of masked_update_ against the definition: on a device where there is one, else interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import generator, normal
from tolerances import DTYPES, assert_fp32, assert_within

from wise_kernels import masked_update_, masked_update_element_, pack_bits, reference

triton = pytest.importorskip("triton")

from wise_kernels.gpu import masked_update as neuron  # noqa: E402
from wise_kernels.gpu import masked_update_element as element  # noqa: E402
from wise_kernels.gpu import update_tile  # noqa: E402

DEFAULTS = dict(step=1, optimizer="sgd", momentum=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clamp=None)
SGD = {"lr": 0.1}
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
ADAM = {"lr": 0.02, "optimizer": "adam"}
# A smaller eps turns rounding of a gradient near zero into far more of the values than the tolerance is.
ADAM_ALL = ADAM | {"lr": 0.05, "beta1": 0.3, "beta2": 0.95, "eps": 1e-2, "weight_decay": 0.2, "clamp": 0.6}
HYPER = pytest.mark.parametrize("hyper", [SGD, MOMENTUM, ADAM, ADAM_ALL], ids=["sgd", "momentum", "adam", "adam_all"])


@pytest.fixture(autouse=True, params=["shipped", "small"])
def tiles(request, monkeypatch):
    """The shipped tiles, which hold a whole test memory, and small ones, so that it has many and ragged ones."""
    if request.param == "small":
        monkeypatch.setattr(neuron, "CONFIGS", dict.fromkeys(neuron.CONFIGS, (16, 32, 16, 2, 4, 1)))
        monkeypatch.setattr(element, "CONFIGS", dict.fromkeys(element.CONFIGS, (16, 64, 16, 2, 4, 1)))
        monkeypatch.setattr(element, "BLOCK_W", 2)
        monkeypatch.setattr(element, "BLOCK_STEP", 64)


@pytest.fixture
def poisoned(monkeypatch):
    empty = torch.empty

    def poison(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poison)


def columns_mask(inputs, outputs, density, seed=0):
    columns = (torch.rand(inputs, generator=generator(seed)) < density).nonzero()[:, 0]
    return columns, torch.zeros(outputs, inputs, dtype=torch.bool).index_fill(1, columns, True)


def definition(dense, mask, a, dy, state, hyper):
    hyper = DEFAULTS | hyper
    betas = (hyper.pop("beta1"), hyper.pop("beta2"))
    return reference.masked_update(dense.float(), mask, a, dy, state, betas=betas, **hyper)


def launch(layout, values, places, a, dy, state, copy, hyper, device):
    """The launcher on copies of the arguments on the device; returns values, moments and copy, back on the CPU."""
    hyper = DEFAULTS | hyper
    order = ("lr", "step", "optimizer", "momentum", "beta1", "beta2", "eps", "weight_decay", "clamp")
    changed = [t if t is None else t.to(device) for t in (values, *state, copy)]
    a, dy = a.to(device), dy.to(device)
    if layout == "neuron":
        neuron.masked_update(changed[0], a[:, places.to(device)], dy, *changed[1:], *(hyper[n] for n in order))
    else:
        bits = places.to(device)
        element.masked_update_element(changed[0], bits, a, dy, *changed[1:], *(hyper[n] for n in order))
    return [t if t is None else t.cpu() for t in changed]


def check(layout, tokens, inputs, outputs, density, hyper, device, dtype=torch.float32, inputs_dtype=None, steps=2):
    inputs_dtype = inputs_dtype or dtype
    if layout == "neuron":
        places, mask = columns_mask(inputs, outputs, density)
        pack = lambda dense: dense[:, places].t().contiguous()  # noqa: E731
    else:
        mask = torch.rand(outputs, inputs, generator=generator(3)) < density
        places, pack = pack_bits(mask), lambda dense: dense[mask]
    dense = (0.5 * normal(outputs, inputs) * mask).to(dtype)
    values, copy = pack(dense), torch.full(pack(dense).shape, float("nan"), dtype=torch.bfloat16)
    exp_avg, exp_avg_sq = torch.zeros(values.shape), torch.zeros(values.shape)
    state = {"m": torch.zeros_like(dense, dtype=torch.float32), "v": torch.zeros_like(dense, dtype=torch.float32)}
    expected = dense.float()
    for step in range(1, steps + 1):
        a = normal(tokens, inputs, seed=step, dtype=inputs_dtype)
        dy = normal(tokens, outputs, seed=9 + step, dtype=inputs_dtype)
        numbers = hyper | {"step": step}
        values, exp_avg, exp_avg_sq, copy = launch(
            layout, values, places, a, dy, (exp_avg, exp_avg_sq), copy, numbers, device
        )
        expected = definition(expected, mask, a, dy, state, numbers).to(dtype).float()
    assert_within(values, pack(expected).to(dtype), pack(expected), dtype)
    assert_within(copy, pack(expected).bfloat16(), pack(expected), torch.bfloat16)
    if hyper.get("optimizer") == "adam":
        assert_fp32(exp_avg, pack(state["m"]))
        assert_fp32(exp_avg_sq, pack(state["v"]))


LAYOUTS = pytest.mark.parametrize("layout", ["neuron", "element"])


@HYPER
@LAYOUTS
def test_matches_the_definition(layout, hyper, device, poisoned):
    check(layout, 7, 63, 33, 0.4, hyper, device)


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_dtypes(layout, dtype, device, poisoned):
    check(layout, 33, 65, 17, 0.5, ADAM_ALL, device, dtype, steps=1)
    check(layout, 9, 65, 17, 0.5, ADAM, device, torch.float32, inputs_dtype=dtype, steps=1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 7, 3), (1, 100, 1), (17, 1, 63), (3, 32, 16), (100, 31, 15)])
@LAYOUTS
def test_ragged_shapes(layout, shape, device, poisoned):
    check(layout, *shape, 0.6, ADAM_ALL, device, steps=1)


@pytest.mark.parametrize("density", [0.0, 1.0])
@LAYOUTS
def test_empty_and_full_masks(layout, density, device):
    check(layout, 5, 40, 9, density, MOMENTUM, device)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["neuron", "element"]),
    st.integers(0, 40),
    st.integers(1, 70),
    st.integers(1, 35),
    st.floats(0, 1),
    st.sampled_from([SGD, ADAM_ALL]),
)
def test_any_shape_and_mask(layout, tokens, inputs, outputs, density, hyper):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(layout, tokens, inputs, outputs, density, hyper, device, steps=1)


def test_a_row_of_many_words(device, poisoned):
    mask = torch.rand(3, 32 * 5 + 7, generator=generator(1)) < 0.3
    starts, row_start = element.word_starts(pack_bits(mask).to(device))
    counts = torch.stack(
        [m.sum(-1) for m in torch.nn.functional.pad(mask, (0, 25)).unflatten(1, (-1, 32)).unbind(1)], 1
    )
    assert torch.equal(starts.cpu().long(), counts.cumsum(1) - counts)
    assert row_start.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]


def test_strided_inputs_and_memories(device):
    a, dy = normal(40, 9).t()[:, ::2].to(device), normal(7, 9, seed=1).t().to(device)
    values = normal(20, 7, seed=2).to(device)
    strided, moments = values.t().contiguous().t(), [torch.zeros(7, 20, device=device).t() for _ in range(2)]
    copy = torch.zeros(7, 20, dtype=torch.bfloat16, device=device).t()
    expected, state = values.clone(), [torch.zeros(20, 7, device=device) for _ in range(2)]
    hyper = (0.02, 1, "adam", 0.0, 0.9, 0.99, 1e-8, 0.1, 0.5)
    neuron.masked_update(expected, a.contiguous(), dy.contiguous(), *state, None, *hyper)
    neuron.masked_update(strided, a, dy, *moments, copy, *hyper)
    for got, want in zip((strided, *moments, copy), (expected, *state, expected.bfloat16()), strict=True):
        assert torch.equal(got, want)
    mask = torch.rand(7, 20, generator=generator(1)) < 0.5
    wide = torch.zeros(7, 3, dtype=torch.int32, device=device)
    wide[:, 1:2] = pack_bits(mask).to(device)
    packed, expected = normal(int(mask.sum())).to(device), normal(2 * int(mask.sum())).to(device)
    every_other = expected[::2]
    every_other.copy_(packed)
    element.masked_update_element(
        packed, pack_bits(mask).to(device), a, dy, None, None, None, 0.1, 1, "sgd", *hyper[3:]
    )
    element.masked_update_element(every_other, wide[:, 1:2], a, dy, None, None, None, 0.1, 1, "sgd", *hyper[3:])
    assert torch.equal(every_other, packed)


def test_bits_and_values_that_disagree_write_nowhere_else(device):
    mask = torch.ones(4, 40, dtype=torch.bool)
    memory = torch.ones(300, device=device)
    a, dy = normal(5, 40).to(device), normal(5, 4, seed=1).to(device)
    hyper = (0.1, 1, "sgd", 0.0, 0.9, 0.99, 1e-8, 0.0, None)
    for count in (100, 250):
        memory.fill_(1.0)
        element.masked_update_element(memory[:count], pack_bits(mask).to(device), a, dy, None, None, None, *hyper)
        stepped = min(count, 160)
        assert (memory[:stepped] != 1).all() and (memory[stepped:] == 1).all()


def test_nan_gradients_reach_the_values_and_stay_in_their_columns(device):
    values, a, dy = torch.zeros(20, 33), normal(3, 20), normal(3, 33, seed=1)
    dy[1, 4] = float("nan")
    got = launch("neuron", values, torch.arange(20), a, dy, (None, None), None, {"lr": 1.0, "clamp": 0.5}, device)[0]
    assert got[:, 4].isnan().all() and not got[:, :4].isnan().any() and not got[:, 5:].isnan().any()


def test_launches_repeat_to_the_bit(device):
    a, dy = normal(70, 63), normal(70, 33, seed=1)
    places, _ = columns_mask(63, 33, 0.5)
    values, state = normal(len(places), 33, seed=2), [torch.zeros(len(places), 33) for _ in range(2)]
    first, second = (launch("neuron", values, places, a, dy, state, None, ADAM, device) for _ in range(2))
    assert all(torch.equal(f, s) for f, s in zip(first[:3], second[:3], strict=True))


def test_operands_of_two_dtypes_meet_in_fp32():
    left, right, options = update_tile.product_operands(normal(3, 4), normal(3, 5, dtype=torch.bfloat16))
    assert left.dtype == right.dtype == torch.float32
    left, right, _ = update_tile.product_operands(*(normal(3, n, dtype=torch.float16) for n in (4, 5)))
    assert left.dtype == right.dtype == torch.float16
    assert options["PRECISION"] in ("tf32x3", "ieee")


@pytest.mark.parametrize(
    "tokens,rows,columns,itemsize,regime",
    [
        (64, 410, 640, 4, "narrow"),
        (64, 2202, 4096, 2, "short16"),
        (512, 2202, 4096, 2, "few16"),
        (2048, 2202, 4096, 2, "many16"),
        (64, 2202, 4096, 4, "short32"),
        (512, 2202, 4096, 4, "many32"),
    ],
)
def test_configurations(tokens, rows, columns, itemsize, regime):
    assert neuron.config(tokens, rows, columns, itemsize) == neuron.CONFIGS[regime]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 640, 2048), (500, 640, 2048), (100, 4096, 2200), (600, 4096, 2201)])
def test_real_shapes_on_a_device(shape, dtype, device):
    tokens, outputs, inputs = shape
    a, dy = normal(tokens, inputs, dtype=dtype).to(device), normal(tokens, outputs, seed=1, dtype=dtype).to(device)
    columns = torch.arange(0, inputs, 2, device=device)
    mask = (torch.rand(outputs, inputs, generator=generator(2)) < 0.2).to(device)
    exact = dy.double().t() @ a.double()
    plain = dy.float().t() @ a.float()
    values = torch.zeros(len(columns), outputs, device=device)
    masked_update_(values, a[:, columns], dy, lr=1.0)
    assert_within(-values.t(), plain[:, columns], exact[:, columns], torch.float32)
    packed = torch.zeros(int(mask.sum()), device=device)
    masked_update_element_(packed, pack_bits(mask), a, dy, lr=1.0)
    assert_within(-packed, plain[mask], exact[mask], torch.float32)
