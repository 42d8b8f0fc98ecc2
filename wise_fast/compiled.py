"""Models under `torch.compile`: what they are inside, and running them eagerly while they are edited."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from wise_fast.errors import WiseError


def original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps, which shares all weights and hooks with it; others as they are."""
    return getattr(model, "_orig_mod", model)


class _Stance:
    """`force_eager` while anyone is inside. torch has one stance for all threads: the last one out puts it back."""

    def __init__(self):
        self._lock, self._inside, self._kept = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._kept.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._kept.close()


_STANCE = _Stance()


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled modules without their graphs, which are kept.

    Editing leaves a forward half way, replaces forwards and gives batches of any shape: compiled, every one of them
    would be compiled anew.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import takes seconds
        yield
        return
    with _STANCE:
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
