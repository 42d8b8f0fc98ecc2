"""`wise_fast.distributed` with a fault: `torchrun ... -m tests.faulty FAULT [OPTIONS]`.

FAULT is a JSON object: {} for none, or

    {"rank": 1, "shard": 3, "how": "raise"}   this rank raises an error behind the first batch of this shard (from 0)
    {"rank": 1, "shard": 3, "how": "kill"}    likewise, it is killed by SIGKILL
    {"apart": true}                           every rank works in a directory of its own, so relative paths are apart
"""

from __future__ import annotations

import json
import os
import signal
import sys

from wise_fast import distributed
from wise_fast.shards import Shards


def fail_at(shard: int, how: str) -> None:
    """Let this process fail in that shard, as soon as it has learned something of it."""
    real = Shards.fill

    def fill(self, number, advance):
        def failing(count):
            advance(count)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no room for a matrix")

        return real(self, number, failing if number == shard else advance)

    Shards.fill = fill


if __name__ == "__main__":
    fault = json.loads(sys.argv.pop(1))
    rank = int(os.environ["RANK"])
    if fault.get("rank") == rank:
        fail_at(fault["shard"], fault["how"])
    if fault.get("apart"):
        os.makedirs(f"rank{rank}")
        os.chdir(f"rank{rank}")
    distributed.main()
