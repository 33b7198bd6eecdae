"""The SSD tier: blocks in slots of preallocated files, over one or more directories."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.checksum import xxh3_64
from flexkv._core.io.io_queue import IoQueue
from flexkv.errors import StorageError
from flexkv.storage.recovered import Recovered
from flexkv.storage.ssd.batches import READ, WRITE, Batch, Batches, Result, check_blocks
from flexkv.storage.ssd.directory import SsdDirectory, close_directories, open_directories, raise_floor
from flexkv.storage.ssd.file_layer import FileLayer
from flexkv.storage.ssd.queues import StoreQueues
from flexkv.storage.ssd.record_steps import RecordSteps
from flexkv.storage.ssd.recovery import newest_records
from flexkv.storage.ssd.slot_health import LATE, SlotHealth
from flexkv.storage.ssd.slot_ledger import SlotLedger
from flexkv.storage.ssd.striped_slots import Parts, StripedSlots
from flexkv.storage.store import Store

logger = logging.getLogger("flexkv.storage")


class SsdStore(Store):
    """Blocks on disk: fixed slots, a record beside each, and a queue that moves bytes.

    A block is written in this order: the slot's record is emptied, the data is written, the record is written. So
    after a kill at any moment a slot holds the old block, the new one, or none. A block is read only if the slot's
    record names its key, and is good only if the bytes read have the checksum in that record.

    May be used from any thread. Only the constructor, ``recover``, ``clear`` and ``close`` wait for a disk.
    ``results`` must be called when ``event_fd`` is readable, and once a second in any case, because it detects disks
    that hang.

    Parameters
    ----------
    directories : sequence of Path
    capacity_bytes : int
        Bytes for all files in all directories, divided evenly.
    slot_bytes : int
        A multiple of 4096.
    domain : bytes
        Domain of the KV. Blocks of other domains are not offered, and their slots are free.
    memory : buffer
        Host slots: slot i is bytes [i*slot_bytes, (i+1)*slot_bytes).
    make_queue : callable
        Makes an ``IoQueue``, or a queue with its interface.
    deadline_s : float
        An access that takes longer fails.
    probe_s : float
        Interval at which an offline directory is probed.
    files : FileLayer
    queue_options
        For ``make_queue``.

    Raises
    ------
    CapacityError, StorageError, DirectoryInUseError, OSError
        As ``open_directories`` and ``make_queue``, or there are too many open files; nothing is left open then.
    """

    slots: StripedSlots

    def __init__(
        self, directories: Sequence[Path], capacity_bytes: int, slot_bytes: int, domain: bytes, memory: Any, *,
        make_queue: Callable[..., Any] = IoQueue, deadline_s: float = 10.0, probe_s: float = 5.0,
        files: FileLayer = os, **queue_options: Any,
    ) -> None:
        if slot_bytes < 1 or slot_bytes % 4096:
            raise ValueError(f"slots of {slot_bytes} bytes: must be a multiple of 4096")
        self.slot_bytes, self._deadline_s = slot_bytes, deadline_s
        self._domain = xxh3_64(domain)
        self._lock, self._closed = threading.Lock(), False
        with ExitStack() as opened:
            self._directories = open_directories(directories, capacity_bytes, slot_bytes, files, probe_s)
            opened.callback(close_directories, self._directories, clean=False)
            self.slots = StripedSlots(self._directories)
            self.num_slots = self.slots.capacity
            self._ledger = SlotLedger(self.num_slots)
            self._health = SlotHealth(self.slots, self.num_slots)
            fds = [directory.data.fd for directory in self._directories]
            queue = make_queue(fds, memory, deadline_s=deadline_s, **queue_options)
            opened.callback(queue.close)
            self._queues = StoreQueues(queue, memoryview(memory).nbytes // slot_bytes, slot_bytes)
            self._batches = Batches(queue.event_fd)
            opened.pop_all()
        self._floor = max(directory.table.header.floor for directory in self._directories)
        self._sequence = max(time.time_ns(), self._floor)   # last number used; from a clock, so that it always rises
        self._records = RecordSteps(self._ledger, self._domain, self._lock)
        self.event_fd = self._batches.event_fd
        for directory in self._directories:
            directory.is_stuck = partial(self._is_stuck, directory)

    # ---- start, end -------------------------------------------------------------------------------------------

    def register(self, upto_bytes: int) -> None:
        self._queues.host.register(upto_bytes)

    def recover(self) -> Recovered:
        """Read the tables: the newest block of each key of this domain, the oldest first.

        Must be called before any other method; InvariantError if slots are in use. The slots of these blocks are in use
        afterwards; the caller must free the slots of the blocks that it does not use.
        """
        slots, records, used, last_sequence = newest_records(self._directories, self._domain, self._floor)
        with self._lock:
            self._ledger.recorded[used] = True
            self._ledger.learn(slots, records["key"], records["checksum"])
            self._sequence = max(self._sequence, last_sequence)
        self.slots.take_only(slots)
        return Recovered(np.ascontiguousarray(records["key"]), np.ascontiguousarray(records["parent"]), slots)

    def attach_device(self, make_queue: Callable[[list[int]], Any]) -> None:
        """Move blocks between the files and the pages of a GPU with ``make_queue(fds)``, a ``GdsQueue``. The store owns
        the queue, and closes an earlier one."""
        queue = make_queue([directory.data.fd for directory in self._directories])
        with self._lock:
            self._queues.close_device()
            if self._closed:
                queue.close()
                return
            self._take()
            self._queues.attach(queue)
            self._batches.watch(queue.event_fd)

    @property
    def device_is_ready(self) -> bool:
        return self._queues.device_is_ready

    def clear(self) -> None:
        """Drop every block, also after a restart; moves under way fail. Waits for the disks, up to the deadline.

        Raises
        ------
        StorageError
            A directory could not be cleared. It offers no blocks until a restart, and may offer them afterwards.
        """
        with self._lock:
            if self._closed:
                raise StorageError("the SSD tier is closed: clear it earlier, or delete the files in its directories")
            self._floor = self._sequence = max(self._sequence, time.time_ns())      # above the floor of any directory
            self._ledger.forget(slice(None))
            for batch in self._batches:
                self._stop(batch)
        raise_floor(self._directories, self._floor, self._deadline_s)

    def close(self) -> None:
        """Cancel moves that have not begun, wait (bounded) for the others, and mark the tables as closed. May be called
        again. ``results`` still reports the results that were not reported.

        Raises
        ------
        TransferError
            The kernel still has accesses to a disk that hangs. The host memory must not be reused. Files stay open.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for batch in self._batches:
                self._stop(batch)
        deadline = time.monotonic() + self._deadline_s
        while len(self._batches) and (left := deadline - time.monotonic()) > 0:
            self._batches.wait(min(left, 0.1))
            with self._lock:
                self._take()
        with self._lock:
            clean = len(self._batches) == 0
            for batch in self._batches:
                self._fail(batch, batch.left())
            self._batches.close()
            self._queues.close_device()
        self._queues.host.close()
        close_directories(self._directories, clean)

    # ---- jobs -------------------------------------------------------------------------------------------------

    def write(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        parents: NDArray[np.uint64], fence: int | None = None,
    ) -> None:
        """Write blocks from host slots to slots, which the caller has allocated; the blocks in them are dropped. With a
        ``fence``, ``host_slots`` are pages of the GPU, which may be accessed from that step of its rank on."""
        check_blocks(slots, host_slots, (keys, parents), self.num_slots, self._queues.places(fence))
        if len(np.unique(slots)) != len(slots):
            raise ValueError("a slot is given twice")
        with self._lock:
            able = ~self._ledger.writing[slots] & ~self.slots.is_retired(slots) & keys.any(axis=1)
            for directory, where in self._begin(job, slots, able, fence):
                batch = self._batches.begin(WRITE, job, directory, where, slots, host_slots, keys, fence)
                batch.parents = parents[where]
                batch.sequence = self._sequence + 1
                self._sequence += len(where)
                self._ledger.writing[batch.slots] = True
                self._ledger.forget(batch.slots)
                directory.post(partial(self._erase_and_submit, batch))

    def read(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        fence: int | None = None,
    ) -> None:
        """Read blocks from slots to host slots. A read succeeds only if the slot holds the block that ``keys`` names.
        With a ``fence``, as in ``write``, a read that fails may have changed the page."""
        check_blocks(slots, host_slots, (keys,), self.num_slots, self._queues.places(fence))
        with self._lock:
            named = self._ledger.holds(slots, keys)
            self._health.log.add("key_mismatches", int((~named).sum()), "SSD tier")
            for directory, where in self._begin(job, slots, named, fence):
                self._submit(self._batches.begin(READ, job, directory, where, slots, host_slots, keys, fence))

    def erase(self, job: int, slots: NDArray[np.int32]) -> None:
        """Empty slots, which the caller has allocated; they stay empty after a restart or a loss of power."""
        with self._lock:
            for directory, where in self.slots.by_directory(slots, np.ones(len(slots), dtype=np.bool_)):
                directory.post(partial(self._erase, self._batches.begin_erasing(job, directory, where, slots)))

    def suspect(self, slots: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        with self._lock:
            return ~self._ledger.holds(slots, keys) | self._health.had_errors(slots)

    def cancel(self, job: int) -> None:
        """Fail the moves of a job that have not begun; moves under way are finished. An unknown job is ignored."""
        with self._lock:
            for batch in self._batches.of_job(job):
                self._stop(batch)

    def results(self) -> list[Result]:
        with self._lock:
            if not self._closed:
                self._take()
                for directory in [each for each in self._directories if each.hangs(self._deadline_s)]:
                    self._health.hung(directory, self._deadline_s)
                    self._after_offline(directory, hung=True)
            return self._batches.take_results()

    def usable(self) -> bool:
        return not self._closed and any(directory.usable for directory in self._directories)

    def usable_slots(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether the directory of each slot is online."""
        return self.slots.on_usable(slots) & (not self._closed)

    def checksums(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        return self._ledger.checksums_of(slots)

    def stats(self) -> dict[str, int]:
        return {
            **self._health.log.counts,
            "blocks_read": self._batches.num_ok[READ], "blocks_written": self._batches.num_ok[WRITE],
            **self.slots.stats(),
            "device_is_ready": int(self.device_is_ready),
        }

    # ---- moves under way; under the lock ----------------------------------------------------------------------

    def _begin(self, job: int, slots: NDArray[np.int32], able: NDArray[np.bool_], fence: int | None) -> Parts:
        """Indices of the blocks of each directory. Blocks that are not ``able``, or whose move is impossible, fail."""
        usable = self.usable_slots(slots)
        self._health.log.add("refused", int((~usable).sum()), "SSD tier", "a directory is offline")
        able = able & usable & self._queues.takes(fence)
        failed = np.flatnonzero(~able)
        self._batches.report(job, failed, np.zeros(len(failed), dtype=np.bool_))
        return self.slots.by_directory(slots, able)

    def _submit(self, batch: Batch) -> None:
        try:
            self._queues.submit(batch, self._directories.index(batch.directory))
        except Exception:                                   # such as MemoryError: the queue accepted no block
            logger.exception("%s: %d blocks are not moved", batch.directory.path, len(batch.slots))
            self._fail(batch, batch.left())

    def _stop(self, batch: Batch) -> None:
        batch.stopped = True
        if batch.submitted:
            self._queues.cancel(batch)
            self._batches.wake()
        else:
            self._fail(batch, batch.left())

    def _is_stuck(self, directory: SsdDirectory) -> bool:
        with self._lock:
            return self._health.has_quarantine(directory) or self._batches.any_late(directory)

    def _fail(self, batch: Batch, positions: NDArray[np.intp]) -> None:
        self._end(batch, positions, np.zeros(len(positions), dtype=np.bool_))

    def _end(self, batch: Batch, positions: NDArray[np.intp], ok: NDArray[np.bool_]) -> None:
        if batch.kind == WRITE:
            self._ledger.writing[batch.slots[positions]] = False
        self._batches.end(batch, positions, ok)

    # ---- on a directory's thread, without the lock ------------------------------------------------------------

    def _erase_and_submit(self, batch: Batch) -> None:
        directory, failed = batch.directory, self._records.empty(batch)
        with self._lock:
            left = batch.left()                             # empty if the batch was cancelled meanwhile
            if failed or self._closed or batch.sequence <= self._floor or not self._queues.takes(batch.fence):
                self._fail(batch, left)
                if failed and self._health.fault(directory, batch.slots[left], "table_errors", failed):
                    self._after_offline(directory)
            elif len(left):
                self._submit(batch)

    def _erase(self, batch: Batch) -> None:
        directory, failed = batch.directory, self._records.empty(batch, for_good=True)      # even if it was stopped
        with self._lock:
            self._ledger.forget(batch.slots)
            self._end(batch, left := batch.left(), np.full(len(left), not failed))
            if failed and self._health.fault(directory, batch.slots, "table_errors", failed):
                self._after_offline(directory)

    def _record(self, directory: SsdDirectory) -> None:
        parts, slots, failed = self._records.write(directory)
        with self._lock:
            for batch, positions, checksums in parts:
                still = ~batch.ended[positions]
                ok = not failed and batch.sequence > self._floor
                if ok:
                    self._ledger.learn(batch.slots[positions][still], batch.keys[positions][still], checksums[still])
                self._end(batch, positions[still], np.full(int(still.sum()), ok))
            if failed and self._health.fault(directory, slots, "table_errors", failed):
                self._after_offline(directory)
        directory.data.moved(len(slots) * self.slot_bytes)

    # ---- results ----------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Process the results of the queues."""
        self._batches.drain_event()
        tags, results, checksums = self._queues.take()
        for batch, at, positions in self._batches.of_tags(tags):
            finish = self._finish_read if batch.kind == READ else self._finish_write
            at, positions = at[~batch.ended[positions]], positions[~batch.ended[positions]]
            batch.late[positions] = np.isin(results[at], LATE)
            try:
                finish(batch, positions, results[at], checksums[at])
            except Exception:                               # other batches must get their results all the same
                logger.exception("%s: %d blocks failed", batch.directory.path, len(at))
                self._fail(batch, positions[~(batch.ended | batch.late)[positions]])
        busy = self._queues.busy()
        for batch in self._batches.late():
            self._fail(batch, np.flatnonzero(batch.late & ~np.isin(batch.tags(), busy)))
        self._health.release(busy)

    def _finish_read(
        self, batch: Batch, positions: NDArray[np.intp], results: NDArray[np.int32], checksums: NDArray[np.uint64]
    ) -> None:
        directory, slots = batch.directory, batch.slots[positions]
        done, right = results == 0, checksums == self._ledger.checksums[slots]
        named = self._ledger.holds(slots, batch.keys[positions])    # false if rewritten or cleared meanwhile
        ok = done & named & right
        late = batch.late[positions]                        # reported once the kernel cannot access their memory
        self._end(batch, positions[~late], ok[~late])
        if not directory.data.is_direct:
            directory.post(partial(directory.data.moved, len(positions) * self.slot_bytes))
        if ok.any():
            directory.succeeded()
        if not ok.all():
            wrong = slots[done & named & ~right]
            self._ledger.forget(wrong)
            self._health.log.add("key_mismatches", int((done & ~named).sum()), directory.path)
            out = self._health.judge(directory, slots, results, "read_errors")
            if self._health.fault(directory, wrong, "checksum_mismatches", f"slots {wrong[:4]}") or out:
                self._after_offline(directory)

    def _finish_write(
        self, batch: Batch, positions: NDArray[np.intp], results: NDArray[np.int32], checksums: NDArray[np.uint64]
    ) -> None:
        directory, done = batch.directory, (results == 0) & (batch.fence is None or not batch.stopped)
        batch.moved[positions[done]] = True
        if done.any():
            directory.succeeded()
            if self._records.add(batch, positions[done], checksums[done]):
                directory.post(partial(self._record, directory))
        if batch.late.any():
            kept = batch.late & np.isin(batch.tags(), self._queues.busy())
            self._health.quarantine(directory if batch.fence is None else None, batch.slots[kept], batch.tags()[kept])
        out = self._health.judge(directory, batch.slots[positions], results, "write_errors")
        self._fail(batch, positions[~done])
        if out:
            self._after_offline(directory)

    def _after_offline(self, directory: SsdDirectory, hung: bool = False) -> None:
        """Stop the batches of an offline directory. ``hung``: its thread writes no records, so moved blocks fail."""
        for batch in self._batches:
            if batch.directory is directory:
                if hung:
                    self._fail(batch, np.flatnonzero(batch.moved & ~batch.ended))
                self._stop(batch)
