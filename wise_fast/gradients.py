"""Whether gradients pass through what lies behind the edited projection: inference kernels of some quantized layers
have none, and say nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wise_fast import place
from wise_fast.architectures import Architecture
from wise_fast.errors import UnsupportedModelError

_SLACK = 0.25  # activations may be rounded to eight bits
_ROWS = (1, 3, 16, 64)


def require_gradients(model: nn.Module, architecture: Architecture, dtype: torch.dtype) -> dict[str, int]:
    """Raise unless edits can be trained through the quantized layers behind the projection; one of each kind is asked.

    Args:
        dtype: of the activations.

    Returns:
        By name, the layers whose kernel for few rows has no gradient, while that for more has (GGUF's), and how many
        rows they want at least.

    Raises:
        UnsupportedModelError: a layer's gradient is missing or is not that of its output.
    """
    layers: dict[str, nn.Module] = {}
    for part in (*architecture.layers[architecture.layer + 1 :], architecture.head):
        inside = model.get_submodule(part).named_modules(prefix=part)
        layers.update((name, module) for name, module in inside if place.is_quantized(module))
    fewest: dict[tuple, int | None] = {}
    for module in layers.values():
        if _kind(module) in fewest:
            continue
        fewest[_kind(module)] = found = _fewest_rows(module, dtype)
        if found is None:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise UnsupportedModelError(
                f"no right gradient passes through the quantized {kind} on {place.device_of(module)}, so nothing can "
                "be taught through it; saved edits can be served. Edit with another quantization, on a device where it "
                "can be trained (bitsandbytes in 4 bits: not on a CPU), or with the last layer as WiseConfig.layer"
            )
    return {name: fewest[_kind(module)] for name, module in layers.items() if fewest[_kind(module)] > _ROWS[0]}


def with_rows(count: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A linear map's forward that repeats the first of its rows until there are `count`, where a gradient is wanted."""

    def repeated(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not x.requires_grad or not 0 < rows < count:
            return forward(x)
        flat = x.reshape(rows, -1)
        y = forward(torch.cat([flat, flat[:1].expand(count - rows, -1)]))
        return y[:rows].reshape(*x.shape[:-1], -1)

    return repeated


def _kind(module: nn.Module) -> tuple[type, type]:
    return type(module), type(module.weight)


def _fewest_rows(module: nn.Module, dtype: torch.dtype) -> int | None:
    """From how many rows on the gradient is right; None where it never is."""
    found = None
    for rows in reversed(_ROWS):
        if not _passes(module, rows, dtype):
            break
        found = rows
    return found


@torch.enable_grad()
def _passes(module: nn.Module, rows: int, dtype: torch.dtype) -> bool:
    """Whether a linear map's gradient agrees with the change of its output along one direction."""
    generator = torch.Generator().manual_seed(0)
    x, step = (
        torch.randn(rows, module.in_features, generator=generator).to(place.device_of(module), dtype) for _ in range(2)
    )
    training, module.training = module.training, False
    try:
        with torch.no_grad():
            moved = (module(x + step) - module(x)).float()
        y = module(x.requires_grad_())
        if not y.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(y, x, moved.to(y.dtype), allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return False
    finally:
        module.training = training
    if gradient is None:
        return False
    found, expected = (gradient.float() * step.float()).sum(), moved.square().sum()
    return bool((found - expected).abs() <= _SLACK * expected)
