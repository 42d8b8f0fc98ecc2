"""Ranks that wait, fail and fall silent, as threads of one process around a store of its own."""

import signal
import threading

import pytest
import torch
import torch.distributed as dist

from wise_fast.errors import ConfigError, RankError
from wise_fast.ranks import Ranks, joined, local_device

CPU = torch.device("cpu")


@pytest.fixture
def two():
    store = dist.HashStore()
    return [Ranks(rank, 2, store, CPU, timeout=0.3) for rank in range(2)]


def test_ranks_wait_for_each_other_and_count_their_edits(two):
    seen = []

    def other():
        two[1].at("shard 2", 5)
        two[1].publish("absent", [3])
        two[1].wait("filled")

    thread = threading.Thread(target=other)
    two[0].at("shard 1", 2)
    two[0].at("shard 3", 1)
    thread.start()
    two[0].wait("filled", lambda: seen.append(two[0].edits_done()))
    thread.join()
    assert two[0].edits_done() == 8 and set(seen) <= {3, 8} and two[0].published("absent") == [3]


def test_the_first_failure_is_every_ranks_error(two):
    two[1].at("shard 2 of 4")
    two[1].failed(ConfigError("no room"))
    two[0].failed(KeyError("later"))
    for call in (two[0].check, lambda: two[0].at("shard 3"), lambda: two[0].wait("filled")):
        with pytest.raises(RankError, match="rank 1 failed at shard 2 of 4: no room; finished shards are kept"):
            call()
    two[1].check()
    assert "rank 1 failed at shard 2 of 4: no room" in str(two[1].explained(ConfigError("no room")))
    assert "rank 1 failed" in str(two[0].explained(RuntimeError("connection closed")))


def test_a_rank_that_does_nothing_is_given_up(two):
    two[1].at("shard 2 of 4")
    with pytest.raises(RankError, match=r"rank 1 has done nothing for 0\.3 s; it was last heard of at shard 2 of 4"):
        two[0].wait("filled")


def test_a_rank_that_goes_on_is_waited_for(two):
    def other():
        for _ in range(4):
            pause.wait(0.2)
            two[1].at("shard 2", 1)
        two[1].wait("filled")

    pause = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    two[0].wait("filled")
    thread.join()
    assert two[0].edits_done() == 4


def test_a_store_that_is_gone_is_told():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = Ranks(1, 2, dist.TCPStore("127.0.0.1", store.port, is_master=False), CPU, timeout=5)
    ranks.at("shard 2")
    del store
    with pytest.raises(RankError, match="the store that the ranks meet at is gone"):
        for _ in range(50):
            ranks.at("shard 2")


def test_a_process_alone_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="^as it is$"), joined(local_device(None), 1.0) as ranks:
        ranks.at("shard 1", 3)
        ranks.publish("absent", [])
        ranks.wait("filled")
        assert (ranks.size, ranks.first, ranks.edits_done(), ranks.published("absent")) == (1, True, 3, [])
        raise ConfigError("as it is")
    assert signal.getsignal(signal.SIGTERM) is before
