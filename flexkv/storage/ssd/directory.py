"""One directory of the SSD tier: its lock, slot table and data file, and the health of its disk."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flexkv.errors import CapacityError, StorageError
from flexkv.storage.ssd.data_file import PROBE_BYTES, DataFile, allocate
from flexkv.storage.ssd.directory_lock import DirectoryLock
from flexkv.storage.ssd.file_layer import FileLayer, open_private
from flexkv.storage.ssd.slot_table import HEADER_BYTES, RECORD, Header, SlotTable

logger = logging.getLogger("flexkv.storage")

TABLE_NAME = "flexkv.table"
DATA_NAME = "flexkv.data"

_LOCK_BYTES = 4096
"""Space budgeted for the lock file, which names its owner."""

_EXTENT_BYTES = 32
"""Space budgeted for each slot's extent. Slots that are written in scattered order may become an extent each, and the
file system counts the blocks that list the extents (ext4: 12 bytes an extent, in blocks that may be half full)."""

_EXTENTS_BYTES = 1 << 16
"""Space budgeted for the first such block of each file, and for the extents into which the allocation was split."""

_ERRORS_IN_ROW = 16
"""Number of errors, without a success in between, after which a directory is taken offline."""

_FIRST_BANDWIDTH = 1e9
"""Assumed bandwidth of a directory in bytes per second, until it has been measured."""

_CLOSE_S = 10.0
"""Longest wait for all disks while directories are closed. A disk that takes longer hangs."""


def total_bytes(num_slots: int, slot_bytes: int) -> int:
    """Maximum number of bytes that the files of a directory with ``num_slots`` slots take on a disk."""
    fixed = _LOCK_BYTES + _EXTENTS_BYTES + PROBE_BYTES
    return fixed + SlotTable.num_bytes(num_slots) + num_slots * (slot_bytes + _EXTENT_BYTES)


def slots_that_fit(num_bytes: int, slot_bytes: int) -> int:
    """Maximum number of slots whose files take ``num_bytes`` bytes or less."""
    num_slots = max(0, (num_bytes - total_bytes(0, slot_bytes)) // (slot_bytes + 64 + _EXTENT_BYTES))
    while num_slots and total_bytes(num_slots, slot_bytes) > num_bytes:
        num_slots -= 1
    return num_slots


class SsdDirectory:
    """Slots ``first_slot`` to ``first_slot + num_slots - 1`` of a store.

    Steps that may wait for the disk are posted, and run one after another on the directory's own thread, so that a disk
    that hangs delays no other directory. The other methods are called under the store's lock, and do not wait.

    Attributes
    ----------
    table : SlotTable
    data : DataFile
    usable : bool
        Whether the directory is online. Many errors in a row take it offline, until a probe succeeds.
    queued_bytes : int
        Bytes that were given to the queue and have not ended.
    is_stuck : callable () -> bool
        Whether the kernel still has an access to the data file after its deadline, so that the queue accepts no other.
        Called by the directory's thread.

    Raises
    ------
    DirectoryInUseError, StorageError
        As ``DirectoryLock``, ``DataFile``.
    CapacityError
        The disk has no room, or ``num_bytes`` is too small for a slot.
    """

    def __init__(
        self, path: Path, first_slot: int, num_bytes: int, slot_bytes: int, files: FileLayer, probe_s: float
    ) -> None:
        self.path = path
        self.first_slot = first_slot
        self.num_slots = slots_that_fit(num_bytes, slot_bytes)
        self.slot_bytes = slot_bytes
        self.usable = True
        self.queued_bytes = 0
        self.is_stuck: Callable[[], bool] = lambda: False
        self._files = files
        self._probe_s = probe_s
        self._errors_in_row = 0
        self._moved_bytes, self._busy_s, self._busy_since = 0.0, 0.0, 0.0
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._step_began: float | None = None
        if self.num_slots < 1:
            raise CapacityError(
                f"{num_bytes} bytes for {path} hold no slot of {slot_bytes} bytes: set ssd_cache_gb higher"
            )
        self._lock = DirectoryLock(path)
        self._table_fd = -1
        try:
            self._open()
            self._thread = threading.Thread(target=self._work, name=f"flexkv-ssd-{first_slot}", daemon=True)
            self._thread.start()
        except OSError as error:
            self._release()
            raise _unusable(path, error) from error
        except BaseException:
            self._release()
            raise

    # ---- opening and closing ----------------------------------------------------------------------------------

    def _open(self) -> None:
        table_path, data_path = self.path / TABLE_NAME, self.path / DATA_NAME
        self._table_fd = open_private(table_path, 0)
        self.table = SlotTable(self._table_fd, self._files)
        before = os.fstat(self._table_fd).st_size
        header = self.table.load()
        if header is None or header.slot_bytes != self.slot_bytes or not data_path.exists():
            if before:
                logger.warning("%s is made anew: %s", self.path, self._why_not(header))
                self._files.ftruncate(self._table_fd, 0)
                self._files.fdatasync(self._table_fd)
            header = None
        elif header.num_slots != self.num_slots:
            logger.info("%s had %d slots, and gets %d", self.path, header.num_slots, self.num_slots)
        if header is not None and not header.clean:
            logger.info("%s was not closed; blocks that were being written are dropped", self.path)
        if header is not None and header.num_slots > self.num_slots:
            self.table.update(num_slots=self.num_slots)         # before its records are cut off
        if header is not None:                                  # bytes behind the last record are not records
            kept = min(header.num_slots, self.num_slots)
            self._files.ftruncate(self._table_fd, HEADER_BYTES + kept * RECORD.itemsize)
        self._allocate(table_path, data_path, before)
        floor = 0 if header is None else header.floor
        self.table.store(Header(self.slot_bytes, self.num_slots, floor))

    def _why_not(self, header: Header | None) -> str:
        if header is None:
            return "its table has no header that this version can read"
        if header.slot_bytes != self.slot_bytes:
            return f"its slots have {header.slot_bytes} bytes, and {self.slot_bytes} are needed"
        return "its data file is missing"

    def _allocate(self, table_path: Path, data_path: Path, table_before: int) -> None:
        allocate(self._files, self._table_fd, table_path, SlotTable.num_bytes(self.num_slots))
        try:
            self.data = DataFile(data_path, self.num_slots * self.slot_bytes + PROBE_BYTES, self._files)
        except BaseException:
            self._files.ftruncate(self._table_fd, min(table_before, SlotTable.num_bytes(self.num_slots)))
            raise

    def _release(self) -> None:
        if self._table_fd >= 0:
            os.close(self._table_fd)
        if hasattr(self, "data"):
            self.data.close()
        self._lock.release()

    def begin_close(self, clean: bool) -> None:
        """Ask the thread to end; if ``clean``, it first marks the table as closed with no access under way."""
        if clean:
            self.post(self._seal)
        self.post(None)

    def end_close(self, seconds: float) -> None:
        """Wait for the thread, ``seconds`` at most, and close the files."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.error("%s: the disk hangs; its files stay open until this process ends", self.path)
            return
        self._release()

    def _seal(self) -> None:
        try:
            self._files.fdatasync(self.data.fd)
            self.table.sync()
            self.table.update(clean=True)
        except OSError as error:
            logger.error("%s cannot be marked as closed: %s", self.path, error.strerror)

    # ---- the thread -------------------------------------------------------------------------------------------

    def post(self, step: Callable[[], None] | None) -> None:
        """Run a step on the directory's thread; None: end it."""
        self._steps.put(step)

    def forget(self, floor: int) -> None:
        """Make all records with a sequence up to ``floor`` void; waits for the disk. Must be called on the directory's
        thread, or before any step is posted."""
        self.table.update(floor=max(floor, self.table.header.floor))

    def promise(self, step: Callable[[], None]) -> Future[None]:
        """Run a step on the directory's thread; the future completes with the step, or with the OSError that it raises.
        """
        future: Future[None] = Future()

        def run() -> None:
            try:
                step()
                future.set_result(None)
            except OSError as error:
                future.set_exception(error)

        self.post(run)
        return future

    def fails(self, change: Callable[..., None], *what: NDArray[Any]) -> str:
        """Call ``change(*what)``, a method that changes the table; returns the error as text, empty if there is none.
        Catches every exception, because a job whose step raised would never end."""
        try:
            change(*what)
        except OSError as error:
            return str(error)
        except Exception as error:
            logger.exception("%s: the slot table was not changed", self.path)
            return repr(error)
        return ""

    def hangs(self, seconds: float) -> bool:
        """Whether the current step has been under way for longer than ``seconds``."""
        began = self._step_began
        return began is not None and time.monotonic() - began > seconds

    def _work(self) -> None:
        while True:
            try:
                step = self._steps.get(timeout=None if self.usable else self._probe_s)
            except queue.Empty:
                step = self._probe
            if step is None:
                return
            self._step_began = time.monotonic()
            try:
                step()
            except Exception:
                logger.exception("%s: a step failed", self.path)
            self._step_began = None

    # ---- health -----------------------------------------------------------------------------------------------

    def succeeded(self) -> None:
        """Record that an access succeeded."""
        self._errors_in_row = 0

    def failed(self, count: int) -> bool:
        """Record that ``count`` accesses failed. Returns whether this takes the directory offline."""
        self._errors_in_row += count
        return self._errors_in_row >= _ERRORS_IN_ROW and self.take_offline(f"{self._errors_in_row} errors in a row")

    def take_offline(self, why: str) -> bool:
        """Take the directory offline until a probe succeeds. Returns False if it is offline already."""
        if not self.usable:
            return False
        self.usable = False
        logger.error("%s is taken offline: %s; it is probed every %g s", self.path, why, self._probe_s)
        self.post(lambda: None)                             # wakes the thread, which probes from now on
        return True

    def _probe(self) -> None:
        if self.is_stuck():                                 # even if the disk works, the queue accepts no access to it
            return
        try:
            self.data.probe()
            self.table.update()
        except OSError:
            return
        self._errors_in_row = 0
        self.usable = True
        logger.warning("%s works again", self.path)

    # ---- load -------------------------------------------------------------------------------------------------

    def begin(self, num_bytes: int) -> None:
        """Record that ``num_bytes`` bytes were given to the queue."""
        if self.queued_bytes == 0:
            self._busy_since = time.monotonic()
        self.queued_bytes += num_bytes

    def end(self, num_bytes: int, moved_bytes: int) -> None:
        """Record that ``num_bytes`` queued bytes have ended, of which ``moved_bytes`` were moved."""
        now = time.monotonic()
        self._busy_s += now - self._busy_since
        self._moved_bytes += moved_bytes
        self._busy_since = now
        self.queued_bytes -= num_bytes
        if self._busy_s > 1.0:                              # older measurements count half
            self._busy_s, self._moved_bytes = self._busy_s / 2, self._moved_bytes / 2

    @property
    def bandwidth(self) -> float:
        """Recent bandwidth in bytes per second; the assumed one until there are measurements."""
        return (self._moved_bytes + _FIRST_BANDWIDTH / 100) / (self._busy_s + 0.01)


def open_directories(
    paths: Sequence[Path], capacity_bytes: int, slot_bytes: int, files: FileLayer, probe_s: float
) -> list[SsdDirectory]:
    """Open all directories, each with an even share of the capacity. Their slots are numbered consecutively.

    All directories get the highest floor of any of them. So a directory that was not attached when the store was
    cleared is cleared now, and stays cleared if it is later opened alone.

    Raises
    ------
    CapacityError, StorageError, DirectoryInUseError
        As ``SsdDirectory``; directories that were opened are closed again.
    """
    if not paths or capacity_bytes // slot_bytes >= 1 << 31:
        raise CapacityError(
            f"{len(paths)} directories, {capacity_bytes} bytes: set ssd_cache_dir to one or more directories, and "
            f"ssd_cache_gb to less than 2**31 slots of {slot_bytes} bytes"
        )
    opened: list[SsdDirectory] = []
    try:
        for path in paths:
            first = sum(directory.num_slots for directory in opened)
            opened.append(SsdDirectory(Path(path), first, capacity_bytes // len(paths), slot_bytes, files, probe_s))
        floor = max(directory.table.header.floor for directory in opened)
        for directory in opened:
            if directory.table.header.floor < floor:
                directory.forget(floor)
    except OSError as error:
        close_directories(opened, clean=False)
        raise _unusable(directory.path, error) from error
    except BaseException:
        close_directories(opened, clean=False)
        raise
    return opened


def _unusable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be used for the SSD tier: {error.strerror}; see the kernel's log for its disk, or set "
        f"ssd_cache_dir to other directories"
    )


def raise_floor(directories: Sequence[SsdDirectory], floor: int, seconds: float) -> None:
    """Clear all directories at the same time; waits ``seconds`` at most.

    Raises
    ------
    StorageError
        A directory could not be cleared.
    """
    futures = [directory.promise(partial(directory.forget, floor)) for directory in directories]
    wait(futures, seconds)
    failed = []
    for directory, future in zip(directories, futures, strict=True):
        error = future.exception() if future.done() else "the disk hangs"
        if error:
            failed.append(f"{directory.path} ({error})")
    if failed:
        raise StorageError(f"{', '.join(failed)} could not be cleared: delete the files in it before a restart")


def close_directories(directories: Sequence[SsdDirectory], clean: bool) -> None:
    """End all threads and close all files, except files of disks that hang. The total wait is bounded."""
    for directory in directories:
        directory.begin_close(clean)
    deadline = time.monotonic() + _CLOSE_S
    for directory in directories:
        directory.end_close(max(0.0, deadline - time.monotonic()))
