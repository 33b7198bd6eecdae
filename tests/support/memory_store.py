"""A store with the interface of ``SsdStore`` that keeps its blocks in a dict, and fails or delays as the test says."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv._core.io.checksum import xxh3_64
from flexkv.errors import StorageError
from flexkv.storage.recovered import Recovered
from flexkv.storage.store import Store

Key = bytes


@dataclass
class Record:
    """A slot's content."""

    key: Key
    parent: Key
    content: bytes


@dataclass
class Disk:
    """Blocks that outlive the store."""

    records: dict[int, Record] = field(default_factory=dict)


@dataclass
class Piece:
    """One block of a job that has not ended."""

    job: int
    index: int
    run: Callable[[], bool]
    is_read: bool


class MemoryStore(Store):
    """Twin of ``SsdStore``.

    Parameters
    ----------
    memory : object
        Writable buffer of the host slots.

    Attributes
    ----------
    held : bool
        While it is set, pieces wait for ``release``.
    broken : set of int
        SSD slots whose reads and writes fail.
    out : set of int
        SSD slots on a disk that is out of service.
    clear_fails : bool
        The disks cannot be cleared.
    """

    clear_fails = False

    def __init__(self, num_slots: int, slot_bytes: int, memory: object, disk: Disk | None = None) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.slots = SlotAllocator(num_slots)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.disk = disk or Disk()
        self.held = False
        self.is_usable = True
        self.broken: set[int] = set()
        self.out: set[int] = set()
        self.num_reads = self.num_writes = 0
        self.reads_of: dict[Key, int] = {}
        self.write_sizes: list[int] = []
        self.closed = False
        self._memory = memoryview(memory).cast("B")  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self._waiting: list[Piece] = []
        self._results: list[tuple[int, NDArray[np.intp], NDArray[np.bool_]]] = []

    def recover(self) -> Recovered:
        used = sorted(self.disk.records)
        free = self.slots.allocate(self.num_slots)
        assert free is not None
        self.slots.free(np.setdiff1d(free, np.array(used, dtype=np.int32)).astype(np.int32))
        records = [self.disk.records[slot] for slot in used]
        return Recovered(
            np.frombuffer(b"".join(r.key for r in records), dtype=np.uint64).reshape(-1, 2).copy(),
            np.frombuffer(b"".join(r.parent for r in records), dtype=np.uint64).reshape(-1, 2).copy(),
            np.array(used, dtype=np.int32),
        )

    def write(self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
              parents: NDArray[np.uint64], fence: int | None = None) -> None:
        assert fence is None
        self.write_sizes.append(len(slots))
        for i, slot in enumerate(slots.tolist()):
            assert not self.slots.is_free(slot)
            host, key, parent = int(host_slots[i]), keys[i].tobytes(), parents[i].tobytes()
            self._give(Piece(job, i, lambda s=slot, h=host, k=key, p=parent: self._write(s, h, k, p), False))

    def read(self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32],
             keys: NDArray[np.uint64], fence: int | None = None) -> None:
        assert fence is None
        for i, slot in enumerate(slots.tolist()):
            host, key = int(host_slots[i]), keys[i].tobytes()
            self._give(Piece(job, i, lambda s=slot, h=host, k=key: self._read(s, h, k), True))

    def checksums(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        records = [self.disk.records.get(slot) for slot in slots.tolist()]
        return np.array([0 if record is None else xxh3_64(record.content) for record in records], dtype=np.uint64)

    def erase(self, job: int, slots: NDArray[np.int32]) -> None:
        for i, slot in enumerate(slots.tolist()):
            self._give(Piece(job, i, lambda s=slot: (self.disk.records.pop(s, None), True)[1], False))

    def _slot(self, host_slot: int) -> memoryview:
        return self._memory[host_slot * self.slot_bytes : (host_slot + 1) * self.slot_bytes]

    def _write(self, slot: int, host_slot: int, key: Key, parent: Key) -> bool:
        self.num_writes += 1
        self.disk.records.pop(slot, None)
        if slot in self.broken:
            return False
        self.disk.records[slot] = Record(key, parent, bytes(self._slot(host_slot)))
        return True

    def _read(self, slot: int, host_slot: int, key: Key) -> bool:
        self.num_reads += 1
        self.reads_of[key] = self.reads_of.get(key, 0) + 1
        record = self.disk.records.get(slot)
        if slot in self.broken or record is None or record.key != key:
            self._slot(host_slot)[:] = b"\xee" * self.slot_bytes
            return False
        self._slot(host_slot)[:] = record.content
        return True

    def _give(self, piece: Piece) -> None:
        with self._lock:
            if self.held:
                self._waiting.append(piece)
                return
        self._end(piece, piece.run())

    def _end(self, piece: Piece, ok: bool) -> None:
        with self._lock:
            self._results.append((piece.job, np.array([piece.index]), np.array([ok])))
            os.eventfd_write(self.event_fd, 1)

    def release(self, count: int | None = None, *, reads_only: bool = False) -> int:
        """Do so many of the pieces that wait (default: all, and no longer hold any); returns how many."""
        with self._lock:
            chosen = [p for p in self._waiting if p.is_read or not reads_only][:count]
            self._waiting = [p for p in self._waiting if p not in chosen]
            if count is None and not reads_only:
                self.held = False
        for piece in chosen:
            self._end(piece, piece.run())
        return len(chosen)

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    def cancel(self, job: int) -> None:
        with self._lock:
            stopped = [p for p in self._waiting if p.job == job]
            self._waiting = [p for p in self._waiting if p.job != job]
        for piece in stopped:
            self._end(piece, False)

    def results(self) -> list[tuple[int, NDArray[np.intp], NDArray[np.bool_]]]:
        with self._lock:
            results, self._results = self._results, []
            if results:
                os.eventfd_read(self.event_fd)
        return results

    def clear(self) -> None:
        if self.clear_fails:
            raise StorageError("the disks could not be cleared")
        self.disk.records.clear()

    def usable(self) -> bool:
        return self.is_usable and not self.closed

    def usable_slots(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        return self.usable() & ~np.isin(slots, list(self.out))

    def stats(self) -> dict[str, int]:
        return {"reads": self.num_reads, "writes": self.num_writes}

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._memory.release()
            os.close(self.event_fd)
