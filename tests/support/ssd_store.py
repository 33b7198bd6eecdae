"""An SsdStore with host memory, whose blocks have content that follows from their key."""

import mmap
import select
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.storage.ssd.directory import total_bytes
from flexkv.storage.ssd.store import SsdStore
from tests.native.faulty_io_queue import FaultyIoQueue
from tests.support.faulty_files import FaultyFiles, ThreadQueue

SLOT_BYTES = 4096
HOST_SLOTS = 64


def key_of(number: int) -> tuple[int, int]:
    return number + 1, (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)


def keys_of(numbers: Iterable[int]) -> NDArray[np.uint64]:
    """(n, 2) keys; number -1 is the parent of a first block."""
    return np.array([key_of(n) if n >= 0 else (0, 0) for n in numbers], dtype=np.uint64).reshape(-1, 2)


def number_of(key: NDArray[np.uint64]) -> int:
    return int(key[0]) - 1


def content_of(number: int, slot_bytes: int = SLOT_BYTES) -> NDArray[np.uint8]:
    return np.random.default_rng(number + 1).integers(0, 256, slot_bytes, dtype=np.uint8)


class Tier:
    """One store. Every read is checked against what the block must hold."""

    def __init__(
        self, directories: Sequence[Path], num_slots: int = 16, slot_bytes: int = SLOT_BYTES, domain: bytes = b"model",
        **options: Any,
    ) -> None:
        self.memory = mmap.mmap(-1, HOST_SLOTS * slot_bytes)
        self.host = np.frombuffer(self.memory, dtype=np.uint8).reshape(HOST_SLOTS, slot_bytes)
        options.setdefault("make_queue", ThreadQueue)
        capacity = len(directories) * total_bytes(num_slots, slot_bytes)
        self.store = SsdStore(directories, capacity, slot_bytes, domain, self.memory, **options)
        self.slot_bytes = slot_bytes
        self._job = 0
        self._ended: dict[int, list[tuple[NDArray[np.intp], NDArray[np.bool_]]]] = {}

    def recover(self) -> dict[int, int]:
        """Number -> slot of the offered blocks."""
        found = self.store.recover()
        return {number_of(key): int(slot) for key, slot in zip(found.keys, found.slots, strict=True)}

    def allocate(self, count: int) -> NDArray[np.int32]:
        slots = self.store.slots.allocate(count)
        assert slots is not None
        return slots

    def start_write(self, numbers: Sequence[int], slots: NDArray[np.int32], host: int = 0) -> int:
        """Blocks that follow one another; returns the job."""
        for i, number in enumerate(numbers):
            self.host[host + i] = content_of(number, self.slot_bytes)
        self._job += 1
        host_slots = np.arange(host, host + len(numbers), dtype=np.int32)
        self.store.write(self._job, slots, host_slots, keys_of(numbers), keys_of([-1, *numbers][: len(numbers)]))
        return self._job

    def write(self, numbers: Sequence[int], slots: NDArray[np.int32] | None = None) -> NDArray[np.bool_]:
        slots = self.allocate(len(numbers)) if slots is None else slots
        return self.wait(self.start_write(numbers, slots), len(numbers))

    def start_read(self, numbers: Sequence[int], slots: Any, host: int = 0) -> int:
        self._job += 1
        self.host[host : host + len(numbers)] = 0xA5
        host_slots = np.arange(host, host + len(numbers), dtype=np.int32)
        self.store.read(self._job, np.asarray(slots, dtype=np.int32), host_slots, keys_of(numbers))
        return self._job

    def read(self, numbers: Sequence[int], slots: Any) -> NDArray[np.bool_]:
        """Whether each block is good; those that are have the right bytes."""
        ok = self.wait(self.start_read(numbers, slots), len(numbers))
        for i in np.flatnonzero(ok):
            assert (self.host[i] == content_of(numbers[i], self.slot_bytes)).all(), f"wrong KV: {numbers[i]}"
        return ok

    def wait(self, job: int, count: int, timeout_s: float = 20.0) -> NDArray[np.bool_]:
        """The result of each block of a job, which is told once."""
        while self.num_told(job) < count:
            assert select.select([self.store.event_fd], [], [], timeout_s)[0], f"job {job} does not end"
            self.take()
        ok, told = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.int64)
        for indices, good in self._ended.pop(job, ()):
            told[indices] += 1
            ok[indices] = good
        assert (told == 1).all()
        return ok

    def num_told(self, job: int) -> int:
        """Of how many blocks of a job the result has been taken."""
        return sum(len(indices) for indices, _ in self._ended.get(job, ()))

    def take(self) -> None:
        """Take results, and keep them for ``wait``."""
        for job, indices, good in self.store.results():
            self._ended.setdefault(job, []).append((indices, good))

    def close(self) -> None:
        self.store.close()


@contextmanager
def opened(*args: Any, **options: Any) -> Iterator[Tier]:
    """A tier that is checked and closed at the end."""
    tier = Tier(*args, **options)
    try:
        yield tier
        tier.store.slots.check_integrity()
    finally:
        tier.close()


def one_thread(files: FaultyFiles) -> dict[str, Any]:
    """Options for a tier whose every access of a file goes through ``files``, one after another."""
    return {"files": files, "make_queue": partial(ThreadQueue, layer=files, threads=1)}


METHODS = pytest.mark.parametrize("method", ["uring", "threads"])


def hanging_queue(made: list[FaultyIoQueue], method: str, *args: Any, **options: Any) -> FaultyIoQueue:
    """Make a queue whose accesses can fail or hang; it is appended to ``made``."""
    made.append(FaultyIoQueue(*args, method=method, **options))
    return made[-1]


def check_what_is_offered(directories: list[Path], **options: Any) -> set[int]:
    """Recover; every block that is offered and good is right. Returns the good ones."""
    tier = Tier(directories, **options)
    found = tier.recover()
    numbers = list(found)
    ok = tier.read(numbers, list(found.values()))
    tier.store.slots.check_integrity()
    tier.close()
    return {number for number, good in zip(numbers, ok, strict=True) if good}
