"""The leverage kernels against the definition, from one token to tiles of them, every dtype and stride."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import NEURON_SIZES, WIDTH, neuron_bank, normal
from tolerances import DTYPES, assert_fp32

from wise_kernels import reference

gpu = pytest.importorskip("wise_kernels.gpu.leverage")


def factors_of(columns, rank, seed=3):
    """Factors as a bank keeps them: fp32 that has been through fp16."""
    return (0.2 * normal(len(columns), rank, seed=seed)).half().float()


def check(device, a, columns, bounds, factors):
    moved = [t.to(device) for t in (a, columns, bounds, factors)]
    got = gpu.leverage(*moved)
    assert got.dtype == torch.float32 and got.shape == (len(bounds) - 1, a.shape[0])
    assert_fp32(got.cpu(), reference.leverage(a, columns, bounds, factors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 63])
@pytest.mark.parametrize("sizes", NEURON_SIZES)
def test_matches_the_definition(device, poisoned, sizes, tokens, dtype):
    _, columns, bounds = neuron_bank(sizes)
    a = normal(2 * WIDTH, tokens, dtype=dtype).t()[:, ::2]
    check(device, a, columns, bounds, factors_of(columns, 20))


@pytest.mark.parametrize("blocks", ["SMALL", "MEDIUM", "LARGE"])
def test_every_block_size(device, poisoned, monkeypatch, blocks):
    chosen = getattr(gpu, blocks)
    monkeypatch.setattr(gpu, "config", lambda *_: chosen[128] if blocks == "LARGE" else chosen)
    _, columns, bounds = neuron_bank((130, 1, 63), width=300)
    check(device, normal(70, 300, dtype=torch.float16), columns, bounds, factors_of(columns, 129))


@settings(max_examples=10)
@given(st.lists(st.integers(0, 30), max_size=3), st.integers(0, 20), st.integers(1, 40), st.sampled_from(DTYPES))
def test_ragged_banks(sizes, tokens, rank, dtype):
    _, columns, bounds = neuron_bank(sizes)
    check("cuda" if torch.cuda.is_available() else "cpu", normal(tokens, WIDTH, dtype=dtype), columns, bounds,
          factors_of(columns, rank).to(dtype if dtype == torch.float16 else torch.float32))  # fmt: skip


def test_squares_do_not_overflow_and_a_silent_token_has_no_leverage(device, poisoned):
    _, columns, bounds = neuron_bank((20, 7))
    a = 3e4 * normal(20, WIDTH).clamp(-2, 2)
    a[::3] = 0
    check(device, a.half(), columns, bounds, (1e-3 * factors_of(columns, 5)).half().float())


def test_factors_in_half_precision_are_as_good(device):
    _, columns, bounds = neuron_bank((40, 20))
    a, factors = normal(20, WIDTH, dtype=torch.bfloat16), factors_of(columns, 33)
    check(device, a, columns, bounds, factors)
    check(device, a, columns, bounds, factors.half())


def test_equal_launches_give_equal_bits_and_tokens_do_not_depend_on_each_other(device):
    _, columns, bounds = neuron_bank((40, 20))
    a, columns, bounds, factors = (t.to(device) for t in (normal(16, WIDTH), columns, bounds, factors_of(columns, 33)))
    full = gpu.leverage(a, columns, bounds, factors)
    assert torch.equal(full, gpu.leverage(a, columns, bounds, factors))
    assert torch.equal(full[:, 3:5], gpu.leverage(a[3:5], columns, bounds, factors))
