"""An example of a lower tier, to copy: one file for each block, named after its key, in one folder.

It shows how a store of objects fits the contract: the key finds the block, and slots only bound how many there are. One
thread of its own does what waits. For clarity it neither retries nor measures.
"""

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv._core.io.checksum import xxh3_64
from flexkv.storage.recovered import Recovered
from flexkv.storage.store import Results, Store


class FolderStore(Store):
    """Blocks in the files of a folder.

    A file holds the block's checksum (8 bytes), the key of its parent (16) and its bytes. It is written under another
    name and renamed, so that a reader sees the whole file or none.

    Parameters
    ----------
    folder : Path
    num_slots : int
    slot_bytes : int
    memory : object
        Writable buffer of the host slots.
    """

    def __init__(self, folder: Path, num_slots: int, slot_bytes: int, memory: object) -> None:
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self.slots = SlotAllocator(num_slots)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._folder = folder
        self._memory = memoryview(memory).cast("B")  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self._key_in: dict[int, bytes] = {}             # each slot that holds a block; the worker's
        self._slot_of: dict[bytes, int] = {}            # and the slot that holds it last
        self._sum_of: dict[int, int] = {}               # checksum of the block in each slot
        self._cancelled: set[int] = set()
        self._results: Results = []
        self._work: queue.SimpleQueue[tuple[int, int, Callable[[], bool]] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, name="folder-store", daemon=True)
        self._worker.start()

    # ---- the caller's side ------------------------------------------------------------------------------------

    def recover(self) -> Recovered:
        paths = sorted(self._folder.glob("*.kv"), key=lambda path: path.stat().st_mtime_ns)[: self.num_slots]
        slots = self.slots.allocate(len(paths))
        assert slots is not None  # narrowing: there are no more than slots
        names = [bytes.fromhex(path.stem) for path in paths]
        self._key_in = dict(zip(slots.tolist(), names, strict=True))
        self._slot_of = dict(zip(names, slots.tolist(), strict=True))
        self._sum_of = {
            slot: int.from_bytes(path.read_bytes()[:8], "little")
            for slot, path in zip(slots.tolist(), paths, strict=True)
        }
        keys = b"".join(names)
        parents = b"".join(path.read_bytes()[8:24] for path in paths)
        return Recovered(
            np.frombuffer(keys, np.uint64).reshape(-1, 2), np.frombuffer(parents, np.uint64).reshape(-1, 2), slots
        )

    def write(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        parents: NDArray[np.uint64], fence: int | None = None,
    ) -> None:
        for i in range(len(slots)):
            slot, host, key, parent = int(slots[i]), int(host_slots[i]), keys[i].tobytes(), parents[i].tobytes()
            self._work.put((job, i, lambda s=slot, h=host, k=key, p=parent: self._write(s, h, k, p)))

    def read(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        fence: int | None = None,
    ) -> None:
        for i in range(len(slots)):
            host, key = int(host_slots[i]), keys[i].tobytes()
            self._work.put((job, i, lambda s=int(slots[i]), h=host, k=key: self._read(s, h, k)))

    def checksums(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        return np.array([self._sum_of.get(slot, 0) for slot in slots.tolist()], dtype=np.uint64)

    def erase(self, job: int, slots: NDArray[np.int32]) -> None:
        for i, slot in enumerate(slots.tolist()):
            self._work.put((job, i, lambda s=slot: self._erase(s)))

    def cancel(self, job: int) -> None:
        with self._lock:
            self._cancelled.add(job)

    def results(self) -> Results:
        with self._lock:
            results, self._results = self._results, []
            if results:
                os.eventfd_read(self.event_fd)
        return results

    def clear(self) -> None:
        done = threading.Event()

        def erase_all() -> bool:
            for slot in list(self._key_in):
                self._erase(slot)
            done.set()
            return True

        self._work.put((-1, 0, erase_all))
        done.wait(10.0)

    def close(self) -> None:
        if self.event_fd < 0:
            return
        self._work.put(None)
        self._worker.join(10.0)
        self._memory.release()
        os.close(self.event_fd)
        self.event_fd = -1

    # ---- the worker -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            job, index, move = item
            with self._lock:
                is_cancelled = job in self._cancelled
            try:
                ok = not is_cancelled and move()
            except OSError:
                ok = False
            if job >= 0:
                with self._lock:
                    self._results.append((job, np.array([index]), np.array([ok])))
                    os.eventfd_write(self.event_fd, 1)

    def _host(self, slot: int) -> memoryview:
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.kv"

    def _write(self, slot: int, host_slot: int, key: bytes, parent: bytes) -> bool:
        self._erase(slot)
        block = bytes(self._host(host_slot))
        draft = self._folder / f"{key.hex()}.draft"
        draft.write_bytes(xxh3_64(block).to_bytes(8, "little") + parent + block)
        draft.rename(self._path(key))
        self._key_in[slot], self._slot_of[key], self._sum_of[slot] = key, slot, xxh3_64(block)
        return True

    def _read(self, slot: int, host_slot: int, key: bytes) -> bool:
        if self._key_in.get(slot) != key:
            return False
        content = self._path(key).read_bytes()
        checksum, block = content[:8], content[24:]
        if len(block) != self.slot_bytes or xxh3_64(block).to_bytes(8, "little") != checksum:
            return False
        self._host(host_slot)[:] = block
        return True

    def _erase(self, slot: int) -> bool:
        key = self._key_in.pop(slot, None)
        self._sum_of.pop(slot, None)
        if key is not None and self._slot_of.get(key) == slot:         # no other slot holds this block
            del self._slot_of[key]
            self._path(key).unlink(missing_ok=True)
        return True
