"""How `bench.gpu` measures: CUDA graph replays between events, the L2 cache filled with other, clean data before each
(a flush that writes would have its lines written back while the call is timed), arms in turn; and the two ceilings that
figures are held against, copy bandwidth and matrix throughput as this device shows them.

Without a device the same calls run once on the CPU, which times nothing and shows that every case works.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.records import percentiles

# More than any L2 cache that there is (AMD's last level included).
FLUSH_BYTES = 512 << 20
WARMUP = 3
MIN_ROUNDS, MAX_ROUNDS = 5, 60


@dataclass
class Arm:
    """One of the things compared.

    Attributes:
        call: what is timed; it returns what it computed.
        graph: whether it can be captured in a CUDA graph; what syncs with the host cannot, and pays for it.
        before: run before each timed call, outside of it.
    """

    call: Callable[[], object]
    graph: bool = True
    before: Callable[[], object] = lambda: None


@dataclass
class Clock:
    """Times arms on a CUDA device; on the CPU (a dry run) it only calls them."""

    device: torch.device
    flush: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        if self.device.type == "cuda":
            self.flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)

    @property
    def dry(self) -> bool:
        return self.flush is None

    def measure(self, arms: dict[str, Arm], budget: float) -> dict[str, list[float]]:
        """Seconds of each call of every arm, as many rounds as fit into `budget` seconds; empty lists in a dry run."""
        if self.dry:
            for arm in arms.values():
                arm.before()
                arm.call()
            return {name: [] for name in arms}
        began = time.perf_counter()
        ready = {name: self._ready(arm) for name, arm in arms.items()}
        once = sum(self._timed(arms[name], run).elapsed() for name, run in ready.items())
        left = budget - (time.perf_counter() - began)
        # The flush is not timed, but it takes its time too.
        rounds = int(left / (once + len(arms) * 4e-4))
        pairs = [
            (name, self._timed(arms[name], run))
            for _ in range(max(MIN_ROUNDS, min(MAX_ROUNDS, rounds)))
            for name, run in ready.items()
        ]
        torch.cuda.synchronize(self.device)
        return {name: [pair.elapsed() for other, pair in pairs if other == name] for name in arms}

    def _ready(self, arm: Arm) -> Callable[[], object]:
        """The call, warmed up and captured where that is possible; replaying costs no launches from Python."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                arm.before()
                arm.call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        if not arm.graph:
            return arm.call
        graph = torch.cuda.CUDAGraph()
        arm.before()
        try:
            with torch.cuda.graph(graph):
                arm.call()
        except RuntimeError as error:
            logging.info("not in a CUDA graph, launches count: %s", str(error).splitlines()[0])
            torch.cuda.synchronize(self.device)
            return arm.call
        return graph.replay

    def _timed(self, arm: Arm, run: Callable[[], object]) -> _Pair:
        arm.before()
        # Queued first, the flush also hides the host's launch of what follows.
        self.flush.amax()
        pair = _Pair(*(torch.cuda.Event(enable_timing=True) for _ in range(2)))
        pair.start.record()
        run()
        pair.end.record()
        return pair


@dataclass
class _Pair:
    start: torch.cuda.Event
    end: torch.cuda.Event

    def elapsed(self) -> float:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes per second of a copy, FLOP per second of matrix products by dtype."""

    bandwidth: float
    flops: dict[torch.dtype, float]

    def seconds(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        """The least time for so many bytes and operations, on the roofline."""
        return max(moved / self.bandwidth, flops / self.flops[dtype])


def ceilings(clock: Clock) -> Ceilings | None:
    """Measured ceilings; None in a dry run."""
    if clock.dry:
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copied = _median(clock, lambda: target.copy_(source))
    flops = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
        a = torch.randn(size, size, device=clock.device).to(dtype)
        flops[dtype] = 2 * size**3 / _median(clock, lambda a=a: a @ a)
    return Ceilings(2 * source.numel() / copied, flops)


def _median(clock: Clock, call: Callable[[], object]) -> float:
    return percentiles(clock.measure({"it": Arm(call)}, 1.0)["it"])[1]
