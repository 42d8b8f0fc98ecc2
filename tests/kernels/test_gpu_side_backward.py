"""Gradients of several memories without the host: the kernels of the neuron layout, and the form of the element layout
that a device runs, against those that read the bounds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import OUTPUTS, WIDTH, element_bank, neuron_bank, normal
from tolerances import DTYPES, assert_fp32, assert_within
from torch.utils._python_dispatch import TorchDispatchMode

from wise_kernels import dual_forward, side_forward, side_forward_element
from wise_kernels.checks import spans
from wise_kernels.side_forward import _grad_response, _span_by_span, element_backward

gpu = pytest.importorskip("wise_kernels.gpu.side_backward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given_gradients(a, bank, forward, response):
    side, norms = forward(a, *bank, response=response)
    return normal(*side.shape, seed=4, dtype=a.dtype), normal(*norms.shape, seed=5), side, norms


def check(sizes, tokens, dtype=torch.float32, response=True, outputs=OUTPUTS, width=WIDTH, room=0):
    values, columns, bounds = neuron_bank(sizes, width=width, outputs=outputs, dtype=dtype)
    if room:  # rows of no memory, behind the last bound
        values, columns = torch.cat([values, values[:room]]), torch.cat([columns, columns[:room]])
    a = normal(2 * width, tokens, seed=2, dtype=dtype).t()[:, ::2]
    grad_side, grad_norms, side, norms = given_gradients(a, (values, columns, bounds), side_forward, response)
    wide = [t.float() for t in (grad_side, grad_norms, a, values)]
    expected = _span_by_span(*wide, columns, bounds, side.float(), norms, response)
    plain = _span_by_span(grad_side, grad_norms, a, values, columns, bounds, side, norms, response)
    moved = [t.to(DEVICE) for t in (a, values, columns, bounds)]
    responses = side.to(DEVICE) if response else gpu.responses(*moved)
    given = grad_side.to(DEVICE) if response else None
    got = gpu.side_backward(_grad_response(responses, norms.to(DEVICE), given, grad_norms.to(DEVICE)), *moved)
    for g, p, e in zip(got, plain, expected, strict=True):
        assert g.dtype == dtype and g.shape == e.shape
        assert_within(g.cpu(), p, e, dtype)
    if room:
        assert not got[1][-room:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("response", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_neuron_layout(device, poisoned, tokens, response, dtype):
    check((20, 0, 7), tokens, dtype, response)


def test_many_columns_outputs_and_memories(device, poisoned):
    check((130, 64, 1, 63), 20, outputs=133, width=300)
    check((3,) * 66, 3)
    check((20, 7, 0), 5, room=3)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4), st.integers(1, 9), st.booleans())
def test_ragged_banks(sizes, tokens, response):
    check(sizes, tokens, response=response)


def test_empty(device):
    for sizes, tokens in (((), 3), ((0, 0), 3), ((3, 2), 0)):
        values, columns, bounds = neuron_bank(sizes)
        got = gpu.side_backward(normal(len(sizes), tokens, OUTPUTS), normal(tokens, WIDTH), values, columns, bounds)
        assert not any(g.any() for g in got) and got[1].shape == values.shape


@pytest.mark.parametrize("response", [True, False])
@pytest.mark.parametrize("sizes", [(0.5, 0.0, 1.0), (0.2, 0.2)])
def test_element_layout(sizes, response):
    bank, a = element_bank(sizes), normal(5, WIDTH)
    grad_side, grad_norms, side, norms = given_gradients(a, bank, side_forward_element, response)
    both = [
        element_backward(grad_side, grad_norms, a, *bank, side, norms, response, found)
        for found in (spans(bank[2], bank[0].shape[0]), None)
    ]
    for got, expected in zip(*both, strict=True):
        assert_fp32(got, expected)


class NothingRead(TorchDispatchMode):
    """Refuses what would wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = any(name in str(func) for name in self.WAITING)
        masked = str(func).startswith("aten.index") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool
            for t in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        assert not waits and not masked, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("response", [True, False])
def test_element_layout_reads_nothing_on_the_host(response):
    bank, a = element_bank((0.5, 0.0, 1.0)), normal(5, WIDTH)
    given = given_gradients(a, bank, side_forward_element, response)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingRead():
        bank[2][1].item()
    with NothingRead():
        element_backward(given[0], given[1], a, *bank, *given[2:], response, None)


@pytest.mark.gpu
@pytest.mark.parametrize("forward", [side_forward, side_forward_element, dual_forward])
def test_autograd_of_several_memories_waits_for_nothing(forward):
    bank = element_bank((0.5, 0.2)) if forward is side_forward_element else neuron_bank((20, 7))
    values, layout, bounds = (t.cuda() for t in bank)
    a = normal(40, WIDTH).cuda().requires_grad_()
    more = (normal(OUTPUTS, WIDTH).cuda(), None) if forward is dual_forward else ()
    out = forward(a, *more, values.requires_grad_(), layout, bounds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = torch.autograd.grad(sum(o.sum() for o in out), (a, values))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(g.isfinite().all() for g in grads)
