"""The public ops on a CUDA device against the same ops on the CPU: real dtypes, no host sync, one CUDA graph."""

from contextlib import contextmanager

import pytest
import torch
from kernel_banks import element_bank, neuron_bank, normal
from tolerances import assert_within

import wise_kernels as kernels

pytestmark = pytest.mark.gpu

WIDTH, OUTPUTS, TOKENS = 1000, 264, 33
LAYOUTS = {
    "neuron": (kernels.dual_forward, kernels.side_forward, kernels.gated_add_, neuron_bank, (200, 0, 63)),
    "element": (
        kernels.dual_forward_element,
        kernels.side_forward_element,
        kernels.gated_add_element_,
        element_bank,
        (0.2, 0.0, 1.0),
    ),
}
HALVES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def no_sync():
    """A host sync raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on(device, tensors):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def assert_same(got, inputs, call):
    """As near to the fp64 result on the CPU as plain PyTorch's in the same dtype."""
    low = call(*inputs)
    high = call(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs))
    for g, l, h in zip(got, low, high, strict=True):
        assert_within(g.cpu(), l, h, g.dtype)


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(device, layout, dtype, rows):
    dual, side_only, _, make, sizes = LAYOUTS[layout]
    inputs = [normal(rows, WIDTH, dtype=dtype), normal(OUTPUTS, WIDTH, seed=5, dtype=dtype) / 32, None]
    inputs += make(sizes, width=WIDTH, outputs=OUTPUTS, dtype=dtype)
    moved = on(device, inputs)
    dual(*moved)  # compiles
    with no_sync():
        got = dual(*moved)
        side = side_only(moved[0], *moved[3:])
    assert_same(got, inputs, dual)
    assert_same(side, [inputs[0], *inputs[3:]], side_only)


@pytest.mark.parametrize("with_side", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated_add(device, layout, dtype, with_side):
    _, side_only, add, make, sizes = LAYOUTS[layout]
    bank = make(sizes, width=WIDTH, outputs=OUTPUTS, dtype=dtype)
    a, before, choice = normal(4 * TOKENS, WIDTH, dtype=dtype), normal(4 * TOKENS, OUTPUTS, dtype=dtype), [2, -1, 0, -1]
    choice = torch.tensor(choice)
    chosen = {"cpu": choice, device.type: choice.to(device)}

    def added(before, a, *bank):
        y, side = before.clone(), side_only(a, *bank)[0] if with_side else None
        add(y, a, *bank, chosen[y.device.type], side)
        return (y,)

    moved = on(device, (before, a, *bank))
    added(*moved)
    with no_sync():
        (got,) = added(*moved)
    outside = (choice == -1).repeat_interleave(TOKENS)
    assert torch.equal(got.cpu()[outside], before[outside])
    assert_same([got], (before, a, *bank), added)


@pytest.mark.parametrize("leveraged", [False, True])
def test_route_and_leverage(device, leveraged):
    _, columns, bounds = neuron_bank((200, 63, 100), width=WIDTH)
    a, factors = normal(2 * TOKENS, WIDTH), normal(len(columns), 8, seed=2) / 16
    given = [normal(3, 2 * TOKENS).abs(), torch.arange(2 * TOKENS).view(2, TOKENS) % 3 > 0, torch.full((3,), 0.5)]
    thin = a, columns, bounds, factors, torch.tensor([0.5, 0.2, 0.3])
    share = kernels.leverage(*thin)
    moved, thin = on(device, given), on(device, thin)
    kernels.route(*moved, share.to(device) if leveraged else None)
    with no_sync():
        on_device = kernels.leverage(*thin)
        scores, choice = kernels.route(*moved, on_device if leveraged else None)
    expected_scores, expected = kernels.route(*given, share if leveraged else None)
    assert torch.equal(choice.cpu(), expected)
    torch.testing.assert_close(scores.cpu(), expected_scores)
    torch.testing.assert_close(on_device.cpu(), share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_update(device, layout, optimizer):
    values, where, bounds = LAYOUTS[layout][3]((200,) if layout == "neuron" else (0.2,), WIDTH, OUTPUTS)
    a, dy = normal(TOKENS, WIDTH).bfloat16(), normal(TOKENS, OUTPUTS, seed=1).bfloat16()
    results = []
    for place in (device, "cpu"):
        stepped, index, x, g = (t.clone().to(place) for t in (values, where, a, dy))
        states = [torch.zeros_like(stepped) for _ in range(2)]
        for step in (1, 2):
            keep = {
                "lr": 0.01,
                "step": step,
                "optimizer": optimizer,
                "momentum": 0.9,
                "weight_decay": 0.1,
                "clamp": 2.0,
            }
            if layout == "neuron":
                kernels.masked_update_(stepped, x[:, index], g, *states, **keep)
            else:
                kernels.masked_update_element_(stepped, index[0], x, g, *states, **keep)
        results.append(stepped.cpu())
    assert (results[0] != values).any()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_ties_merge(device, dtype):
    values = [normal(n, 64, seed=n, dtype=dtype) for n in (100, 1, 37)]
    index = [torch.randperm(200, generator=torch.Generator().manual_seed(n))[:n].sort().values for n in (100, 1, 37)]
    merged, union = kernels.ties_merge(on(device, values), on(device, index), 0.3)
    expected, expected_union = kernels.ties_merge(values, index, 0.3)
    assert torch.equal(union.cpu(), expected_union) and torch.equal(merged.cpu() == 0, expected == 0)
    torch.testing.assert_close(merged.cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_serves_in_and_out_of_scope_and_a_changed_bank(device, layout):
    dual, _, add, make, sizes = LAYOUTS[layout]
    weight = (normal(OUTPUTS, WIDTH, seed=5) / 32).to(device)
    a, mask = normal(2 * TOKENS, WIDTH).to(device), torch.ones(2, TOKENS, dtype=torch.bool, device=device)
    bank = on(device, make(sizes, width=WIDTH, outputs=OUTPUTS))
    thresholds = torch.full((3,), torch.inf, device=device)

    def serve():
        y, _, norms = dual(a, weight, None, *bank, response=False)
        _, choice = kernels.route(norms, mask, thresholds)
        add(y, a, *bank, choice)
        return y, choice

    serve()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, choice = serve()
    for threshold in (torch.inf, 1e-3, torch.inf):
        thresholds.fill_(threshold)
        graph.replay()
        expected, expected_choice = serve()
        assert torch.equal(choice, expected_choice)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert bool((choice >= 0).all()) == (threshold < 1)
    thresholds.fill_(1e-3)
    if layout == "neuron":  # other sizes in the same storage
        bank[2].copy_(torch.tensor([0, 20, 150, 263]))
    bank[0].mul_(0.5)
    graph.replay()
    expected, expected_choice = serve()
    assert torch.equal(choice, expected_choice)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
