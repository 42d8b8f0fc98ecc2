"""The serving path is one fixed sequence of launches: captured once, it answers right when the inputs, the bank or the
choice change afterwards. With a device as a CUDA graph; without one as an exported graph, and by running the launchers
at real sizes on tensors that have no data.
"""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from kernel_banks import neuron_bank, normal
from tolerances import assert_within
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wise_fast.ffn import DualMemoryLinear
from wise_fast.memory import Bank, SideMemory, alike
from wise_kernels import (
    dual_forward,
    gated_add_,
    leverage,
    reference,
    route,
    sketch_bound,
    sketch_values,
    sketched_route,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TOKENS, WIDTH, OUTPUTS = 3, 8, 96, 40
NEW = 20  # features that no memory was taught


class Chain(nn.Module):
    """dual_forward, leverage, route and gated_add_ over a bank of three memories."""

    def __init__(self, dtype):
        super().__init__()
        values, columns, bounds = neuron_bank((40, 17, 30), width=WIDTH, outputs=OUTPUTS, dtype=dtype)
        factors = torch.cat([new_to(columns[low:high], seed=low) for low, high in pairwise(bounds.tolist())])
        tensors = {"values": values, "columns": columns, "bounds": bounds, "factors": factors}
        tensors |= {
            "weight": normal(OUTPUTS, WIDTH, seed=9, dtype=dtype),
            "thresholds": torch.tensor([1.0, 2.0, 1.5]),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, a, mask):
        y, _, norms = dual_forward(a, self.weight, None, self.values, self.columns, self.bounds, response=False)
        share = leverage(a, self.columns, self.bounds, self.factors)
        scores, choice = route(norms, mask, self.thresholds, share)
        gated_add_(y, a, self.values, self.columns, self.bounds, choice)
        return y, scores, choice

    def expected(self, a, mask):
        bank = [t.cpu() for t in (self.values, self.columns, self.bounds)]
        dense = reference.dense_neuron(*bank, WIDTH)
        y, _, norms = reference.dual_forward(a.cpu(), self.weight.cpu(), None, dense)
        share = reference.leverage(a.cpu(), *bank[1:], self.factors.cpu())
        choice = reference.route(norms, mask.cpu(), self.thresholds.cpu(), share)[1]
        return reference.gated_add(y, a.cpu(), dense, choice), choice


def new_to(columns, seed):
    """A factor of a memory that was taught everything but the first features."""
    return (0.03 * normal(len(columns), 7, seed=seed) + 30.0 * (columns < NEW)[:, None]).half().float()


def prompts(dtype):
    """Activations out of scope, all in scope, and one sequence in scope, by whether they hold what is new."""
    a = normal(BATCH * TOKENS, WIDTH, seed=4)
    known = a * (torch.arange(WIDTH) >= NEW)
    mixed = torch.where(torch.arange(BATCH * TOKENS)[:, None] // TOKENS == 1, known, a)
    return [x.to(dtype).to(DEVICE) for x in (a, known, mixed, a)]


def recorded(run, *static):
    """Replay `run` on new contents of its static inputs: a CUDA graph on a device, else an exported graph."""
    if DEVICE == "cpu":
        return torch.export.export(run, static).module()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*static)

    def replay(*inputs):
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        return out

    return replay


def check_chain(dtype):
    chain, mask = Chain(dtype).to(DEVICE), torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = False
    inputs, host = prompts(dtype), Chain(dtype)
    replay = recorded(chain, inputs[0].clone(), mask.clone())
    seen = set()
    for a in inputs:
        y, scores, choice = (t.clone() for t in replay(a, mask))
        for got, want in zip((y, scores, choice), chain(a, mask), strict=True):
            assert torch.equal(got, want)
        expected, chosen = chain.expected(a, mask)
        assert torch.equal(choice.cpu(), chosen)
        assert_within(y.cpu(), host(a.cpu(), mask.cpu())[0], expected, dtype)
        seen.add(tuple((chosen >= 0).tolist()))
    assert seen == {(False,) * 3, (True,) * 3, (False, True, False)}
    return chain, replay, inputs, mask


@torch.no_grad()
def test_the_chain_is_one_graph_on_the_host():
    if DEVICE == "cuda":
        pytest.skip("the same on the device is below")
    check_chain(torch.float32)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_chain_is_one_cuda_graph(dtype):
    chain, replay, inputs, mask = check_chain(dtype)
    # A changed bank is changed data: the same graph serves it.
    chain.values.mul_(2)
    chain.thresholds.mul_(2)
    assert all(torch.equal(g, w) for g, w in zip(replay(inputs[1], mask), chain(inputs[1], mask), strict=True))


@pytest.mark.gpu
@torch.no_grad()
def test_decoding_with_a_held_choice_is_one_cuda_graph():
    chain = Chain(torch.float16).to(DEVICE)
    a, choice = normal(BATCH, WIDTH, dtype=torch.float16).to(DEVICE), torch.full((BATCH,), -1, device=DEVICE)

    def decode(a, choice):
        y = nn.functional.linear(a, chain.weight)
        gated_add_(y, a, chain.values, chain.columns, chain.bounds, choice)
        return y

    replay = recorded(decode, a.clone(), choice.clone())
    for chosen in ([-1, -1, -1], [0, -1, 2], [1, 1, 1], [-1, -1, -1]):
        choice = torch.tensor(chosen, device=DEVICE)
        assert torch.equal(replay(a, choice), decode(a, choice))
        outside = choice < 0
        assert torch.equal(replay(a, choice)[outside], nn.functional.linear(a, chain.weight)[outside])


@pytest.mark.gpu
@torch.no_grad()
def test_sketched_routing_is_one_cuda_graph():
    chain = Chain(torch.float16).to(DEVICE)
    bank = chain.values, chain.columns, chain.bounds
    sketched = sketch_values(*bank, WIDTH, 16, torch.Generator().manual_seed(0))
    mask, inputs = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE), prompts(torch.float16)

    def choose(a, mask):
        return sketched_route(a, *bank, sketched, mask, 20 * chain.thresholds, sketch_bound(16, 1e-6))[1]

    replay = recorded(choose, inputs[0].clone(), mask.clone())
    for a in inputs:
        assert torch.equal(replay(a, mask), choose(a, mask))


def served(dtype):
    """A projection with three memories that are told apart by leverage."""
    torch.manual_seed(0)
    module, rng, memories = DualMemoryLinear(nn.Linear(WIDTH, OUTPUTS, bias=True)), torch.Generator().manual_seed(1), []
    for threshold in (1.0, 2.0, 1.5):
        memory = SideMemory.blank("neuron", (OUTPUTS, WIDTH), 0.4, rng, "cpu")
        factor = new_to(memory.index, len(memories))
        values = torch.randn(memory.values.shape, generator=rng)
        memories.append(memory.replace(values=values, z_threshold=threshold, factor=factor, edits=(0,)))
    module.to(dtype).to(DEVICE).requires_grad_(False)
    module.set_bank(Bank.join(alike(memories, "leverage"), dtype))
    return module


def check_served(dtype, record):
    module = served(dtype)

    def run(a):
        return module(a), module.routing.choice

    inputs = [a.view(BATCH, TOKENS, WIDTH) for a in prompts(dtype)]
    replay = record(run, inputs[0].clone())
    seen = set()
    for a in inputs:
        y, choice = (t.clone() for t in replay(a))
        assert torch.equal(y, run(a)[0]) and torch.equal(choice, module.routing.choice)
        assert torch.equal(y[choice < 0], module.base_layer(a)[choice < 0])
        seen.add(tuple((choice >= 0).tolist()))
    assert seen == {(False,) * 3, (True,) * 3, (False, True, False)}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_served_projection_is_one_cuda_graph(dtype):
    check_served(dtype, recorded)


@torch.no_grad()
def test_a_served_projection_is_one_compiled_graph():
    torch._dynamo.reset()
    check_served(torch.float32, lambda run, *static: torch.compile(run, backend="aot_eager", fullgraph=True))


@pytest.mark.gpu
@torch.no_grad()
def test_nothing_waits_for_the_device():
    chain, module, inputs = Chain(torch.float16).to(DEVICE), served(torch.float16), prompts(torch.float16)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    chain(inputs[0], mask), module(inputs[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain(inputs[1], mask), module(inputs[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Launches:
    """In place of a kernel: takes note of its grids, which may depend on shapes only."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            assert all(isinstance(size, int) and size > 0 for size in grid)
            assert all(size <= limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False))
            self.log.append(self.name)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Launchers of this package on fake tensors: names of the kernels they would launch, in order."""
    log = []
    names = ("route", "leverage", "gated_rows", "gated_add", "gated_add_element", "gated_linear", "sketch")
    names += ("side_backward", "dual_tiles", "dual_forward", "row_sums")
    for name in names:
        module = pytest.importorskip(f"wise_kernels.gpu.{name}")
        monkeypatch.setattr(module, "guard", lambda tensor: nullcontext(), raising=False)
        monkeypatch.setattr(module, "dependent", lambda tensor: {}, raising=False)
        monkeypatch.setattr(module, "family", lambda tensor: "wgmma", raising=False)
        monkeypatch.setattr(module, "is_sm100", lambda tensor: False, raising=False)
        for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launches(log, kernel))
    return log


@pytest.mark.parametrize("batch,tokens", [(1, 1), (16, 1), (512, 1), (4, 100), (1, 2048), (1, 100_000)])
@pytest.mark.parametrize("memories", [1, 4, 64])
def test_launchers_read_nothing_on_the_host(launches, memories, batch, tokens):
    # Reading a fake tensor's data raises, and a grid cannot depend on it. Llama-2-7B: 4096 x 11008, rho 0.2.
    from wise_kernels.gpu import gated_add, gated_add_element, gated_linear, gated_rows, side_backward, sketch
    from wise_kernels.gpu import leverage as lever
    from wise_kernels.gpu import route as routes

    kind = {"device": "cuda"}
    with FakeTensorMode():
        rows, columns = batch * tokens, memories * 2202
        a, y = (
            torch.empty(rows, 11008, dtype=torch.bfloat16, **kind),
            torch.empty(rows, 4096, dtype=torch.bfloat16, **kind),
        )
        values, index = torch.empty(columns, 4096, dtype=torch.bfloat16, **kind), torch.empty(columns, **kind).long()
        bounds, choice = torch.empty(memories + 1, **kind).long(), torch.empty(batch, **kind).long()
        side = torch.empty(memories, rows, 4096, dtype=torch.bfloat16, **kind)
        mask, norms = torch.empty(batch, tokens, **kind).bool(), torch.empty(memories, rows, **kind)
        thresholds, factors = torch.empty(memories, **kind), torch.empty(columns, 128, **kind)
        sketched = torch.empty(11008, memories * 16, dtype=torch.bfloat16, **kind)
        packed = torch.empty(memories * 9_000_000, dtype=torch.bfloat16, **kind)
        bits = torch.empty(memories, 4096, 344, **kind).int()
        popcounts = torch.empty(memories, 4096, 172, **kind).int()
        weight, few = (torch.empty(n, 11008, dtype=torch.bfloat16, **kind) for n in (4096, min(rows, 16)))
        one = torch.empty(1, **kind).long()
        counts = []
        for run in (
            lambda: routes.route(norms, mask, thresholds, None, "mean"),
            lambda: routes.route(norms, mask, thresholds, norms, "max"),
            lambda: lever.leverage(a, index, bounds, factors),
            lambda: gated_add.gated_add(y, a, values, index, bounds, choice),
            lambda: gated_rows.add_side(y, side, choice),
            lambda: gated_add_element.gated_add_element(y, a, packed, bits, bounds, choice, popcounts),
            lambda: sketch.sketched_route(a, values, index, bounds, sketched, mask, thresholds, 0.7, 1.5, None, "mean"),
            lambda: side_backward.side_backward(torch.empty_like(side), a, values, index, bounds),
            lambda: side_backward.responses(a, values, index, bounds),
            lambda: gated_linear.gated_linear(few, weight, None, values, index, bounds, one),
        ):
            before = len(launches)
            run()
            counts.append(len(launches) - before)
    assert all(1 <= count <= 2 for count in counts[:3]) and counts[4] == 1
    # Decoding adds one launch to the projection's, or three that unpack.
    assert counts[3] == 1 if rows <= 16 else counts[3] <= 3
    assert counts[5] <= 3 and counts[6] <= 7 and counts[7] == 4 and counts[8] <= 4 and counts[9] == 1
