"""Routing over many memories from sketched norms (neuron layout). A sketch of the response v = a_S V is v G with
G [O, s] of independent N(0, 1/s): ||v G||^2 / ||v||^2 is chi^2_s / s for any v, so a norm is known to within factors
(low, high) at the cost of s instead of O outputs. The sketches of all memories are one matrix [F, J s], of zeros where
a memory has no column: one dense product, then norms of J segments. Exact norms are computed only for the pairs of
sequence and memory that the factors leave open.

The product is bound by the matrix units, 2 N F J s operations, against 2 N R s and N R gathered elements were each
memory's columns taken out first. On an H100 (512 and 2048 rows, 141 k columns of 64 memories) the gather took 6 ps an
element, so the dense form is the faster one wherever more than about s / 1700 of a memory's columns are kept.
"""

import math

import torch
from torch import Tensor

from .checks import autocast, check_bounds, check_columns, check_neuron, spans
from .route import check_route, choose, reduce_tokens, spread

# The interval is wider by this for rounding. Sketches in bf16 keep 2^-9 of an entry, a product of two even less; the
# rest is for responses smaller than their terms, 1/8 of what these would add up to with random signs.
ROUNDING = 2.0**-6
ROWS = 4096


def sketch_values(
    values: Tensor, columns: Tensor, bounds: Tensor, width: int, size: int, generator: torch.Generator
) -> Tensor:
    """Sketch a bank of the neuron layout: columns [j s, (j + 1) s) of the result are D_j^T G, G [O, s] of N(0, 1/s)
    from `generator` (CPU).

    Made once, with the bank; it reads the bounds on the host. A larger size costs as much more and narrows
    `sketch_bound`.

    Args:
        values, columns, bounds: the bank, as in `sketched_route`.
        width: F.
        size: s, at least 1.

    Returns:
        [F, J s] in the dtype of `values`.

    Raises ValueError for shapes, dtypes or devices other than these.
    """
    if values.dim() != 2 or not values.is_floating_point() or size < 1:
        given = f"{values.dtype} {tuple(values.shape)} and size {size}"
        raise ValueError(f"values must be a floating point [R, O] and size at least 1, got {given}")
    memories = check_bounds(bounds, values)
    check_columns(columns, values.shape[0])
    projection = torch.randn(values.shape[1], size, generator=generator) / math.sqrt(size)
    projection = projection.to(values.device)
    sketched = values.new_zeros(width, memories, size)
    for j, (start, end) in enumerate(spans(bounds.cpu(), values.shape[0])):
        # In parts: the bank in fp32 may be twice what the device has left.
        for rows in range(start, end, ROWS):
            part = slice(rows, min(rows + ROWS, end))
            sketched[columns[part], j] = (values[part].float() @ projection).to(values.dtype)
    return sketched.flatten(1)


def rough_norms(a: Tensor, sketched: Tensor, memories: int) -> Tensor:
    """[J, N] fp32 norms of the sketches of a [N, F] under J > 0 memories."""
    product = (a @ sketched).unflatten(1, (memories, -1))
    return torch.linalg.vector_norm(product, dim=2, dtype=torch.float32).t()


def sketch_bound(size: int, failure: float) -> tuple[float, float]:
    """Factors (low, high) such that low * sketched <= exact <= high * sketched for one token's norm under one memory,
    except with probability `failure` over the draw of the sketch.

    From the Chernoff bounds of chi^2: P(chi^2_s / s >= q) for q > 1, and P(chi^2_s / s <= q) for q < 1, are at most
    exp(-s/2 (q - 1 - ln q)); each side is given failure / 2. Means and maxima over tokens lie within the same factors
    when all their norms do: for T prompt tokens under J memories, with probability 1 - T J failure. Size 16 and failure
    1e-6 give (.48, 4.0), size 64 (.65, 1.79), size 256 (.79, 1.32). Raises ValueError for a size below 1 or a failure
    outside (0, 1).
    """
    if size < 1 or not 0 < failure < 1:
        raise ValueError(f"size must be at least 1 and failure in (0, 1), got {size} and {failure}")
    wanted = 2 / size * math.log(2 / failure)
    roots = []
    for low, high in ((math.exp(-1 - wanted), 1.0), (1.0, 4 + 4 * wanted)):
        for _ in range(200):
            middle = (low + high) / 2
            outside = middle - 1 - math.log(middle) > wanted
            low, high = (middle, high) if outside == (middle < 1) else (low, middle)
        roots.append(low if low < 1 else high)
    return 1 / math.sqrt(roots[1]) * (1 - ROUNDING), 1 / math.sqrt(roots[0]) * (1 + ROUNDING)


def contend(scores: Tensor, thresholds: Tensor, low: float, high: float) -> Tensor:
    """What sketched scores [B, J] leave open, [B, J] int32: 0 the memory cannot be chosen, 2 it is, 1 its exact score
    decides."""
    thresholds = thresholds.float()
    possible, certain = scores * high > thresholds, scores * low > thresholds
    ratio = scores / thresholds
    beaten = torch.where(certain, ratio * low, -torch.inf).amax(-1, keepdim=True) > ratio * high
    possible = possible & ~beaten
    certain = certain & (possible.sum(-1, keepdim=True) == 1)
    return possible.to(torch.int32) * (1 + certain.to(torch.int32))


@torch.library.custom_op("wise::sketched_route", mutates_args=())
def _sketched_route(
    a: Tensor,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    sketched: Tensor,
    prompt_mask: Tensor,
    thresholds: Tensor,
    low: float,
    high: float,
    leverage: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    batch, memories = prompt_mask.shape[0], bounds.shape[0] - 1
    if memories == 0 or batch == 0:
        return a.new_zeros(batch, memories, dtype=torch.float32), bounds.new_full((batch,), -1)
    found, norms = spans(bounds, columns.shape[0]), rough_norms(a, sketched, memories)
    scores = reduce_tokens(norms, prompt_mask, reduction).contiguous()
    divisor = torch.ones_like(scores) if leverage is None else spread(leverage, prompt_mask)
    scores = scores / divisor
    states = contend(scores, thresholds, low, high)
    by_sequence = a.unflatten(0, prompt_mask.shape)
    for j in (states == 1).any(0).nonzero().flatten().tolist():
        start, end = found[j]
        open_j = states[:, j] == 1
        rows = by_sequence[open_j].flatten(0, 1)
        exact = torch.linalg.vector_norm(rows[:, columns[start:end]] @ values[start:end], dim=1, dtype=torch.float32)
        scores[open_j, j] = reduce_tokens(exact[None], prompt_mask[open_j], reduction)[:, 0] / divisor[open_j, j]
    return scores, choose(scores, (states > 0) & (scores > thresholds.float()), thresholds)


@_sketched_route.register_kernel("cuda")
def _(a, values, columns, bounds, sketched, prompt_mask, thresholds, low, high, leverage, reduction):
    from .gpu import sketch

    return sketch.sketched_route(
        a, values, columns, bounds, sketched, prompt_mask, thresholds, low, high, leverage, reduction
    )


@_sketched_route.register_fake
def _(a, values, columns, bounds, sketched, prompt_mask, thresholds, low, high, leverage, reduction):
    batch, memories = prompt_mask.shape[0], bounds.shape[0] - 1
    return a.new_empty(batch, memories, dtype=torch.float32), bounds.new_empty(batch)


def sketched_route(
    a: Tensor,
    values: Tensor,
    columns: Tensor,
    bounds: Tensor,
    sketched: Tensor,
    prompt_mask: Tensor,
    thresholds: Tensor,
    within: tuple[float, float],
    leverage: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """`route` for a bank of many memories, whose norms are sketched first and exact where that does not decide.

    The exact norm is computed, on the device and for that sequence and memory alone, wherever the threshold lies within
    the bound of a sketched score that could still win, or several scores in scope lie within the bound of the largest.
    The choice is that of exact norms except with probability T J failure a sequence (`sketch_bound`), for activations
    that do not depend on the draw of the sketch. Not differentiable.

    Args:
        a: [N, F] activations, fp32, fp16 or bf16, any strides.
        values: [R, O] in the dtype of `a`; row r is column `columns[r]` of its memory's D.
        columns: [R] int64 in [0, F).
        bounds: [J + 1] int64 on the device of the bank; rows bounds[j]:bounds[j+1] belong to memory j.
        sketched: [F, J s] of `sketch_values`, in the dtype of `a`.
        prompt_mask: [B, T] bool, N = B T; True at prompt tokens. Padding never counts, whatever it holds.
        thresholds: eps_j >= 0, [J] or by sequence [B, J]. Infinity closes a memory.
        within: factors of `sketch_bound`.
        leverage, reduction: as in `route`.

    Returns:
        scores [B, J] fp32, exact or sketched, and choice [B] int64, -1 for the main memory; ties go to the lower index.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not lie in `values`.
    """
    a, values, sketched = autocast(a, values, sketched)
    memories = check_neuron(a, values, columns, bounds)
    wanted = sketched.dim() == 2 and sketched.shape[0] == a.shape[1] and sketched.dtype == a.dtype
    if not wanted or sketched.shape[1] % max(memories, 1) or (sketched.shape[1] > 0) != (memories > 0):
        expected = f"{a.dtype} [{a.shape[1]}, s] of {memories} memories side by side"
        raise ValueError(f"sketched must be {expected}, got {sketched.dtype} {tuple(sketched.shape)}")
    low, high = within
    if not 0 < low <= 1 <= high:
        raise ValueError(f"within must be factors 0 < low <= 1 <= high, got {within}")
    check_route(memories, a.shape[0], prompt_mask, thresholds, leverage, reduction)
    return _sketched_route(
        a, values, columns, bounds, sketched, prompt_mask, thresholds, low, high, leverage, reduction
    )
