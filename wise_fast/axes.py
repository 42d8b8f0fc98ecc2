"""Where sequences and tokens are in a tensor that some module of a model returned, and picking some of them.

Sizes cannot tell ([T, T] of T sequences, [1, T] of one), so outputs for two batches of different shapes are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

SHAPES = (2, 3), (3, 5)  # of the two batches, [sequences, tokens]


@dataclass(frozen=True)
class Axis:
    """Dimensions of a taped tensor.

    Attributes:
        batch: the one over the sequences, or over the tokens of all of them; None for what all sequences share.
        flat: whether it runs over the tokens of all.
        tokens: those over the tokens of one sequence.
    """

    batch: int | None
    flat: bool
    tokens: tuple[int, ...]


def axes_of(one, two) -> list[Axis]:
    """The dimensions of a module's output, from its outputs for the two batches of `SHAPES`."""
    axes = []
    for a, b in zip(tree_flatten(one)[0], tree_flatten(two)[0], strict=True):
        sizes = list(zip(a.shape, b.shape)) if isinstance(a, Tensor) else []
        batch = next((i for i, size in enumerate(sizes) if size in ((2, 3), (6, 15))), None)
        flat = batch is not None and sizes[batch] == (6, 15)
        axes.append(Axis(batch, flat, tuple(i for i, size in enumerate(sizes) if size == (3, 5))))
    return axes


def _picked(value, axis: Axis, index: Tensor, length: int, width: int):
    """The chosen sequences' first `width` of `length` tokens of a taped value."""
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
