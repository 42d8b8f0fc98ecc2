"""The ops on the CPU beside the plain PyTorch chains that they replace: `make bench-ops` (pytest-benchmark).

    python -m pytest bench/ops.py --benchmark-json=FILE     # for machines

The cases are those of `bench.gpu`, in sizes that two cores can take: each in fp32, and first checked to agree.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench.gpu import compare
from bench.gpu_banks import Place
from bench.gpu_cases import decode, leverage, norms, prefill, route
from bench.gpu_editing import masked_update, ties_merge

FP32 = torch.float32
SMALL = "Gemma-3-270M"
PLACE = Place(torch.device("cpu"), full=True)
CASES = {
    **{
        f"decode, {layout}, 8 rows, {scope}": decode(SMALL, layout, 8, 1, FP32, scope == "in scope")
        for layout in ("neuron", "element")
        for scope in ("in scope", "out of scope")
    },
    **{f"prefill, {layout}, 256 rows": prefill(SMALL, layout, 256, 1, FP32, True) for layout in ("neuron", "element")},
    "norms, neuron, 64 rows, 16 memories": norms(SMALL, "neuron", 64, 16, FP32),
    "leverage, 64 rows, 4 memories": leverage(SMALL, 64, 4, FP32),
    "route, 512 rows, 16 memories": route(512, 16),
    **{
        f"masked_update, {layout}, 256 tokens, adam": masked_update(layout, 256, "adam", SMALL)
        for layout in ("neuron", "element")
    },
    **{f"ties_merge, {layout}, 2 shards": ties_merge(layout, 2, model=SMALL) for layout in ("neuron", "element")},
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    built = CASES[request.param](PLACE)
    compare(*built.pair(), torch.bfloat16 if "update" in request.param else FP32)
    return request.param, built


@pytest.mark.parametrize("arm", ["projection", "plain", "ours"])
@torch.no_grad()
def test_op(benchmark, case, arm):
    name, built = case
    if arm not in built.arms:
        pytest.skip("no projection in this op")
    benchmark.group, benchmark.name = name, arm
    benchmark(built.arms[arm].call)
