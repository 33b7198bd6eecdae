"""The queue of GPUDirect Storage whose rank hangs up: slots that may still be written stay reserved."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.protocol.gds import REST, RESULT, RESULT_DTYPE, STATUS
from flexkv.protocol.peer_process import PeerProcess
from flexkv.storage.ssd import gds_queue as gds
from flexkv.storage.ssd.gds_queue import GdsEnd, GdsQueue
from flexkv.storage.ssd.striped_slots import StripedSlots
from tests.support.faulty_files import wait_until
from tests.support.ssd_store import Tier, keys_of


class Rank:
    """A process that can be ended, and the rank's end of the socket, which the test holds."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        pair = socket.socketpair()
        process = PeerProcess(pair[0])
        process.close()
        process.pid, process.fd = self.child.pid, os.pidfd_open(self.child.pid)
        for each in pair:
            each.close()
        self.end = GdsEnd(ours, process)

    def ends(self) -> None:
        self.child.communicate(b"\n", timeout=10)

    def close(self) -> None:
        self.theirs.close()
        self.end.close()
        self.child.kill()
        self.child.communicate(timeout=10)


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.close()


def start(tier: Tier, rank: Rank) -> StripedSlots:
    """A write of two blocks that the rank has been given."""
    tier.store.attach_device(lambda files: GdsQueue(rank.end, files))
    rank.theirs.send(STATUS)
    tier.take()
    assert tier.store.device_is_ready
    slots = tier.allocate(2)
    tier._job += 1
    tier.store.write(tier._job, slots, np.arange(2, dtype=np.int32), keys_of([0, 1]), keys_of([-1, 0]), fence=0)
    rank.theirs.settimeout(10)
    while rank.theirs.recv(gds.MAX_MESSAGE_BYTES)[:1] != gds.MOVE:
        pass
    return tier.store.slots


def free(tier: Tier) -> int:
    tier.take()
    return tier.store.slots.num_free


def test_slots_of_a_rank_that_hung_up_are_free_when_its_process_is_gone(tmp_path: Path, rank: Rank) -> None:
    tier = Tier([tmp_path], deadline_s=5.0)
    all_slots = start(tier, rank).num_free + 2
    rank.theirs.close()
    assert not tier.wait(tier._job, 2).any()                  # the put has its verdict at once
    tier.store.slots.free(np.array([0, 1], dtype=np.int32))
    assert free(tier) == all_slots - 2
    taken = tier.allocate(all_slots - 2)
    assert not {0, 1} & set(taken.tolist())
    assert tier.store._directories[0].usable                  # it is no fault of the disk
    rank.ends()
    wait_until(lambda: free(tier) == 2)
    assert set(tier.allocate(2).tolist()) == {0, 1}
    tier.close()


def test_slots_of_a_rank_that_came_to_rest_are_free_at_once(tmp_path: Path, rank: Rank) -> None:
    tier = Tier([tmp_path])
    all_slots = start(tier, rank).num_free + 2
    rank.theirs.send(REST)
    rank.theirs.close()
    assert not tier.wait(tier._job, 2).any()
    tier.store.slots.free(np.array([0, 1], dtype=np.int32))
    assert free(tier) == all_slots
    tier.close()


def test_without_a_pidfd_slots_are_free_after_a_while(
    tmp_path: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.end.process.close()
    monkeypatch.setattr(gds, "_UNKNOWN_PROCESS_S", 0.2)
    tier = Tier([tmp_path])
    all_slots = start(tier, rank).num_free + 2
    rank.theirs.close()
    assert not tier.wait(tier._job, 2).any()
    tier.store.slots.free(np.array([0, 1], dtype=np.int32))
    wait_until(lambda: free(tier) == all_slots)
    tier.close()


def test_a_write_that_the_rank_reported_is_not_waited_for(rank: Rank) -> None:
    queue = GdsQueue(rank.end, [])
    tags = np.array([3, 4], dtype=np.uint64)
    queue.submit(1, tags, np.zeros(2, np.int32), np.zeros(2, np.int64), np.zeros(2, np.int64), 4096, 0)
    for _ in range(2):                                        # unread messages would be a reset
        rank.theirs.recv(gds.MAX_MESSAGE_BYTES)
    found = np.zeros(1, dtype=RESULT_DTYPE)
    found["tag"] = 3
    rank.theirs.send(RESULT + found.tobytes())
    rank.theirs.close()
    got, results, _ = queue.take()
    assert dict(zip(got.tolist(), results.tolist(), strict=True)) == {3: 0, 4: -errno.ESHUTDOWN}
    assert queue.busy().tolist() == [4]
    rank.ends()
    assert queue.at_rest
