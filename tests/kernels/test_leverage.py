"""leverage against its definition and its meaning: 1 inside what a memory was taught, 0 outside."""

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
    got = leverage(a, columns, bounds, factors)
    assert got.dtype == torch.float32
    assert_fp32(got, reference.leverage(a, columns, bounds, factors))


def test_is_the_share_that_was_taught():
    _, columns, bounds = neuron_bank((20, 12))
    factors = torch.zeros(32, 6)
    factors[:20, :6] = torch.linalg.qr(normal(20, 6))[0]
    factors[20:, :3] = torch.linalg.qr(normal(12, 3, seed=1))[0]
    a = torch.zeros(3, WIDTH)
    a[0, columns[:20]] = factors[:20] @ normal(6, seed=2)
    a[1] = normal(WIDTH, seed=4)
    got = leverage(a, columns, bounds, factors)
    assert got[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(got[:, 2], torch.zeros(2))
    for j in range(2):
        rows = slice(bounds[j], bounds[j + 1])
        active = a[1, columns[rows]]
        project = torch.eye(len(active)) - factors[rows] @ factors[rows].t()
        assert got[j, 1] == pytest.approx(float(1 - active @ project @ active / active.square().sum()), abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(leverage(a, columns, bounds, factors), got)


def test_opcheck_compile_and_errors():
    _, columns, bounds = neuron_bank((5, 3))
    a, factors = normal(4, WIDTH), normal(8, 2)
    opcheck(torch.ops.wise.leverage.default, (a, columns, bounds, factors))
    compiled = torch.compile(leverage, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, columns, bounds, factors), leverage(a, columns, bounds, factors))
    with pytest.raises(ValueError, match="columns must be int64"):
        leverage(a, columns[:3], bounds, factors)
    with pytest.raises(ValueError, match="factors must be"):
        leverage(a, columns, bounds, factors[:, 0])
