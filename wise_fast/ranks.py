"""The processes of a distributed run: they find each other, wait for each other, and stop when one of them fails.

They are started by `torchrun`, or by anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without these a
process is alone. What they tell each other goes through the store of torch.distributed's rendezvous, which is asked and
never waited on: a collective would wait for a rank that is gone. Only files of ranks that share no file system travel
as tensors, by gloo or, from and to GPUs, NCCL.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from wise_fast.errors import ConfigError, RankError, WiseError
from wise_fast.models import checked_device

_POLL = 0.1  # seconds between two looks at the others
_GRACE = 10.0  # seconds for the others to read why a rank leaves
_FAILURE = "failure"
_KEPT = "finished shards are kept, and the same command goes on from there"


class _Terminated(BaseException):
    """SIGTERM: torchrun ends what is left of a run whose first process has died."""


class Ranks:
    """This process among the others; made by `joined`.

    Attributes:
        rank, size: which it is, from 0, of how many.
        device: what it computes on.
        place: what it is at, for messages.
        done: edits that it has behind it.
    """

    def __init__(self, rank: int, size: int, store: dist.Store | None, device: torch.device, timeout: float):
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.place, self.done = "the beginning", 0
        self._store, self._notes = store, {}

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and shows what came of the run."""
        return self.rank == 0

    def at(self, place: str, more: int = 0) -> None:
        """Say what this rank is at, and that `more` edits are done.

        Raises:
            RankError: another rank has failed.
        """
        self.place, self.done = place, self.done + more
        if self._store is None:
            return
        with _reached():
            self._store.set(f"at/{self.rank}", json.dumps([self.done, place, time.time()]))
        self.check()

    def edits_done(self) -> int:
        """By all ranks."""
        return sum(self._heard(rank)[0] for rank in range(self.size)) if self._store else self.done

    def check(self) -> None:
        """Raise RankError if another rank has failed."""
        if (failure := self._failure()) is not None:
            raise RankError(_told(failure))

    def wait(self, name: str, poll: Callable[[], None] | None = None) -> None:
        """Until every rank waits under this name, which is used once; `poll` is called now and then.

        Raises:
            RankError: another rank fails, or does nothing for `timeout` seconds.
        """
        if self._store is None:
            return
        with _reached():
            self._store.set(f"{name}/{self.rank}", "here")
        last, since = {}, {}
        while missing := [rank for rank in range(self.size) if not self._has(f"{name}/{rank}")]:
            self.check()
            for rank in missing:
                heard, now = self._heard(rank), time.monotonic()
                if heard != last.get(rank):
                    last[rank], since[rank] = heard, now
                if now - since[rank] > self.timeout:
                    raise RankError(
                        f"rank {rank} has done nothing for {self.timeout:g} s; it was last heard of at {heard[1]}. See "
                        f"what became of it, or give it longer (--timeout); {_KEPT}"
                    )
            if poll is not None:
                poll()
            time.sleep(_POLL)

    def publish(self, name: str, value: object) -> None:
        """Give a JSON value to the ranks that ask for it by `published` behind a later `wait`."""
        self._notes[name] = value
        if self._store is not None:
            with _reached():
                self._store.set(name, json.dumps(value))

    def published(self, name: str):
        """The value that a rank has published."""
        if self._store is None:
            return self._notes[name]
        with _reached():
            return json.loads(self._store.get(name))

    def carry(self, data: bytes | None, source: int) -> bytes | None:
        """Bytes from rank `source` to rank 0, which gets them back; these two call it, with None at rank 0."""
        if self.rank == source:
            values = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
            dist.send(torch.tensor([len(values)], device=self.device), 0)
            dist.send(values, 0)
            return None
        size = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(size, source)
        values = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.recv(values, source)
        return values.cpu().numpy().tobytes()

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank stops; the first failure of a run is the one that counts."""
        cause = str(error) if isinstance(error, WiseError) else f"{type(error).__name__}: {error}".rstrip(": ")
        failure = json.dumps({"rank": self.rank, "place": self.place, "cause": cause})
        with suppress(RankError), _reached():
            self._store.compare_set(_FAILURE, "", failure)

    def leave(self, wait: bool) -> None:
        """The last call: let the others go, and wait a little until they have read what there is to read."""
        if self._store is None:
            return
        with suppress(RankError):
            with _reached():
                self._store.set(f"left/{self.rank}", "gone")
            end = time.monotonic() + _GRACE
            while wait and time.monotonic() < end and not all(self._has(f"left/{rank}") for rank in range(self.size)):
                time.sleep(_POLL)

    def explained(self, error: BaseException) -> BaseException:
        """What this rank raises for an error: another rank's failure, where that is behind it."""
        if isinstance(error, KeyboardInterrupt):
            return error
        failure = None
        with suppress(RankError):
            failure = self._failure()
        if failure is not None:
            return RankError(_told(failure))
        if isinstance(error, _Terminated):
            return RankError(
                f"rank {self.rank} was ended from outside (SIGTERM) at {self.place}, as is done when another rank has "
                f"died; {_KEPT}"
            )
        if isinstance(error, WiseError) and not isinstance(error, RankError):
            return RankError(f"rank {self.rank} failed at {self.place}: {error}")
        return error

    def _failure(self) -> dict | None:
        if self._store is None or not self._has(_FAILURE):
            return None
        with _reached():
            failure = json.loads(self._store.get(_FAILURE))
        return failure if failure["rank"] != self.rank else None

    def _heard(self, rank: int) -> tuple[int, str, float]:
        if not self._has(f"at/{rank}"):
            return 0, "the beginning", 0.0
        with _reached():
            return tuple(json.loads(self._store.get(f"at/{rank}")))

    def _has(self, key: str) -> bool:
        with _reached():
            return self._store.check([key])


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """This process among those that the environment names, which have all joined then.

    An error inside is told to the other ranks, which raise it too; so is an interrupt. SIGTERM raises one as well, and
    is ignored from then on, so that the process gets to say why it ends.

    Args:
        device: what this rank computes on.
        timeout: seconds that a rank may do nothing while another waits for it.

    Raises:
        RankError: a rank failed, is gone, or did not come: which, where, and why.
        ConfigError: the environment names ranks, but not where they meet.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, None, device, timeout)
        return
    ranks = _met(device, timeout)
    try:
        with _terminable():
            yield ranks
        ranks.leave(wait=ranks.first)  # the store may live in rank 0
    except BaseException as error:
        told = ranks.explained(error)
        if not isinstance(error, _Terminated):
            ranks.failed(error)
        ranks.leave(wait=not isinstance(error, _Terminated))
        if told is error:
            raise
        raise told from error
    dist.destroy_process_group()


def local_device(name: str | None) -> torch.device:
    """The device of this process: of several GPUs that of its place on its machine, LOCAL_RANK."""
    device = checked_device(name) or torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _met(device: torch.device, timeout: float) -> Ranks:
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
        backend = "nccl" if device.type == "cuda" else "gloo"
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=limit)
    except ValueError as error:
        raise ConfigError(f"{error}; start the processes by torchrun, which sets it") from error
    except RuntimeError as error:
        raise RankError(
            f"the ranks did not meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}. "
            "Start as many processes as WORLD_SIZE says, where they can reach each other"
        ) from error
    return Ranks(rank, size, dist.PrefixStore("ranks", store), device, timeout)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `_Terminated` inside, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun kills who takes too long
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        raise
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while it tells the others, torchrun may be ahead of it
        raise
    else:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _reached() -> Iterator[None]:
    """What the store raises when the process that keeps it is gone, as an error of ours."""
    try:
        yield
    except RuntimeError as error:  # among them DistError and what is below it
        if isinstance(error, RankError):
            raise
        raise RankError(
            f"the store that the ranks meet at is gone, with the process that kept it (rank 0 or torchrun); {_KEPT}"
        ) from error


def _told(failure: dict) -> str:
    return f"rank {failure['rank']} failed at {failure['place']}: {failure['cause']}; {_KEPT}"
