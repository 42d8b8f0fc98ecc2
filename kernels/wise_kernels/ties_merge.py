"""TIES merge of shards (Yadav et al. 2023, arXiv 2306.01708) kept compact: shard i has values [n_i, m] at the sorted
rows index_i [n_i] of a larger matrix, zeros elsewhere. Trim: in each shard keep |v| >= tau_i, its k_i-th largest
magnitude. Elect: gamma = sign(sum_i v_i). Merge: mean of w_i v_i over the shards with sign(v_i) = gamma. The result
[n, m] lives on the union of the rows. Shards stream through [n, m] accumulators; they are never stacked.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Rows of the matrix for each of the shards' beyond which a map of them costs more than sorting these.
SPARSE = 64


def _keep(size: int, density: float) -> int:
    """k = density * size rounded half up, at least 1 and at most the size."""
    return min(size, max(1, int(density * size + 0.5)))


def _threshold(shard: Tensor, density: float) -> Tensor:
    """tau: the k-th largest magnitude of `shard` as a 0-d tensor; an entry of the shard, so >= is exact."""
    below = shard.numel() - _keep(shard.numel(), density)
    magnitude = shard.abs().flatten()
    if shard.device.type != "cpu" or shard.dtype == torch.float64:
        return magnitude.kthvalue(below + 1).values
    # The bits of |v| order as |v| does, and numpy selects among integers 15 times faster than kthvalue among floats.
    bits = magnitude.view(torch.int32 if shard.element_size() == 4 else torch.int16).int()
    tau = torch.tensor(np.partition(bits.numpy(), below)[below])
    return tau.to(torch.int32 if shard.element_size() == 4 else torch.int16).view(shard.dtype)


def _union(index: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Sorted union of the shards' rows, and what finds rows in it: by a map over the matrix's rows where that is not
    much longer than the shards, for sorting and bisecting take ten times as long."""
    every = torch.cat(list(index))
    last = int(every.max()) if every.numel() else 0
    if last >= SPARSE * every.numel():
        union = every.unique()
        return union, lambda rows: torch.searchsorted(union, rows)
    held = every.new_zeros(last + 1, dtype=torch.bool).index_fill_(0, every, True)
    # numpy's nonzero takes a tenth of the time.
    union = torch.from_numpy(np.flatnonzero(held.numpy())) if held.device.type == "cpu" else held.nonzero().squeeze(1)
    place = every.new_empty(last + 1, dtype=torch.int32)
    place.scatter_(0, union, torch.arange(union.shape[0], dtype=torch.int32, device=union.device))
    return union, lambda rows: place.index_select(0, rows)


def _trimmed(values: Sequence[Tensor], index: Sequence[Tensor], taus: list, find: Callable) -> Iterator:
    for i, (shard, rows, tau) in enumerate(zip(values, index, taus, strict=True)):
        if shard.numel():
            # A product, because torch.where and masked_fill are several times slower on the CPU.
            kept = (shard * (shard.abs() >= tau)).float()
            yield i, kept, find(rows)


def _check_sorted(index: Sequence[Tensor]) -> None:
    for i, rows in enumerate(index):
        # A repeated row would be added twice by index_add_; reading the answer back is fine outside of serving.
        if rows.numel() and not bool((rows[1:] > rows[:-1]).all()):
            raise ValueError(f"index[{i}] must be sorted and without repeats")


def _merge(
    values: Sequence[Tensor], index: Sequence[Tensor], density: float, weights: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    _check_sorted(index)
    weights = [1.0] * len(values) if weights is None else weights
    single = values[0].shape[1] == 1
    if single:  # index_add_ of rows of one entry takes fifty times as long
        values = [shard.squeeze(1) for shard in values]
    union, find = _union(index)
    taus = [_threshold(shard, density) if shard.numel() else None for shard in values]
    shape = (union.shape[0], *values[0].shape[1:])
    # fp64: a rounding that depends on the order of the shards could otherwise flip a close election.
    mass = values[0].new_zeros(shape, dtype=torch.float64)
    for _, kept, where in _trimmed(values, index, taus, find):
        mass.index_add_(0, where, kept.double())
    # Two flags an entry are all the second pass over the shards needs of the election.
    plus, minus = mass > 0, mass < 0
    del mass
    total, count = (values[0].new_zeros(shape, dtype=torch.float32) for _ in range(2))
    for i, kept, where in _trimmed(values, index, taus, find):
        agree = ((kept > 0) & plus.index_select(0, where)).logical_or_((kept < 0) & minus.index_select(0, where))
        total.index_add_(0, where, kept * agree, alpha=weights[i])
        count.index_add_(0, where, agree.float(), alpha=weights[i])
    # Where nobody agrees both are 0, and the quotient is 0 / 1.
    merged = total.div_(count.add_(count == 0))
    merged = merged.to(values[0].dtype)
    return merged.unsqueeze(1) if single else merged, union


@torch.library.custom_op("wise::ties_merge", mutates_args=())
def _ties_merge(
    values: Sequence[Tensor], index: Sequence[Tensor], density: float, weights: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    return _merge(values, index, density, weights)


@_ties_merge.register_kernel("cuda")
def _(values, index, density, weights):
    from .gpu import ties_merge as gpu

    if not gpu.supported(values):
        return _merge(values, index, density, weights)
    keep = [_keep(shard.numel(), density) for shard in values]
    return gpu.ties_merge(values, index, keep, [1.0] * len(values) if weights is None else weights)


@_ties_merge.register_fake
def _(values, index, density, weights):
    # The size of the union is known only from the data.
    rows = torch.library.get_ctx().new_dynamic_size()
    return values[0].new_empty(rows, values[0].shape[1]), index[0].new_empty(rows)


def ties_merge(
    values: Sequence[Tensor], index: Sequence[Tensor], density: float, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """TIES: trim each shard by magnitude, elect a sign for every entry, average the entries that agree with it.

    Where the paper leaves room: a shard's trim counts its own n_i * m entries (k = density * n_i * m, rounded half
    up, at least 1) and keeps every entry that equals the k-th magnitude, so ties may keep more than k. The sign is
    that of the plain sum of the trimmed values, one vote by mass and not by count; `weights` do not enter it. Where
    the sum is exactly 0 no sign wins and the entry is 0. Zeros agree with neither sign and do not count in the mean.

    Args:
        values: k >= 1 tensors [n_i, m], one dtype and one m. The element layout has m = 1.
        index: k tensors [n_i] int64, sorted, without repeats: the rows (or flat positions) of the values.
        density: share of each shard's entries to keep, in (0, 1].
        weights: k positive weights of the disjoint mean, or None for equal ones.

    Returns:
        values [n, m] in the dtype of the shards and index [n], the sorted union of the shards' rows. n depends on the
        data: under torch.compile(fullgraph=True) it needs capture_dynamic_output_shape_ops.

    Raises ValueError for shapes, dtypes, a density or weights other than these, or an index that is not sorted.
    """
    if len(values) == 0 or len(values) != len(index):
        raise ValueError(f"need one index for each of at least one shard, got {len(values)} and {len(index)}")
    for shard, rows in zip(values, index, strict=True):
        if shard.dim() != 2 or shard.shape[1] != values[0].shape[1] or shard.dtype != values[0].dtype:
            expected = f"{values[0].dtype} [n, {values[0].shape[-1]}]"
            raise ValueError(f"every shard must be {expected}, got {shard.dtype} {tuple(shard.shape)}")
        if rows.dtype != torch.int64 or rows.dim() != 1 or rows.shape[0] != shard.shape[0]:
            raise ValueError(f"index must be int64 [{shard.shape[0]}], got {rows.dtype} {tuple(rows.shape)}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if weights is not None and (len(weights) != len(values) or min(weights) <= 0):
        raise ValueError(f"weights must be {len(values)} positive numbers, got {list(weights)}")
    weights = None if weights is None else [float(w) for w in weights]
    return _ties_merge(list(values), list(index), float(density), weights)
