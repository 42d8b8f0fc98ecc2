"""Random banks of memories in both layouts, for the kernel tests."""

from itertools import accumulate

import torch

from wise_kernels import pack_bits

WIDTH, OUTPUTS = 63, 7


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def bounds_of(sizes):
    return torch.tensor([0, *accumulate(sizes)])


def neuron_bank(sizes, width=WIDTH, outputs=OUTPUTS, dtype=torch.float32, seed=0):
    """values [R, O], columns [R], bounds of memories with `sizes` columns each."""
    rng = generator(seed)
    taken = [torch.randperm(width, generator=rng)[:size].sort().values for size in sizes]
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *taken])
    return normal(len(columns), outputs, seed=seed + 1, dtype=dtype), columns, bounds_of(sizes)


def element_bank(densities, width=WIDTH, outputs=OUTPUTS, dtype=torch.float32, seed=0):
    """values [V], bits [J, O, W], bounds of memories with these mask densities."""
    rng = generator(seed)
    masks = [torch.rand(outputs, width, generator=rng) < density for density in densities]
    bounds = bounds_of(int(mask.sum()) for mask in masks)
    stacked = torch.stack(masks) if masks else torch.zeros(0, outputs, width, dtype=torch.bool)
    return normal(bounds[-1], seed=seed + 1, dtype=dtype), pack_bits(stacked), bounds


NEURON_SIZES = [(), (13,), (20, 0, 7)]
ELEMENT_DENSITIES = [(), (0.2,), (0.5, 0.0, 1.0)]
