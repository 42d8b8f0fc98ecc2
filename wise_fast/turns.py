"""Threads that share an edited model take turns: a generation, a batch of edits or a change of state at a time.

Routing keeps what the forward at hand has decided on the model, so two generations at once would mix their decisions.
`editor.disabled()` takes no turn: it holds for every thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

from wise_fast.errors import PackError


class Turn:
    """`with turn:` waits for other threads; the thread that has its turn may enter again."""

    def __init__(self):
        self._lock = threading.RLock()
        self.change: str | None = None  # the method that is changing edits or packs

    def __enter__(self) -> Turn:
        self._lock.acquire()
        return self

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


def change(method: Callable) -> Callable:
    """A method of an editor that changes edits or packs: it waits for its turn, and raises PackError where its own
    thread is in the middle of another such method, of a generation, or of `packs_for`.
    """

    @functools.wraps(method)
    def changing(self, *args, **kwargs):
        routing, name = self.routing, method.__name__.removeprefix("_")
        with routing.turn as turn:
            busy = turn.change or (
                "generate" if routing.generating else "packs_for" if routing.packs.asked is not None else ""
            )
            if busy:
                raise PackError(
                    f"{name}() was called in the middle of {busy}, which it would disturb; call it after that"
                )
            turn.change = name
            try:
                return method(self, *args, **kwargs)
            finally:
                turn.change = None

    return changing
