"""Steps that write and empty records of slot tables, on the thread of each directory."""

import threading

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.ssd.batches import Batch
from flexkv.storage.ssd.directory import SsdDirectory
from flexkv.storage.ssd.slot_ledger import SlotLedger

Moved = list[tuple[Batch, NDArray[np.intp], NDArray[np.uint64]]]
"""Batches, positions of the blocks whose data is written, and checksums of these blocks."""


class RecordSteps:
    """Writes and empties records. A directory's thread runs its steps in the order in which they were posted, so a slot
    that is emptied, freed and written again ends with the newest record.

    Parameters
    ----------
    ledger : SlotLedger
    domain : int
    lock : Lock
        The store's lock.
    """

    def __init__(self, ledger: SlotLedger, domain: int, lock: threading.Lock) -> None:
        self._ledger = ledger
        self._domain = domain
        self._lock = lock
        self._waiting: dict[SsdDirectory, Moved] = {}

    def add(self, batch: Batch, positions: NDArray[np.intp], checksums: NDArray[np.uint64]) -> bool:
        """Add blocks whose data is written and whose records must be written. Returns whether the caller must post a
        step for that. Under the lock."""
        waiting = self._waiting.setdefault(batch.directory, [])
        waiting.append((batch, positions, checksums))
        return len(waiting) == 1

    def write(self, directory: SsdDirectory) -> tuple[Moved, NDArray[np.int32], str]:
        """Write the records of all blocks added, with as few calls as possible. Returns these blocks, their slots, and
        the error, empty if there is none. On the directory's thread."""
        with self._lock:
            parts = self._waiting.pop(directory)
        slots = np.concatenate([batch.slots[positions] for batch, positions, _ in parts])
        records = np.concatenate([batch.records(positions, sums, self._domain) for batch, positions, sums in parts])
        self._ledger.recorded[slots] = True
        return parts, slots, directory.fails(directory.table.write, slots - np.int32(directory.first_slot), records)

    def empty(self, batch: Batch, for_good: bool = False) -> str:
        """Empty the records of a batch's slots. Returns the error, empty if there is none. On the directory's thread.

        ``for_good``: sync the table, so that the records stay empty after a loss of power.
        """
        directory = batch.directory
        slots = batch.slots[self._ledger.recorded[batch.slots]]
        if len(slots) == 0:
            return ""
        failed = directory.fails(directory.table.erase, slots - np.int32(directory.first_slot))
        if not failed and for_good:
            failed = directory.fails(directory.table.sync)
        if not failed:
            self._ledger.recorded[slots] = False
        return failed
