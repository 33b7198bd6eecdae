"""The SSD store over a twin of the queue, and over the real one: blocks, slots, restarts."""

import logging
import select
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv._core.io.io_queue import IoQueue
from flexkv.errors import CapacityError
from flexkv.protocol.gds import STATUS
from flexkv.protocol.peer_process import PeerProcess
from flexkv.storage.ssd import store as ssd_store
from flexkv.storage.ssd.gds_queue import GdsEnd, GdsQueue
from tests.support.faulty_files import ThreadQueue
from tests.support.ssd_store import Tier, keys_of, opened

QUEUES = {
    "twin": ThreadQueue, "uring": partial(IoQueue, method="auto"), "threads": partial(IoQueue, method="threads"),
}


@pytest.fixture(params=list(QUEUES))
def queue(request: pytest.FixtureRequest) -> Any:
    return QUEUES[request.param]


# ---- blocks ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_is_there_after_a_restart(tmp_path: Path, queue: Any) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    with opened(directories, make_queue=queue) as tier:
        assert tier.recover() == {}
        slots = tier.allocate(10)
        assert tier.write(range(10), slots).all()
        assert tier.read(range(10), slots).all()
        assert tier.read([3, 99, 5], slots[[3, 4, 5]]).tolist() == [True, False, True]
        stats = tier.store.stats()
        assert (stats["blocks_written"], stats["blocks_read"], stats["key_mismatches"]) == (10, 12, 1)
        assert stats["queued_bytes"] == 0
        assert tier.store.results() == []
        assert not select.select([tier.store.event_fd], [], [], 0)[0]
    with opened(directories, make_queue=queue) as tier:
        found = tier.store.recover()
        assert found.keys.tolist() == keys_of(range(10)).tolist()             # in the order they were written
        assert [path.tolist() for path in found.paths()] == [list(range(10))]
        assert len(found.cut_off) == 0
        assert tier.store.slots.num_free == 32 - 10
        assert tier.read(range(10), found.slots).all()


def test_a_slot_that_is_rewritten_holds_the_new_block_only(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a"], make_queue=queue) as tier:
        slots = tier.allocate(1)
        for number in range(5):
            assert tier.write([number], slots).all()
        assert not tier.read([3], slots).any()
        assert tier.read([4], slots).all()
    with opened([tmp_path / "a"], make_queue=queue) as tier:
        assert tier.recover() == {4: int(slots[0])}


def test_of_two_records_of_a_key_the_newest_counts(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        first, second, third = tier.allocate(3)
        for slot in (second, third, first):
            assert tier.write([7], np.array([slot])).all()
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.recover() == {7: int(first)}
        assert tier.store.slots.num_free == 31


def test_blocks_of_other_domains_are_not_offered_and_their_slots_are_free(tmp_path: Path) -> None:
    with opened([tmp_path / "a"]) as tier:
        assert tier.write(range(4)).all()
    with opened([tmp_path / "a"], domain=b"another model") as tier:
        assert tier.recover() == {}
        assert tier.store.slots.num_free == 16
        assert tier.write([50]).all()
    with opened([tmp_path / "a"]) as tier:
        assert sorted(tier.recover()) == [1, 2, 3]


def test_clear_forgets_everything_also_after_a_restart(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a", tmp_path / "b"], make_queue=queue) as tier:
        slots = tier.allocate(20)
        assert tier.write(range(20), slots).all()
        tier.store.clear()
        assert not tier.read(range(20), slots).any()
        assert tier.write([33], slots[:1]).all()
        assert tier.read([33], slots[:1]).all()
    with opened([tmp_path / "a", tmp_path / "b"], make_queue=queue) as tier:
        assert tier.recover() == {33: int(slots[0])}


def test_a_directory_that_was_not_there_when_all_was_cleared_holds_nothing_either(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.write(range(32)).all()
    with opened([tmp_path / "a"]) as tier:
        tier.store.clear()
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.recover() == {}


def test_a_directory_that_comes_back_is_told_what_was_cleared_without_it(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert tier.write(range(32)).all()
    with opened([tmp_path / "b"]) as tier:
        tier.store.clear()
    with opened([tmp_path / "a", tmp_path / "b"]):
        pass
    with opened([tmp_path / "a"]) as tier:
        assert tier.recover() == {}


def test_what_another_store_wrote_before_all_was_cleared_does_not_come_back(tmp_path: Path) -> None:
    with opened([tmp_path / "a"]) as tier:
        with opened([tmp_path / "b"]) as other:
            assert other.write(range(16)).all()
        before = time.time_ns()
        tier.store.clear()
        assert before <= tier.store._directories[0].table.header.floor <= time.time_ns()
        assert tier.write([40]).all()
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        assert list(tier.recover()) == [40]


def test_what_is_cleared_while_it_is_written_is_not_there(tmp_path: Path) -> None:
    for after in range(8):
        with opened([tmp_path / str(after)]) as tier:
            slots = tier.allocate(8)
            job = tier.start_write(range(8), slots)
            for _ in range(after):
                tier.take()
            tier.store.clear()
            tier.wait(job, 8)
            assert not tier.read(range(8), slots).any()
        with opened([tmp_path / str(after)]) as tier:
            assert tier.recover() == {}


def test_cancelled_jobs_end_and_each_block_has_one_result(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a", tmp_path / "b"], make_queue=queue) as tier:
        slots = tier.allocate(16)
        tier.store.cancel(12345)
        for round_number in range(30):
            job = tier.start_write(range(16), slots)
            if round_number % 2:
                tier.take()
            tier.store.cancel(job)
            ok = tier.wait(job, 16)
            assert tier.read(range(16), slots).tolist() == ok.tolist()
            job = tier.start_read(range(16), slots)
            tier.store.cancel(job)
            tier.wait(job, 16)
        assert tier.store.stats()["read_errors"] == tier.store.stats()["write_errors"] == 0
        assert tier.store.usable()


def test_arguments_are_checked(tmp_path: Path) -> None:
    with opened([tmp_path / "a"]) as tier:
        one = np.array([0], dtype=np.int32)
        for slots, host in ((one + 16, one), (one - 1, one), (one, one + 64), (one, one - 1), (one, one[:0])):
            with pytest.raises(ValueError):
                tier.store.read(1, slots, host, keys_of([1]))
        hosts = np.arange(2, dtype=np.int32)
        with pytest.raises(ValueError, match="twice"):
            tier.store.write(1, np.full(2, 3, np.int32), hosts, keys_of([1, 2]), keys_of([-1, 1]))
        assert not tier.write([-1]).any()                                       # zeros are no key
        assert tier.write([]).tolist() == []
    for wrong in (0, 4095, 6000):
        with pytest.raises(ValueError, match="4096"):
            ssd_store.SsdStore([tmp_path / "a"], 1 << 20, wrong, b"", bytearray(4096))
    with pytest.raises(CapacityError):
        ssd_store.SsdStore([], 1 << 20, 4096, b"", bytearray(4096))


def test_after_close_nothing_is_done_and_everything_is_told(tmp_path: Path, queue: Any) -> None:
    tier = Tier([tmp_path / "a"], make_queue=queue)
    slots = tier.allocate(16)
    job = tier.start_write(range(16), slots)
    tier.close()
    told = [(number, index, good) for number, indices, ok in tier.store.results()
            for index, good in zip(indices.tolist(), ok.tolist(), strict=True)]
    assert sorted(index for _, index, _ in told) == list(range(16))
    tier.store.write(job + 1, slots, slots, keys_of(range(16)), keys_of(range(16)))
    tier.store.read(job + 2, slots, slots, keys_of(range(16)))
    assert [(number, len(indices), ok.any()) for number, indices, ok in tier.store.results()] == [
        (job + 1, 16, False), (job + 2, 16, False)]
    assert not tier.store.usable()
    tier.close()
    with opened([tmp_path / "a"]) as again:
        good = {index for _, index, ok in told if ok}
        found = again.recover()
        assert set(found) >= good
        assert again.read(sorted(found), [found[number] for number in sorted(found)]).all()


# ---- slots ----------------------------------------------------------------------------------------------------


def test_slots_are_spread_over_directories_in_runs(tmp_path: Path) -> None:
    with opened([tmp_path / name for name in "abc"], num_slots=20, slot_bytes=1 << 20) as tier:
        slots = tier.allocate(24)                                               # 8 MiB at a time
        assert sorted(np.bincount(slots // 20)) == [8, 8, 8]
        assert (np.diff(slots) == 1).sum() == 21


def test_the_directory_with_the_least_to_do_gives_slots(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        first, second = tier.store._directories
        first.begin(1 << 20)
        assert (tier.allocate(4) // 16 == 1).all()
        second.begin(4 << 20)
        assert (tier.allocate(4) // 16 == 0).all()
        second._moved_bytes = 1e12                                              # so much faster
        assert (tier.allocate(4) // 16 == 1).all()
        first.end(1 << 20, 0)
        second.end(4 << 20, 0)


def test_all_slots_can_be_had_and_no_more(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        slots = tier.allocate(32)
        assert sorted(slots.tolist()) == list(range(32))
        assert tier.store.slots.allocate(1) is None
        assert tier.write(range(32), slots).all()
        assert tier.read(range(32), slots).all()


def test_slots_that_were_retired_can_be_had_again(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"]) as tier:
        slots = tier.store.slots
        mine = tier.allocate(8)
        left = np.setdiff1d(np.arange(32), mine)
        retired = np.concatenate([mine[:6], left[:20]]).astype(np.int32)
        assert slots.retire(retired) == 26
        slots.free(mine[:3])
        assert sorted(tier.allocate(4).tolist()) == left[20:].tolist()          # draws others, too
        assert slots.allocate(1) is None
        slots.restore(np.concatenate([retired, retired[:2], mine[6:]]))
        slots.check_integrity()
        assert slots.num_free == 23
        assert sorted(tier.allocate(23).tolist()) == sorted([*mine[:3].tolist(), *left[:20].tolist()])


def test_tags_do_not_run_out(tmp_path: Path, queue: Any) -> None:
    with opened([tmp_path / "a"], make_queue=queue) as tier:
        tier.store._batches._next_tag = (1 << 63) - 5
        slots = tier.allocate(4)
        for first in range(0, 40, 4):
            numbers = range(first, first + 4)
            assert tier.write(numbers, slots).all()
            assert tier.read(numbers, slots).all()


def test_a_clock_that_was_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened([tmp_path / "a"]) as tier:
        slots = tier.allocate(3)
        assert tier.write([1, 2], slots[:2]).all()
    monkeypatch.setattr(ssd_store.time, "time_ns", lambda: 1)
    with opened([tmp_path / "a"]) as tier:
        assert len(tier.recover()) == 2
        slots = tier.allocate(1)
        assert tier.write([1], slots).all()
    with opened([tmp_path / "a"]) as tier:
        assert tier.recover()[1] == int(slots[0])                               # the newer one
    with opened([tmp_path / "a"], domain=b"another") as tier:
        assert tier.recover() == {}
        tier.store.clear()
    with opened([tmp_path / "a"]) as tier:
        assert tier.recover() == {}


def test_each_directory_has_its_own_health(tmp_path: Path) -> None:
    with opened([tmp_path / "a", tmp_path / "b"], probe_s=100.0) as tier:
        slots = np.array([0, 31, 15, 16], dtype=np.int32)
        assert tier.store.usable_slots(slots).all()
        tier.store._directories[1].take_offline("for the test")
        assert tier.store.usable()
        assert tier.store.usable_slots(slots).tolist() == [True, False, True, False]
    assert not tier.store.usable_slots(slots).any()


# ---- a GPU ----------------------------------------------------------------------------------------------------


def test_a_rank_that_goes_away_before_its_write_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The slot's record is being emptied meanwhile, which waits for the disk."""
    with opened([tmp_path / "a"]) as tier:
        tier.recover()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tier.store.attach_device(partial(GdsQueue, GdsEnd(ours, PeerProcess(ours))))
        theirs.send(STATUS)
        tier.take()
        assert tier.store.device_is_ready
        go_on = threading.Event()
        tier.store._directories[0].post(go_on.wait)
        slots, pages = tier.allocate(2), np.arange(2, dtype=np.int32)
        tier.store.write(7, slots, pages, keys_of([1, 2]), keys_of([-1, 1]), fence=0)
        theirs.close()
        tier.take()
        assert not tier.store.device_is_ready
        go_on.set()
        assert not tier.wait(7, 2).any()
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
