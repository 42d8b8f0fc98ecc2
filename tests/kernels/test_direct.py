"""On the CPU: ops are called past the dispatcher where nobody looks, and what is kept of a mask follows the mask."""

import pytest
import torch
from kernel_banks import OUTPUTS, WIDTH, element_bank, neuron_bank, normal
from tolerances import DTYPES, assert_fp32, assert_within
from torch.utils._python_dispatch import TorchDispatchMode

from wise_kernels import gated_add_, keeps_response, pack_bits, reference, route, side_forward, side_forward_element
from wise_kernels.bits import _KEPT, positions, sparse_rows, unpack_bits
from wise_kernels.checks import direct
from wise_kernels.side_forward import FEW_ROWS


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_who_looks_sees_the_op():
    bank, a = neuron_bank((5, 3)), normal(4, WIDTH)
    expected = side_forward(a, *bank)
    with Seen() as seen:
        got = side_forward(a, *bank)
        gated_add_(normal(4, OUTPUTS), a, *bank, torch.tensor([0, -1]))
        route(got[1], torch.ones(2, 2, dtype=torch.bool), torch.ones(2))
    assert {"wise.side_forward.default", "wise.gated_add_.default", "wise.route.default"} <= seen.names
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


def test_only_plain_tensors_without_a_gradient():
    a, graded = normal(2), normal(2).requires_grad_()
    assert direct(a, None, torch.nn.Parameter(a, requires_grad=False))
    assert not direct(graded) and not direct(a, torch.empty(2, device="meta"))
    with torch.no_grad():
        assert direct(graded)
    assert side_forward(normal(4, WIDTH).requires_grad_(), *neuron_bank((5,)))[1].requires_grad


def test_a_mask_that_changed_is_found_again():
    values, bits, bounds = element_bank((0.5,))
    a, mask = normal(4, WIDTH), unpack_bits(bits, WIDTH)
    side_forward_element(a, values, bits, bounds)
    bits.copy_(pack_bits(mask.flip(2)))
    dense = reference.dense_element(values, bits, bounds, WIDTH)
    assert_fp32(side_forward_element(a, values, bits, bounds)[0], reference.dual_forward(a, dense[0], None, dense)[1])


def test_views_share_what_is_kept_and_nothing_outlives_its_mask():
    before = len(_KEPT)
    bits = element_bank((0.5, 0.2))[1]
    first = sparse_rows(bits[1][None], WIDTH, 0)
    assert sparse_rows(bits[1][None], WIDTH, 0)[1] is first[1]
    assert sparse_rows(bits[:1], WIDTH, 0)[1] is not first[1]
    assert positions(bits[1], WIDTH).tolist() == unpack_bits(bits[1], WIDTH).flatten().nonzero()[:, 0].tolist()
    del bits
    assert len(_KEPT) == before
    with torch.inference_mode():
        positions(element_bank((0.5,))[1][0], WIDTH)
    assert len(_KEPT) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_both_products_of_the_element_layout(rows, dtype):
    values, bits, bounds = element_bank((0.5, 0.2), dtype=dtype)
    a, dense = normal(rows, WIDTH, seed=3, dtype=dtype), reference.dense_element(values, bits, bounds, WIDTH)
    side = side_forward_element(a, values, bits, bounds)[0]
    plain = torch.stack([a @ d.to(dtype).t() for d in dense])
    assert_within(side, plain, reference.dual_forward(a, dense[0], None, dense)[1], dtype)


def test_a_mask_of_other_values_is_refused():
    values, bits, bounds = element_bank((0.5,))
    with pytest.raises(ValueError, match="weights in the mask"):
        side_forward_element(normal(2, WIDTH), values[:-1], bits, torch.tensor([0, len(values) - 1]))


def test_responses_are_kept_of_one_memory_and_of_few_on_the_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert keeps_response(1, 1 << 20, 1 << 12, cpu) and keeps_response(1, 1, 1, cuda)
    assert keeps_response(4, 64, 640, cpu) and not keeps_response(4, 64, 640, cuda)
    assert not keeps_response(64, 2048, 640, cpu)
