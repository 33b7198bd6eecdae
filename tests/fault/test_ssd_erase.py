"""Slots of an SSD store are erased: blocks of a failed put are not found again, also after a restart."""

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.faulty_files import FaultyFiles
from tests.support.ssd_store import Tier, one_thread


def erase(tier: Tier, slots: np.ndarray) -> np.ndarray:
    tier._job += 1
    tier.store.erase(tier._job, slots)
    return tier.wait(tier._job, len(slots))


def offered(directory: Path) -> set[int]:
    tier = Tier([directory])
    try:
        return set(tier.recover())
    finally:
        tier.close()


@pytest.mark.parametrize("ends", ["closed", "killed", "loss of power"])
def test_erased_blocks_are_gone_after_a_restart(tmp_path: Path, ends: str) -> None:
    for seed in range(8):
        place = tmp_path / str(seed)
        files = FaultyFiles(seed, track_power=True)
        tier = Tier([place], **one_thread(files))
        slots = tier.allocate(4)
        assert tier.write([0, 1, 2, 3], slots).all()
        for directory in tier.store._directories:            # the records are on the disk, beyond doubt
            directory.promise(directory.table.sync).result(10)
        assert erase(tier, slots[2:]).all()
        assert tier.read([0, 1, 2, 3], slots).tolist() == [True, True, False, False]
        if ends != "closed":
            files.fault = lambda *_: 5                       # nothing more reaches the disk
        tier.close()
        if ends == "loss of power":
            files.lose_power()
        assert offered(place) & {2, 3} == set()
        if ends != "loss of power":
            assert offered(place) == {0, 1}


def test_a_slot_that_is_erased_and_written_again_at_once_has_the_new_block(tmp_path: Path) -> None:
    """The order in which the thread of a directory does what it is given is the order of the calls."""
    files = FaultyFiles()
    tier = Tier([tmp_path], **one_thread(files))
    slots = tier.allocate(2)
    assert tier.write([0, 1], slots).all()
    gate = threading.Event()
    tier.store._directories[0].post(lambda: gate.wait(10))
    tier._job += 1
    erasure = tier._job
    tier.store.erase(erasure, slots)
    job = tier.start_write([7, 8], slots)
    gate.set()
    assert tier.wait(erasure, 2).all()
    assert tier.wait(job, 2).all()
    assert tier.read([7, 8], slots).all()
    tier.close()
    assert offered(tmp_path) == {7, 8}


def test_a_record_that_waits_to_be_written_is_erased_after_it(tmp_path: Path) -> None:
    """The data is there, and the step that writes the record is posted: the erasure comes behind it."""
    files = FaultyFiles()
    tier = Tier([tmp_path], **one_thread(files))
    slots = tier.allocate(2)
    gate, reached = threading.Event(), threading.Event()

    def fault(name: str, fd: int, offset: int, length: int) -> int:
        if fd == tier.store._directories[0]._table_fd and name == "write":
            reached.set()
            gate.wait(10)
        return 0

    files.fault = fault
    job = tier.start_write([0, 1], slots)
    while not reached.wait(0.01):
        tier.take()
    tier._job += 1
    tier.store.cancel(job)
    tier.store.erase(tier._job, slots)
    gate.set()
    tier.wait(job, 2)
    assert tier.wait(tier._job, 2).all()
    assert not tier.read([0, 1], slots).any()
    tier.close()
    assert offered(tmp_path) == set()


def test_an_erasure_that_fails_is_told_and_the_next_write_of_the_slot_erases_first(tmp_path: Path) -> None:
    files = FaultyFiles()
    tier = Tier([tmp_path], **one_thread(files))
    slots = tier.allocate(1)
    assert tier.write([0], slots).all()
    files.fault = lambda name, *_: 5 if name == "write" else 0
    assert not erase(tier, slots).any()
    assert not tier.read([0], slots).any()
    files.fault = lambda *_: 0
    assert tier.write([1], slots).all()
    tier.close()
    assert offered(tmp_path) == {1}


def test_an_erasure_on_a_disk_that_hangs_ends(tmp_path: Path) -> None:
    files, gate = FaultyFiles(), threading.Event()
    tier = Tier([tmp_path], deadline_s=0.2, **one_thread(files))
    slots = tier.allocate(1)
    assert tier.write([0], slots).all()
    files.fault = lambda name, *_: (gate.wait(20), 0)[1] if name == "write" else 0
    tier._job += 1
    tier.store.erase(tier._job, slots)
    for _ in range(200):
        tier.take()
        if tier.num_told(tier._job):
            break
        threading.Event().wait(0.05)
    assert not tier.wait(tier._job, 1).any()
    gate.set()
    tier.close()
