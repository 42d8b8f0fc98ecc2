"""dual_forward, route and gated_add_ in a row, as a served FFN calls them: one graph, exportable, trainable."""

import pytest
import torch
import torch.nn.functional as F
from kernel_banks import OUTPUTS, WIDTH, element_bank, neuron_bank, normal

from wise_kernels import dual_forward, dual_forward_element, gated_add_, gated_add_element_, route

LAYOUTS = {
    "neuron": (dual_forward, gated_add_, neuron_bank, (20, 7)),
    "element": (dual_forward_element, gated_add_element_, element_bank, (0.3, 0.2)),
}
WEIGHT = normal(OUTPUTS, WIDTH, seed=5)


class Served(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.dual, self.add, make, sizes = LAYOUTS[layout]
        values, where, bounds = make(sizes)
        self.values = torch.nn.Parameter(values)
        self.register_buffer("where", where)
        self.register_buffer("bounds", bounds)

    def forward(self, a, mask, thresholds):
        y, side, norms = self.dual(a, WEIGHT, None, self.values, self.where, self.bounds)
        scores, choice = route(norms, mask, thresholds)
        self.add(y, a, self.values, self.where, self.bounds, choice, side)
        return y, scores, choice


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_one_graph_serves_every_length(layout):
    served, thresholds = Served(layout), torch.tensor([4.0, 4.0])
    torch._dynamo.reset()
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager", dynamic=True)
    for stance, tokens in (("default", 6), ("fail_on_recompile", 11)):
        a, mask = normal(2 * tokens, WIDTH), torch.ones(2, tokens, dtype=torch.bool)
        with torch.compiler.set_stance(stance):
            got = compiled(a, mask, thresholds)
        for g, e in zip(got, served(a, mask, thresholds), strict=True):
            assert torch.equal(g, e)
    exported = torch.export.export(served, (a, mask, thresholds)).module()
    assert torch.equal(exported(a, mask, thresholds)[0], got[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_of_scope_is_the_unedited_model(layout):
    a, mask = normal(12, WIDTH), torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        y, scores, choice = Served(layout)(a, mask, torch.full((2,), float("inf")))
    assert torch.equal(y, F.linear(a, WEIGHT)) and (choice == -1).all() and (scores > 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_compile(layout):
    served, a, mask = Served(layout), normal(12, WIDTH), torch.ones(2, 6, dtype=torch.bool)

    def loss(a):
        y, scores, _ = served(a, mask, torch.tensor([0.0, 0.0]))
        return y.square().sum() + scores.sum()

    leaves = [a.requires_grad_(), served.values]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(a), leaves), torch.autograd.grad(loss(a), leaves), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert got.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_changed_bank_does_not_recompile(layout, trained):
    dual, add, make, sizes = LAYOUTS[layout]
    a, mask, thresholds = normal(12, WIDTH), torch.ones(2, 6, dtype=torch.bool), torch.tensor([4.0, 4.0])

    def serve(a, values, where, bounds):
        y, side, norms = dual(a, WEIGHT, None, values, where, bounds, response=False)
        scores, choice = route(norms, mask, thresholds)
        add(y, a, values, where, bounds, choice)
        return y, scores

    torch._dynamo.reset()
    compiled = torch.compile(serve, fullgraph=True, backend="aot_eager")
    other = (13, 30) if layout == "neuron" else (0.1, 0.6)
    for stance, bank in (("default", make(sizes)), ("fail_on_recompile", make(other, seed=3))):
        bank[0].requires_grad_(trained)
        torch._dynamo.mark_dynamic(bank[0], 0)
        if layout == "neuron":
            torch._dynamo.mark_dynamic(bank[1], 0)
        with torch.compiler.set_stance(stance):
            got = compiled(a, *bank)
        expected = serve(a, *bank)
        assert (expected[0] != F.linear(a, WEIGHT)).any()
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)
        if trained:
            gradients = [torch.autograd.grad(y.square().sum() + s.sum(), bank[0])[0] for y, s in (got, expected)]
            torch.testing.assert_close(*gradients)
