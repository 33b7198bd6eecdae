"""The contract of every store, checked for each implementation."""

import mmap
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.storage.ssd.directory import total_bytes
from flexkv.storage.ssd.store import SsdStore
from flexkv.storage.store import NullStore, Store
from tests.support.folder_store import FolderStore
from tests.support.memory_store import Disk, MemoryStore
from tests.support.ssd_store import SLOT_BYTES, content_of, key_of, keys_of

NUM_SLOTS, HOST_SLOTS = 8, 16
Open = Callable[[], Store]


class Run:
    """A store that can be closed and opened again, and the host slots that it moves blocks from and to."""

    def __init__(self, kind: str, path: Path) -> None:
        memory = mmap.mmap(-1, HOST_SLOTS * SLOT_BYTES)            # aligned, as io_uring wants it
        self.host = np.frombuffer(memory, dtype=np.uint8).reshape(HOST_SLOTS, SLOT_BYTES)
        self._disk = Disk()
        self._open: Open = {
            "folder": lambda: FolderStore(path, NUM_SLOTS, SLOT_BYTES, memory),
            "memory": lambda: MemoryStore(NUM_SLOTS, SLOT_BYTES, memory, self._disk),
            "ssd": lambda: SsdStore([path], total_bytes(NUM_SLOTS, SLOT_BYTES), SLOT_BYTES, b"domain", memory),
        }[kind]
        self.store = self._open()
        self._job = 0

    def allocate(self, count: int) -> NDArray[np.int32]:
        slots = self.store.slots.allocate(count)
        assert slots is not None
        return slots

    def write(self, numbers: list[int], slots: NDArray[np.int32], host: int = 0) -> int:
        self._job += 1
        self.host[host : host + len(numbers)] = [content_of(number) for number in numbers]
        host_slots = np.arange(host, host + len(numbers), dtype=np.int32)
        self.store.write(self._job, slots, host_slots, keys_of(numbers), keys_of([-1, *numbers[:-1]]))
        return self._job

    def read(self, numbers: list[int], slots: NDArray[np.int32], host: int = 8) -> int:
        self._job += 1
        self.host[host : host + len(numbers)] = 0
        self.store.read(self._job, slots, np.arange(host, host + len(numbers), dtype=np.int32), keys_of(numbers))
        return self._job

    def end(self, job: int, count: int) -> list[bool]:
        """Whether each block of a job was moved; each is reported once, and no other job is."""
        ok: dict[int, bool] = {}
        deadline = time.monotonic() + 20.0
        while len(ok) < count:
            assert time.monotonic() < deadline
            select.select([self.store.event_fd], [], [], 1.0)
            for reported, indices, good in self.store.results():
                assert reported == job
                for index, is_good in zip(indices.tolist(), good.tolist(), strict=True):
                    assert index not in ok
                    ok[index] = is_good
        assert not self.store.results()
        return [ok[i] for i in range(count)]

    def restart(self) -> dict[tuple[int, int], int]:
        """Slots of the recovered blocks, by key."""
        self.store.close()
        self.store = self._open()
        self.store.register(self.host.nbytes)
        found = self.store.recover()
        return {(int(a), int(b)): slot for (a, b), slot in zip(found.keys, found.slots.tolist(), strict=True)}


@pytest.fixture(params=["folder", "memory", "ssd"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    run = Run(request.param, tmp_path)
    run.store.register(run.host.nbytes)
    assert len(run.store.recover()) == 0
    yield run
    run.store.close()
    run.store.close()


def test_what_was_written_is_read(run: Run) -> None:
    numbers, slots = [3, 1, 4], run.allocate(3)
    assert run.end(run.write(numbers, slots), 3) == [True] * 3
    assert run.end(run.read(numbers, slots), 3) == [True] * 3
    assert (run.host[8:11] == [content_of(number) for number in numbers]).all()
    run.store.slots.check_integrity()


def test_a_slot_with_another_block_is_a_failed_read(run: Run) -> None:
    slots = run.allocate(2)
    run.end(run.write([1, 2], slots), 2)
    assert run.end(run.read([2, 1], slots), 2) == [False, False]
    run.end(run.write([5], slots[:1]), 1)
    assert run.end(run.read([1], slots[:1]), 1) == [False]
    assert run.end(run.read([5, 2], slots), 2) == [True, True]


def test_an_empty_slot_is_a_failed_read(run: Run) -> None:
    assert run.end(run.read([1], run.allocate(1)), 1) == [False]


def test_an_erased_slot_is_empty_also_after_a_restart(run: Run) -> None:
    slots = run.allocate(2)
    run.end(run.write([1, 2], slots), 2)
    run.store.erase(77, slots[1:])
    assert run.end(77, 1) == [True]
    assert run.end(run.read([2], slots[1:]), 1) == [False]
    assert set(run.restart()) == {key_of(1)}


def test_blocks_are_found_again(run: Run) -> None:
    run.end(run.write([1, 2, 3], run.allocate(3)), 3)
    found = run.restart()
    assert set(found) == {key_of(n) for n in (1, 2, 3)}
    assert run.store.slots.num_free == NUM_SLOTS - 3
    assert not any(run.store.slots.is_free(slot) for slot in found.values())
    slots = np.array([found[key_of(n)] for n in (1, 2, 3)], dtype=np.int32)
    assert run.end(run.read([1, 2, 3], slots), 3) == [True] * 3
    assert (run.host[8:11] == [content_of(number) for number in (1, 2, 3)]).all()


def test_a_block_that_moved_to_another_slot_outlives_its_first_slot(run: Run) -> None:
    first, second = run.allocate(1), run.allocate(1)
    run.end(run.write([1], first), 1)
    run.end(run.write([1], second), 1)
    run.store.erase(78, first)
    run.end(78, 1)
    assert run.end(run.read([1], second), 1) == [True]


def test_cleared_is_empty_also_after_a_restart(run: Run) -> None:
    slots = run.allocate(2)
    run.end(run.write([1, 2], slots), 2)
    run.store.clear()
    assert run.end(run.read([1, 2], slots), 2) == [False, False]
    assert run.restart() == {}


def test_each_block_of_a_cancelled_job_is_reported(run: Run) -> None:
    slots = run.allocate(4)
    job = run.write([1, 2, 3, 4], slots)
    run.store.cancel(job)
    ok = run.end(job, 4)
    for i, slot in enumerate(slots):
        if ok[i]:
            assert run.end(run.read([i + 1], slots[i : i + 1]), 1) == [True]
        assert not run.store.slots.is_free(int(slot))


def test_a_store_without_a_device_says_so(run: Run) -> None:
    assert not run.store.device_is_ready
    assert run.store.usable()
    assert run.store.usable_slots(run.allocate(2)).all()


def test_the_null_store_fails_everything() -> None:
    store = NullStore(SLOT_BYTES)
    none = np.zeros(2, dtype=np.int32)
    assert store.slots.allocate(1) is None
    assert len(store.recover()) == 0
    store.read(1, none, none, keys_of([1, 2]))
    store.write(2, none, none, keys_of([1, 2]), keys_of([-1, 1]))
    store.erase(3, none)
    assert [(job, ok.tolist()) for job, _, ok in store.results()] == [(job, [False] * 2) for job in (1, 2, 3)]
    assert not store.usable()
    assert not store.usable_slots(none).any()
    before = len(os.listdir("/proc/self/fd"))
    store.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
