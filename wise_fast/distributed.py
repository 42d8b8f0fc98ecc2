"""Editing on several processes: `torchrun --nproc-per-node N -m wise_fast.distributed --edits FILE --out DIR`.

The stream of edits is cut into shards, each in a subspace of its own, and shard s is filled by rank s % N, on a model
of its own. A finished shard is on the disk at once; rank 0 joins them all and saves the pack. What comes out is that of
one process, whatever N is, and it is what one editor gives that learns everything in turn (`wise_fast.shards`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wise_fast.checkpoint import FILES
from wise_fast.ranks import Ranks
from wise_fast.shards import PACK, Shards
from wise_fast.state import EditReport


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        pack: the saved directory, for `WiseEditor.from_pretrained`.
        reports: of the edits that were not superseded, in order.
        taken_up: shards that were finished before this run began.
        carried: shards that came over the network, from ranks that do not share rank 0's file system.
        seconds: wall time from the first edit to the last of all ranks.
        memories: that are served.
        digest: of the final state, see `checkpoint.Digester`.
    """

    pack: Path
    reports: list[EditReport]
    taken_up: int
    carried: int
    seconds: float
    memories: int
    digest: str


def distribute(shards: Shards, ranks: Ranks, watch: Callable[[int], None] | None = None) -> Outcome | None:
    """Fill this rank's shards, wait for the others', and at rank 0 join them and save the pack.

    Args:
        watch: is told now and then how many edits all ranks together have behind them.

    Returns:
        At rank 0 what came of it, elsewhere None.

    Raises:
        RankError: another rank failed or is gone. Finished shards are kept; running it again goes on from there.
        StorageError, ConfigError: as `Shards.claim` and `Shards.fill` raise them.
    """

    def look() -> None:
        if watch is not None and ranks.first:
            watch(ranks.edits_done())

    def advance(count: int) -> None:
        ranks.at(ranks.place, count)
        look()

    for rank in range(ranks.size):  # one after the other: most often it is the same directory
        if rank == ranks.rank:
            ranks.at(f"the run's directory, {shards.out}")
            shards.claim()
        ranks.wait(f"claimed/{rank}")
    taken_up = sum(map(shards.present, range(shards.count)))
    ranks.wait("looked")  # before anything is added
    start = time.perf_counter()
    for number in range(ranks.rank, shards.count, ranks.size):
        ranks.at(shards.name(number))
        if shards.finished(number) is None:
            shards.fill(number, advance)
        else:
            advance(len(shards.edits_of(number)))
    ranks.at("the end of its shards")
    ranks.wait("filled", look)
    seconds = time.perf_counter() - start
    outcome = _joined(shards, ranks, taken_up, seconds)
    ranks.wait("saved")
    return outcome


def _joined(shards: Shards, ranks: Ranks, taken_up: int, seconds: float) -> Outcome | None:
    """Bring to rank 0's directory the shards that are not there, and let rank 0 save them all."""
    states = {}
    if ranks.first:
        ranks.at(f"joining the shards in {shards.out / PACK}")
        for number in range(shards.count):
            states[number] = shards.finished(number) if number % ranks.size else shards.load(number)
        ranks.publish("absent", [number for number, state in states.items() if state is None])
    ranks.wait("listed")
    absent = ranks.published("absent")
    for number in absent:
        source = number % ranks.size
        if ranks.first:
            shards.unpack(number, {name: ranks.carry(None, source) for name in FILES})
            states[number] = shards.load(number)
        elif ranks.rank == source:
            for data in shards.pack_up(number).values():
                ranks.carry(data, source)
    if not ranks.first:
        return None
    editor = shards.editor
    # Who waits must not take a long rehearsal for a rank that hangs.
    with editor.watched(partial(ranks.at, ranks.place)):
        digest = shards.save([states[number] for number in range(shards.count)])
    return Outcome(
        shards.out / PACK, editor.edits, taken_up, len(absent), seconds, memories=len(editor.memories), digest=digest
    )


def main() -> None:
    """The command line, for `python -m`; see `wise_fast.distributed_command`."""
    from wise_fast import cli

    cli.start(_app, "python -m wise_fast.distributed")


def _app() -> Callable:
    from wise_fast.distributed_command import app

    return app


if __name__ == "__main__":
    main()
