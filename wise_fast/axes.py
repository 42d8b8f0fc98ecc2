"""Where sequences and tokens are in a tensor that some module of a model returned, and picking some of them.

Sizes cannot tell ([T, T] of T sequences, [1, T] of one), so outputs for two batches of different shapes are compared.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

SHAPES = (2, 3), (3, 5)  # of the two batches, [sequences, tokens]


@dataclass(frozen=True)
class Axis:
    """Dimensions of a taped tensor.

    Attributes:
        batch: the one over the sequences, or over the tokens of all of them; None for what all sequences share.
        flat: whether it runs over the tokens of all.
        tokens: those over the tokens of one sequence.
        read: whether a replay reads the tensor, so that a tape has to keep it.
    """

    batch: int | None
    flat: bool
    tokens: tuple[int, ...]
    read: bool = True


def axes_of(one, two) -> list[Axis]:
    """The dimensions of a module's output, from its outputs for the two batches of `SHAPES`."""
    axes = []
    for a, b in zip(tree_flatten(one)[0], tree_flatten(two)[0], strict=True):
        sizes = list(zip(a.shape, b.shape)) if isinstance(a, Tensor) else []
        batch = next((i for i, size in enumerate(sizes) if size in ((2, 3), (6, 15))), None)
        flat = batch is not None and sizes[batch] == (6, 15)
        axes.append(Axis(batch, flat, tuple(i for i, size in enumerate(sizes) if size == (3, 5))))
    return axes


def differentiable(output):
    """A module's output with leaves of autograd in place of its numbers."""
    return tree_map(lambda value: value.detach().requires_grad_() if _floats(value) else value, output)


def read_of(output, axes: list[Axis], read: Collection[int]) -> list[Axis]:
    """The axes of a module's output, given the ids of its `differentiable` tensors that are read."""
    values = tree_flatten(output)[0]
    return [replace(axis, read=not _floats(v) or id(v) in read) for v, axis in zip(values, axes, strict=True)]


def kept(output, axes: list[Axis]):
    """What a tape keeps of a module's output: of a tensor that is not read one token of NaN in the place of all."""
    leaves, structure = tree_flatten(output)
    return tree_unflatten([_kept(value, axis) for value, axis in zip(leaves, axes, strict=True)], structure)


def _floats(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _kept(value, axis: Axis):
    if axis.read or not _floats(value):
        return value
    one = [1 if i == axis.batch or i in axis.tokens else n for i, n in enumerate(value.shape)]
    return value.new_full(one, torch.nan).expand(value.shape)


def _picked(value, axis: Axis, index: Tensor, length: int, width: int):
    """The chosen sequences' first `width` of `length` tokens of a taped value."""
    if not isinstance(value, Tensor):
        return value
    if not axis.read:
        sizes = dict.fromkeys(axis.tokens, width) | {axis.batch: len(index) * (width if axis.flat else 1)}
        one = value[tuple(slice(1) if dim in sizes else slice(None) for dim in range(value.ndim))]
        return one.expand([sizes.get(dim, size) for dim, size in enumerate(value.shape)])
    for dim in axis.tokens:
        value = value.narrow(dim, 0, width)
    if axis.batch is None:
        return value
    index = index.to(value.device)
    if not axis.flat:
        return value.index_select(axis.batch, index)
    dim = axis.batch
    return value.unflatten(dim, (-1, length)).index_select(dim, index).narrow(dim + 1, 0, width).flatten(dim, dim + 1)


def pick(output, axes: list[Axis], index: Tensor, length: int, width: int):
    """The chosen sequences' first `width` of `length` tokens of a module's output."""
    leaves, structure = tree_flatten(output)
    picked = [_picked(value, axis, index, length, width) for value, axis in zip(leaves, axes, strict=True)]
    return tree_unflatten(picked, structure)
