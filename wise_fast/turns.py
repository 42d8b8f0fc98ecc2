"""Threads that share an edited model take turns: a generation, a batch of edits or a change of state at a time.

Routing keeps what the forward at hand has decided on the model, so two generations at once would mix their decisions.
`editor.disabled()` takes no turn: it holds for every thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable


class Turn:
    """`with turn:` waits for other threads; the thread that has its turn may enter again."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        self._lock.release()

    def __reduce__(self):  # a copy belongs to another model, so it is free
        return Turn, ()


def in_turn(method: Callable) -> Callable:
    """A method of an editor that waits for its turn at the model."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        with self.routing.turn:
            return method(self, *args, **kwargs)

    return waiting
