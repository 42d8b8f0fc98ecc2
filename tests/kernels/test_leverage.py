"""leverage against its definition and its meaning: 1 inside what a memory was taught, below 0 past its ceiling."""

import pytest
import torch
from kernel_banks import NEURON_SIZES, WIDTH, neuron_bank, normal
from tolerances import DTYPES, assert_fp32
from torch.library import opcheck

from wise_kernels import leverage, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 63])
@pytest.mark.parametrize("sizes", NEURON_SIZES)
def test_matches_the_definition(sizes, tokens, dtype):
    _, columns, bounds = neuron_bank(sizes)
    a, factors = normal(2 * WIDTH, tokens, dtype=dtype).t()[:, ::2], 0.2 * normal(len(columns), 4, seed=3)
    ceilings = torch.linspace(0.5, 3, len(sizes))
    got = leverage(a, columns, bounds, factors, ceilings)
    assert got.dtype == torch.float32
    assert_fp32(got, reference.leverage(a, columns, bounds, factors, ceilings))


def test_what_was_taught_has_leverage_one_and_the_rest_counts_against_the_ceiling():
    _, columns, bounds = neuron_bank((20, 12))
    basis, factors = torch.linalg.qr(normal(20, 20))[0], torch.zeros(32, 14)
    factors[:20, :14] = basis[:, 6:]  # memory 0 has been taught the first six directions, memory 1 everything
    a, ceilings = torch.zeros(3, WIDTH), torch.tensor([2.0, 5.0])
    a[0, columns[:20]] = basis[:, :6] @ normal(6, seed=2)
    a[1, columns[:20]] = 2 * basis[:, 9]
    got = leverage(a, columns, bounds, factors, ceilings)
    torch.testing.assert_close(got, torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0]]))
    assert torch.equal(leverage(a, columns, bounds, factors, ceilings / 0), torch.ones(2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(leverage(a, columns, bounds, factors, ceilings), got)


def test_opcheck_compile_and_errors():
    _, columns, bounds = neuron_bank((5, 3))
    given = normal(4, WIDTH), columns, bounds, normal(8, 2), torch.tensor([1.0, 2.0])
    opcheck(torch.ops.wise.leverage.default, given)
    compiled = torch.compile(leverage, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), leverage(*given))
    a, columns, bounds, factors, ceilings = given
    with pytest.raises(ValueError, match="columns must be int64"):
        leverage(a, columns[:3], bounds, factors, ceilings)
    with pytest.raises(ValueError, match="factors must be"):
        leverage(a, columns, bounds, factors[:, 0], ceilings)
    with pytest.raises(ValueError, match=r"ceilings must be a floating point \[2\]"):
        leverage(a, columns, bounds, factors, ceilings[:1])
