"""The drop-in module on its own: exactness, both layouts, both weight orientations, and life as an nn.Module."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import wise_kernels
from tests.test_architectures import Scaled
from tests.tiny import FAMILIES, tiny_model
from wise_fast.errors import UnsupportedModelError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.memory import Bank, SideMemory, alike
from wise_fast.mlp import DualMemoryFFN
from wise_fast.routing import Routing
from wise_kernels import popcount_table

D_OUT, D_FF = 24, 40
LAYOUTS = ("neuron", "element")
STATIC = {"force_nn_module_property_static_shapes": False, "force_parameter_static_shapes": False}


def make_base(kind="linear", bias=True, seed=0):
    torch.manual_seed(seed)
    if kind == "conv1d":
        base = Conv1D(D_OUT, D_FF)
        base.bias.data.normal_()
        return base
    return nn.Linear(D_FF, D_OUT, bias=bias)


def make_memories(layout, thresholds, seed=0, shape=(D_OUT, D_FF), ratio=0.5):
    generator = torch.Generator().manual_seed(seed)
    memories = []
    for threshold in thresholds:
        memory = SideMemory.blank(layout, shape, ratio, generator, "cpu")
        values = torch.randn(memory.values.shape, generator=generator)
        memories.append(memory.replace(values=values, threshold=threshold, edits=(0,)))
    return memories


def make_bank(layout, thresholds, seed=0, shape=(D_OUT, D_FF), dtype=torch.float32, ratio=0.5):
    return Bank.join(alike(make_memories(layout, thresholds, seed, shape, ratio), "leverage"), dtype)


def inputs(*size, seed=3):
    return torch.randn(*size, D_FF, generator=torch.Generator().manual_seed(seed))


def in_scope(base, memories, a):
    """Equations 3 and 6 in plain fp32: [B, T, d_ff] to output and choice."""
    responses = torch.stack([a @ m.dense().t() for m in memories])
    scores = responses.norm(dim=-1).mean(-1).t()
    thresholds = torch.tensor([m.threshold for m in memories])
    ratio = torch.where(scores > thresholds, scores / thresholds, -1.0)
    choice = torch.where(ratio.amax(1) > 0, ratio.argmax(1), -1)
    side = responses[choice.clamp_min(0), torch.arange(len(a))]
    return base(a) + torch.where((choice >= 0)[:, None, None], side, 0.0), choice, scores


BASES = [("linear", True), ("linear", False), ("conv1d", True)]


@pytest.mark.parametrize("kind, bias", BASES)
@pytest.mark.parametrize("size", [(2, 5), (3, 1), (7,), (1, 1), (0,), (2, 2, 3)])
def test_without_memories_the_bits_are_the_originals(kind, bias, size):
    base, a = make_base(kind, bias), inputs(*size)
    assert torch.equal(DualMemoryLinear(base)(a), base(a))


@pytest.mark.parametrize("kind, bias", BASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 5), (3, 1), (7,), (4, 33), (2, 2, 3)])
def test_out_of_scope_the_bits_are_the_originals(kind, bias, layout, dtype, size):
    base, a = make_base(kind, bias).to(dtype), inputs(*size).to(dtype)
    module = DualMemoryLinear(base)
    module.set_bank(make_bank(layout, (1e6, 1e6), dtype=dtype))
    assert torch.equal(module(a), base(a))
    assert (module.routing.choice == -1).all()
    module.set_bank(make_bank(layout, (0.0,), dtype=dtype))
    assert not torch.equal(module(a), base(a))  # the same call in scope differs
    module.routing.held = torch.full((size[0] if len(size) > 1 else 1,), -1)
    assert torch.equal(module(a), base(a))
    module.routing.held = None
    with module.routing.disabled():
        assert torch.equal(module(a), base(a))


@pytest.mark.parametrize("kind, bias", BASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_in_scope_is_the_dense_side_memory(kind, bias, layout, count):
    base, a = make_base(kind, bias), inputs(12, 5)
    memories = make_memories(layout, [1.0] * count)
    scores = in_scope(base, memories, a)[2]
    memories = [m.replace(threshold=float(s)) for m, s in zip(memories, scores.quantile(0.7, 0), strict=True)]
    module = DualMemoryLinear(base)
    module.set_bank(Bank.join(alike(memories, "leverage"), torch.float32))
    expected, choice, scores = in_scope(base, memories, a)
    assert len(choice.unique()) > count / 2 and (choice == -1).any() and (choice >= 0).any()
    torch.testing.assert_close(module(a), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.routing.choice, choice)
    torch.testing.assert_close(module.routing.scores, scores, rtol=1e-5, atol=1e-5)
    module.routing.held = choice  # decoding
    torch.testing.assert_close(module(a), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_reduction(layout):
    module = DualMemoryLinear(make_base(), reduction="max")
    memories = make_memories(layout, (0.0,))
    module.set_bank(Bank.join(alike(memories, "leverage"), torch.float32))
    a = inputs(3, 5)
    module(a)
    expected = (a @ memories[0].dense().t()).norm(dim=-1).amax(1, keepdim=True)
    torch.testing.assert_close(module.routing.scores, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_casting_keeps_what_decides(layout):
    module = DualMemoryLinear(make_base())
    module.set_bank(make_bank(layout, (1.2345678,)))
    module.factors = torch.rand(3, 2)
    factors = module.factors.clone()
    module.to(torch.bfloat16)
    assert module.weight.dtype == module.values.dtype == torch.bfloat16
    assert module.thresholds.dtype == torch.float32 and module.thresholds.item() == pytest.approx(1.2345678, abs=1e-7)
    assert torch.equal(module.factors, factors)
    assert not module.index.is_floating_point() and not module.bounds.is_floating_point()
    module.factors = None
    out = module(inputs(2, 5).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_and_back(layout):
    module = DualMemoryLinear(make_base())
    module.set_bank(make_bank(layout, (0.5,)))
    state, a = module.state_dict(), inputs(2, 5)
    expected = module(a)
    bare = copy.deepcopy(module).to("meta")
    assert all(t.is_meta for t in bare.state_dict().values())
    bare.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(bare(a), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("there", [None, 1, 4])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(layout, there, assign):
    module, other = DualMemoryLinear(make_base()), DualMemoryLinear(make_base(seed=1))
    module.set_bank(make_bank(layout, (0.5, 30.0)))
    if there:
        other.set_bank(make_bank(layout, (0.1,) * there, seed=9))
    other.load_state_dict(module.state_dict(), assign=assign)
    a = inputs(4, 5)
    assert torch.equal(other(a), module(a)) and torch.equal(other.bounds, module.bounds)
    assert torch.equal(other.routing.choice, module.routing.choice) and other.memories == 2
    assert other.layout == layout
    other.load_state_dict(DualMemoryLinear(make_base()).state_dict())  # back to no memories
    assert other.memories == 0 and torch.equal(other(a), make_base()(a))


def test_loading_something_else_leaves_the_memories():
    model = nn.Sequential(DualMemoryLinear(make_base()), nn.Linear(D_OUT, 3))
    model[0].set_bank(make_bank("neuron", (0.5,)))
    a = inputs(2, 5)
    before = model[0](a)
    model.load_state_dict({"1.bias": torch.zeros(3)}, strict=False)
    assert model[0].memories == 1 and torch.equal(model[0](a), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepcopy_is_independent(layout):
    module = DualMemoryLinear(make_base())
    module.set_bank(make_bank(layout, (0.5,)))
    a = inputs(2, 5)
    expected = module(a)
    twin = copy.deepcopy(module)
    assert twin.routing is not module.routing and torch.equal(twin(a), expected)
    twin.values.zero_()
    twin.set_bank(None)
    assert torch.equal(module(a), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_compiles_without_graph_breaks(layout, count):
    torch._dynamo.reset()
    module = DualMemoryLinear(make_base())
    module.set_bank(make_bank(layout, (5.0,) * count) if count else None)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    a = inputs(3, 4)
    with torch.no_grad():
        expected = module(a)
        choice = module.routing.choice
        torch.testing.assert_close(compiled(a), expected)
        if count:
            assert torch.equal(module.routing.choice, choice)
            module.routing.held = torch.tensor([-1, 0, 0])
            torch.testing.assert_close(compiled(a), module(a))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_bank_does_not_recompile(layout):
    """Dynamo takes a module's buffers for static unless it is told not to; the bounds are data in any case."""
    torch._dynamo.reset()
    module, a = DualMemoryLinear(make_base()), inputs(3, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(STATIC):
        for stance, ratio in (("default", 0.5), ("fail_on_recompile", 0.25)):
            module.set_bank(make_bank(layout, (5.0, 5.0), ratio=ratio))
            for sized in (module.values, *([module.index] if layout == "neuron" else [])):
                torch._dynamo.mark_dynamic(sized, 0)
            with torch.compiler.set_stance(stance):
                got = compiled(a)
            assert (module.routing.choice >= 0).any() and torch.equal(got, module(a))


@pytest.mark.parametrize("held", [None, torch.tensor([0, 1])])
def test_element_banks_keep_their_popcounts_and_pass_them(monkeypatch, held):
    module, other = DualMemoryLinear(make_base()), DualMemoryLinear(make_base())
    module.set_bank(make_bank("element", (5.0, 5.0)))
    assert torch.equal(module.popcounts, popcount_table(module.index)) and "popcounts" not in module.state_dict()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.popcounts, module.popcounts)
    passed = []
    for name in ("dual_forward_element", "gated_add_element_"):
        op = getattr(wise_kernels, name)
        monkeypatch.setattr(wise_kernels, name, lambda *given, op=op: passed.append(given[-1]) or op(*given))
    module.routing.held = held
    module(inputs(2, 5))
    assert len(passed) == (1 if held is not None else 2) and all(p is module.popcounts for p in passed)
    module.set_bank(make_bank("neuron", (5.0,)))
    assert module.popcounts is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_decoded_token_is_one_op_where_bits_do_not_matter(monkeypatch, kind):
    base, a = make_base(kind), inputs(2, 1)
    asked, op = [], wise_kernels.gated_linear
    monkeypatch.setattr(wise_kernels, "gated_linear", lambda *given, **more: asked.append(more) or op(*given, **more))
    for exact in (True, False):
        module = DualMemoryLinear(base, exact_main=exact)
        module.set_bank(make_bank("neuron", (0.0,)))
        module(a)
        assert not asked  # a prompt is not decided yet
        for held in ([-1, -1], [0, -1]):
            module.routing.held = torch.tensor(held)
            y = module(a)
            assert asked == ([] if exact else [{"exact_main": False}])
            asked.clear()
            assert torch.equal(y[1], base(a)[1]) and torch.equal(y[0], base(a)[0]) == (held[0] < 0)
    module.set_bank(make_bank("element", (0.0,)))
    module(a)
    assert not asked


def test_the_layers_own_forward_makes_a_decoded_token():
    base = make_base()
    module, calls = DualMemoryLinear(base), []
    module.set_bank(make_bank("neuron", (0.0,)))
    module.routing.held = torch.tensor([0, -1])
    base.register_forward_hook(lambda *_: calls.append(1))
    module(inputs(2, 1))
    assert calls == [1]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_looks_like_what_it_wraps(kind):
    base = make_base(kind)
    module = DualMemoryLinear(base)
    assert module.weight is base.weight and module.bias is base.bias and module.base_layer is base
    assert (module.in_features, module.out_features) == (D_FF, D_OUT)
    module.set_bank(make_bank("neuron", (0.5,)))
    assert {name for name, _ in module.named_parameters()} == {"base_layer.weight", "base_layer.bias"}
    module.requires_grad_(False)
    assert not base.weight.requires_grad and not module.values.requires_grad
    assert "memories=1" in repr(module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_gradients_pass_through(layout, count, held):
    base, memories = make_base(), make_memories(layout, (0.01,) * count)
    module = DualMemoryLinear(base)
    module.set_bank(Bank.join(alike(memories, "leverage"), torch.float32))
    a = inputs(2, 5).requires_grad_()
    expected, choice, _ = in_scope(base, memories, a)
    module.routing.held = choice if held else None
    want = torch.autograd.grad(expected.square().sum(), (a, base.weight))
    got = torch.autograd.grad(module(a).square().sum(), (a, base.weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [nn.Embedding(4, 4), nn.LayerNorm(4), nn.Linear(4, 4).to("meta"), Scaled(4, 4)])
def test_what_cannot_be_wrapped(base):
    with pytest.raises(UnsupportedModelError, match=f"a {type(base).__name__} cannot be wrapped"):
        DualMemoryLinear(base)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("opt")])
def test_from_mlp_wraps_and_restores(family):
    model = tiny_model(family)
    layers = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
    mlp = layers[1].feed_forward if family == "lfm2" else layers[1].mlp
    x = torch.randn(2, 3, 32)
    expected, before = mlp(x), dict(mlp.named_modules())
    ffn = DualMemoryFFN.from_mlp(mlp)
    projection = ffn.projection
    assert projection.in_features == 64 and projection.out_features == 32
    assert torch.equal(ffn(x), expected)
    ffn.projection.set_bank(make_bank("neuron", (0.0,), shape=(32, 64)))
    assert not torch.equal(ffn(x), expected)
    assert ffn.restore() is mlp
    after = dict(mlp.named_modules())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert torch.equal(mlp(x), expected)


def test_from_mlp_takes_a_name_and_a_shared_routing():
    routing = Routing()
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    ffn = DualMemoryFFN.from_mlp(mlp, "0", routing, "max")
    assert isinstance(mlp[0], DualMemoryLinear) and ffn.projection.routing is routing
    assert ffn.projection.reduction == "max"
    ffn.restore()
    for name in ("1", "nothing"):
        with pytest.raises(UnsupportedModelError, match=f"no linear map '{name}' to wrap; it has: 0, 2"):
            DualMemoryFFN.from_mlp(mlp, name)
    with pytest.raises(UnsupportedModelError, match="it has: none"):
        DualMemoryFFN.from_mlp(nn.Sequential(nn.ReLU()))
