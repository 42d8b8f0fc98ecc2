"""The served module on a CUDA device: the same answers as on the CPU, and all of it in one CUDA graph."""

import pytest
import torch

from tests.test_ffn import LAYOUTS, inputs, make_bank, make_base
from wise_fast.ffn import DualMemoryLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_module_on_a_device(layout, count):
    module = DualMemoryLinear(make_base())
    module.set_bank(make_bank(layout, (1e-3,) * count))
    a = inputs(3, 5)
    expected, choice = module(a), module.routing.choice
    module, a = module.cuda(), a.cuda()
    torch.testing.assert_close(module(a).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.routing.choice.cpu(), choice) and (choice >= 0).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(a)
    module.thresholds.fill_(torch.inf)
    graph.replay()
    torch.testing.assert_close(y, module.base_layer(a), rtol=1e-5, atol=1e-5)
    module.thresholds.fill_(1e-3)
    graph.replay()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
