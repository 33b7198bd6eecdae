"""The SSD store on disks that hang: waits are bounded, and slots that a disk may still access are not reused."""

import threading
from functools import partial
from pathlib import Path

import pytest

from flexkv._core.io.io_queue import READ, WRITE, IoQueue
from flexkv.errors import StorageError
from tests.native.faulty_io_queue import HANGS, FaultyIoQueue
from tests.support.faulty_files import FaultyFiles, wait_until
from tests.support.ssd_store import METHODS, Tier, check_what_is_offered, hanging_queue

SLOTS = 12


@pytest.mark.parametrize("stage", ["erase", "record"])
def test_a_slot_table_that_hangs_holds_up_nobody(tmp_path: Path, stage: str) -> None:
    files, go_on = FaultyFiles(), threading.Event()
    tier = Tier([tmp_path / "a"], SLOTS, deadline_s=0.05, probe_s=0.01, files=files, make_queue=IoQueue)
    slots = tier.allocate(SLOTS)
    if stage == "erase":
        assert tier.write(range(SLOTS), slots).all()             # so that there is something to erase
    table = tier.store._directories[0]._table_fd

    def hang(name: str, fd: int, *_: int) -> int:
        if fd == table and not go_on.is_set():
            go_on.wait()
        return 0

    files.fault = hang
    job = tier.start_write(range(100, 100 + SLOTS), slots)
    wait_until(lambda: tier.take() or not tier.store.usable())
    assert not tier.wait(job, SLOTS).any()
    assert not tier.write(range(SLOTS), slots).any()             # at once
    go_on.set()
    wait_until(tier.store.usable)
    assert tier.write(range(200, 200 + SLOTS), slots).all()
    assert tier.read(range(200, 200 + SLOTS), slots).all()
    tier.close()
    assert check_what_is_offered([tmp_path / "a"], num_slots=SLOTS) == set(range(200, 200 + SLOTS))


def test_what_is_cleared_before_its_record_is_there_is_forgotten(tmp_path: Path) -> None:
    files, go_on, reached = FaultyFiles(), threading.Event(), threading.Event()
    tier = Tier([tmp_path / "a"], SLOTS, files=files)
    slots = tier.allocate(SLOTS)
    table = tier.store._directories[0]._table_fd

    def hang(name: str, fd: int, *_: int) -> int:
        if name == "write" and fd == table:
            reached.set()
            go_on.wait()
        return 0

    files.fault = hang
    job = tier.start_write(range(SLOTS), slots)
    wait_until(lambda: tier.take() or reached.is_set())
    before = tier.store._floor
    clearing = threading.Thread(target=tier.store.clear)
    clearing.start()
    wait_until(lambda: tier.store._floor > before)
    go_on.set()
    clearing.join()
    assert not tier.wait(job, SLOTS).any()
    assert not tier.read(range(SLOTS), slots).any()
    tier.close()
    assert check_what_is_offered([tmp_path / "a"], num_slots=SLOTS) == set()


@METHODS
def test_a_read_that_hangs_has_its_result_when_the_kernel_lets_go(tmp_path: Path, method: str) -> None:
    """Until then it may write to its host slot, which no other block must get."""
    made: list[FaultyIoQueue] = []
    tier = Tier([tmp_path / "a"], SLOTS, deadline_s=0.05, make_queue=partial(hanging_queue, made, method))
    slots = tier.allocate(2)
    assert tier.write([0, 1], slots).all()
    made[0].plan(READ, HANGS)
    job = tier.start_read([0, 1], slots)
    wait_until(lambda: tier.take() or tier.store.stats()["timeouts"] > 0)
    assert len(made[0].busy()) == 2
    assert job not in tier._ended
    made[0].release()
    assert not tier.wait(job, 2).any()
    assert tier.store.stats()["slots_retired"] == 0
    assert tier.read([0, 1], slots).all()
    assert tier.write([5, 6], slots).all()
    tier.close()


@METHODS
def test_a_write_that_hangs_fails_and_its_slot_is_not_used_before_the_kernel_lets_go(
    tmp_path: Path, method: str
) -> None:
    made: list[FaultyIoQueue] = []
    tier = Tier([tmp_path / "a"], SLOTS, deadline_s=0.05, make_queue=partial(hanging_queue, made, method))
    slots = tier.allocate(2)
    made[0].plan(WRITE, HANGS)
    assert not tier.write([0, 1], slots).any()
    tier.store.slots.free(slots)
    rest = tier.allocate(SLOTS - 2)
    assert not set(slots.tolist()) & set(rest.tolist())
    assert tier.store.slots.allocate(1) is None
    made[0].release()
    wait_until(lambda: tier.take() or tier.store.slots.num_free == 2)
    assert tier.write(range(SLOTS - 2), rest).all()
    again = tier.allocate(2)
    assert tier.write([90, 91], again).all()
    assert tier.read([90, 91], again).all()
    assert tier.store.stats()["slots_retired"] == 0
    tier.store.slots.check_integrity()
    tier.close()


@METHODS
@pytest.mark.parametrize("kind", [READ, WRITE])
def test_what_waits_behind_those_that_hang_loses_no_slot(tmp_path: Path, kind: int, method: str) -> None:
    """The queue refuses it, again and again; only slots that the kernel has are out of use, and only until then."""
    made: list[FaultyIoQueue] = []
    make_queue = partial(hanging_queue, made, method)
    tier = Tier([tmp_path / "a"], 100, deadline_s=0.05, probe_s=1000, depth=4, make_queue=make_queue)
    directory = tier.store._directories[0]
    slots = tier.allocate(64)
    apart = slots[::2].copy()                                    # no neighbours: an I/O each
    assert tier.write(range(32), apart).all()
    made[0].plan(kind, HANGS, count=4)
    if kind == WRITE:
        assert not tier.write(range(100, 132), apart).any()
    else:
        job = tier.start_read(range(32), apart)
        wait_until(lambda: tier.take() or not tier.store.usable())
    wait_until(lambda: len(made[0].busy()) == 4)
    if kind == WRITE:
        tier.store.slots.free(slots)
        assert tier.store.slots._available(0) == 96
    tier.store.slots.check_integrity()
    directory._probe()                                           # the disk is well
    assert not tier.store.usable()
    made[0].release()
    wait_until(lambda: len(made[0].busy()) == 0)
    if kind == READ:
        assert not tier.wait(job, 32).any()
        tier.store.slots.free(slots)
    tier.take()
    directory._probe()
    assert tier.store.slots.num_free == tier.store.slots.capacity == 100
    assert tier.store.stats()["slots_retired"] == 0
    slots = tier.allocate(100)[:64]
    assert tier.write(range(200, 264), slots).all()
    assert tier.read(range(200, 264), slots).all()
    tier.close()


@pytest.mark.parametrize("call", ["clear", "close"])
def test_disks_that_are_slow_are_waited_for_at_the_same_time(tmp_path: Path, call: str) -> None:
    files, go_on, reached = FaultyFiles(), threading.Event(), set[int]()
    tier = Tier([tmp_path / "a", tmp_path / "b"], SLOTS, files=files)

    def hang(name: str, fd: int, *_: int) -> int:
        if name == "sync":
            reached.add(fd)
            go_on.wait()
        return 0

    files.fault = hang
    waiting = threading.Thread(target=getattr(tier.store, call))
    waiting.start()
    wait_until(lambda: len(reached) == 2, timeout_s=5.0)
    go_on.set()
    waiting.join()
    tier.close()
    with pytest.raises(StorageError, match="closed"):
        tier.store.clear()


def test_disks_that_hang_are_named_by_clear(tmp_path: Path) -> None:
    files, go_on = FaultyFiles(), threading.Event()
    tier = Tier([tmp_path / "a", tmp_path / "b"], SLOTS, files=files, deadline_s=0.05)
    bad = tier.store._directories[1]._table_fd
    files.fault = lambda name, fd, *_: int(go_on.wait()) - 1 if fd == bad else 0
    with pytest.raises(StorageError, match=r"^\S*/b \(the disk hangs\) could not be cleared"):
        tier.store.clear()
    go_on.set()
    tier.close()
    assert check_what_is_offered([tmp_path / "a", tmp_path / "b"], num_slots=SLOTS) == set()
