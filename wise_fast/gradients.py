"""Whether gradients pass through what lies behind the edited projection: inference kernels of some quantized layers
have none, and say nothing."""

from __future__ import annotations

import torch
from torch import nn

from wise_fast import place
from wise_fast.architectures import Architecture
from wise_fast.errors import UnsupportedModelError

_SLACK = 0.25  # activations may be rounded to eight bits


def require_gradients(model: nn.Module, architecture: Architecture, dtype: torch.dtype) -> None:
    """Raise unless edits can be trained through the quantized layers behind the projection; one of each kind is asked.

    Args:
        dtype: of the activations.

    Raises:
        UnsupportedModelError: a layer's gradient is missing or is not that of its output.
    """
    behind = [model.get_submodule(name) for name in (*architecture.layers[architecture.layer + 1 :], architecture.head)]
    quantized = [m for part in behind for m in part.modules() if place.is_quantized(m)]
    for module in {(type(m), type(m.weight)): m for m in quantized}.values():
        if not all(_passes(module, rows, dtype) for rows in (1, 3)):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise UnsupportedModelError(
                f"no right gradient passes through the quantized {kind} on {place.device_of(module)}, so nothing can "
                "be taught through it; saved edits can be served. Edit with another quantization, on a device where it "
                "can be trained (bitsandbytes in 4 bits: not on a CPU), or with the last layer as WiseConfig.layer"
            )


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
