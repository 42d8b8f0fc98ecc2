"""Models under `torch.compile`: what they are inside, and running them eagerly while they are edited."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wise_fast.errors import WiseError


def original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps, which shares all weights and hooks with it; others as they are."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled modules without their graphs, which are kept.

    Editing leaves a forward half way, replaces forwards and gives batches of any shape: compiled, every one of them
    would be compiled anew.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def require_live_weights() -> None:
    """Raise while Inductor freezes weights: its graphs hold copies, so edits would not be heard, without any sign.

    Raises:
        WiseError: `torch._inductor.config.freezing` is set.
    """
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is not None and inductor.freezing:
        raise WiseError(
            "torch._inductor.config.freezing is set: graphs compiled so keep copies of the side memories, and edits "
            "would not reach them; set it to False and compile the model again"
        )
