"""Bit masks: the word layout by hand, and the round trip for any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_banks import generator

from wise_kernels import pack_bits, unpack_bits
from wise_kernels.bits import scatter_packed, unpack_dense


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 100), st.integers(0, 2**20))
def test_round_trip(rows, width, seed):
    mask = torch.rand(rows, width, generator=generator(seed)) < 0.3
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (rows, -(-width // 32))
    assert torch.equal(unpack_bits(bits, width), mask)


@pytest.mark.parametrize("column", [0, 1, 31, 32, 40])
def test_bit_of_a_column(column):
    mask = torch.zeros(1, 41, dtype=torch.bool)
    mask[0, column] = True
    word = int(pack_bits(mask)[0, column // 32]) & 0xFFFFFFFF
    assert word == 1 << (column % 32)
    assert int(pack_bits(mask)[0, 1 - column // 32]) == 0


def test_strided_masks():
    mask = (torch.rand(70, 9, generator=generator(0)) < 0.5).t()
    assert torch.equal(unpack_bits(pack_bits(mask), 70), mask)


def test_scatter_packed_is_row_major_over_blocks():
    mask = torch.rand(6, 40, generator=generator(1)) < 0.4
    dense = torch.arange(240.0).view(6, 40)
    packed, start = torch.full((int(mask.sum()) + 1,), float("nan")), torch.zeros((), dtype=torch.int64)
    for low in (0, 4):
        start = scatter_packed(packed, dense[low : low + 4], mask[low : low + 4], start)
    assert int(start) == mask.sum() and torch.equal(packed[:-1], dense[mask])
    assert torch.equal(unpack_dense(packed[:-1], pack_bits(mask), 40), dense * mask)


def test_errors():
    with pytest.raises(ValueError, match="bool"):
        pack_bits(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[..., 2\] for width 33"):
        unpack_bits(torch.zeros(1, 1, dtype=torch.int32), 33)
