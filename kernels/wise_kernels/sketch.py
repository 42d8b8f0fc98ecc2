"""Routing over many memories from sketched norms (neuron layout). A sketch of the response v = a_S V is v G with
G [O, s] of independent N(0, 1/s): ||v G||^2 / ||v||^2 is chi^2_s / s for any v, so a norm is known to within factors
(low, high) at the cost of s instead of O outputs. Exact norms are computed only for the pairs of sequence and memory
that those factors leave open.
"""

import math

import torch
from torch import Tensor

from .checks import autocast, check_neuron, spans
from .route import check_route, choose, reduce_tokens, spread

# The interval is wider by this for the rounding of sketch and product (tf32 keeps 2^-11).
ROUNDING = 2.0**-8
ROWS = 4096


def sketch_values(values: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Sketch a bank of the neuron layout: values G [R, size] fp32, G [O, size] of N(0, 1/size) from `generator` (CPU).

    Sketched rows belong to the columns and memories of their rows of `values`; made once, with the bank. A larger size
    costs as much more and narrows `sketch_bound`. Raises ValueError unless values is [R, O] and size positive.
    """
    if values.dim() != 2 or not values.is_floating_point() or size < 1:
        given = f"{values.dtype} {tuple(values.shape)} and size {size}"
        raise ValueError(f"values must be a floating point [R, O] and size at least 1, got {given}")
    projection = torch.randn(values.shape[1], size, generator=generator) / math.sqrt(size)
    projection = projection.to(values.device)
    # In parts: the bank in fp32 may be twice what the device has left.
    return torch.cat([part.float() @ projection for part in values.split(ROWS)] or [values.new_zeros(0, size).float()])


def sketch_bound(size: int, failure: float) -> tuple[float, float]:
    """Factors (low, high) such that low * sketched <= exact <= high * sketched for one token's norm under one memory,
    except with probability `failure` over the draw of the sketch.

    From the Chernoff bounds of chi^2: P(chi^2_s / s >= q) for q > 1, and P(chi^2_s / s <= q) for q < 1, are at most
    exp(-s/2 (q - 1 - ln q)); each side is given failure / 2. Means and maxima over tokens lie within the same factors
    when all their norms do: for T prompt tokens under J memories, with probability 1 - T J failure. Size 64 and failure
    1e-6 give (.66, 1.77), size 256 (.79, 1.30). Raises ValueError for a size below 1 or a failure outside (0, 1).
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
    found, norms = spans(bounds, columns.shape[0]), a.new_empty(memories, a.shape[0], dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        for j, (start, end) in enumerate(found):
            active = a.index_select(1, columns[start:end]).float()
            norms[j] = torch.linalg.vector_norm(active @ sketched[start:end].float(), dim=1)
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
        sketched: [R, s] of `sketch_values`.
        prompt_mask: [B, T] bool, N = B T; True at prompt tokens. Padding never counts, whatever it holds.
        thresholds: eps_j >= 0, [J] or by sequence [B, J]. Infinity closes a memory.
        within: factors of `sketch_bound`.
        leverage, reduction: as in `route`.

    Returns:
        scores [B, J] fp32, exact or sketched, and choice [B] int64, -1 for the main memory; ties go to the lower index.

    Raises ValueError for shapes, dtypes or devices other than these, and on CPU for bounds that do not lie in `values`.
    """
    a, values = autocast(a, values)
    memories = check_neuron(a, values, columns, bounds)
    if sketched.dim() != 2 or sketched.shape[0] != values.shape[0] or not sketched.is_floating_point():
        raise ValueError(
            f"sketched must be a floating point [{values.shape[0]}, s], got {sketched.dtype} {tuple(sketched.shape)}"
        )
    low, high = within
    if not 0 < low <= 1 <= high:
        raise ValueError(f"within must be factors 0 < low <= 1 <= high, got {within}")
    check_route(memories, a.shape[0], prompt_mask, thresholds, leverage, reduction)
    return _sketched_route(
        a, values, columns, bounds, sketched, prompt_mask, thresholds, low, high, leverage, reduction
    )
