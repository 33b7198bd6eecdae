"""Which slots and directories of a store have failed too often."""

import errno
import os

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.ssd.directory import SsdDirectory
from flexkv.storage.ssd.fault_log import FaultLog
from flexkv.storage.ssd.striped_slots import StripedSlots

LATE = np.array([-errno.ETIMEDOUT, -errno.ESHUTDOWN])
"""Results of accesses that may still be done: by the kernel, after it took too long, or by a rank that hung up."""

_ERRORS_OF_SLOT = 2
"""A slot with so many errors is retired."""


class SlotHealth:
    """Counts errors: too many of a slot retire it, too many in a row take its directory out. The caller locks.

    A slot that the kernel may still write to, after a write took too long, is held: nobody gets it until then.

    Parameters
    ----------
    slots : StripedSlots
    """

    def __init__(self, slots: StripedSlots, num_slots: int) -> None:
        self.log = FaultLog((
            "read_errors", "write_errors", "table_errors", "timeouts", "checksum_mismatches", "key_mismatches",
            "slots_retired", "directories_taken_out", "refused",
        ))
        self._slots = slots
        self._errors = np.zeros(num_slots, dtype=np.uint8)
        self._held: dict[int, tuple[SsdDirectory | None, int]] = {}        # tag of the write -> where it is

    def had_errors(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool."""
        return np.asarray(self._errors[slots] > 0)

    def judge(
        self, directory: SsdDirectory, slots: NDArray[np.int32], results: NDArray[np.int32], kind: str
    ) -> bool:
        """Look at the queue's results ((n,) 0 or negative errno) of slots; True: the directory is taken out now.

        That an access took too long says nothing of its slot: one that hangs ends all that waits for its file.
        """
        if not results.any():
            return False
        num_late = int((results == -errno.ETIMEDOUT).sum())
        out = self._count(directory, num_late, "timeouts", "an access did not end in time")
        failed = (results < 0) & ~np.isin(results, LATE) & (results != -errno.ECANCELED)
        detail = os.strerror(-int(results[failed][0])) if failed.any() else ""
        return self.fault(directory, slots[failed], kind, detail) or out

    def fault(self, directory: SsdDirectory, slots: NDArray[np.int32], kind: str, detail: str) -> bool:
        """Errors at slots; True: the directory is taken out now."""
        self._errors[slots] += 1
        bad = slots[self._errors[slots] >= _ERRORS_OF_SLOT]
        self.log.add("slots_retired", self._slots.retire(bad), directory.path, "they are not used again")
        return self._count(directory, len(slots), kind, detail)

    def _count(self, directory: SsdDirectory, count: int, kind: str, detail: str) -> bool:
        if count == 0:
            return False
        self.log.add(kind, count, directory.path, detail)
        if not directory.failed(count):
            return False
        self.log.add("directories_taken_out", 1, directory.path)
        return True

    def hung(self, directory: SsdDirectory, seconds: float) -> None:
        """A directory's thread has not gone on for so long: it is taken out, if it is not already."""
        if directory.take_out(f"its slot table has not answered for {seconds:g} s"):
            self.log.add("timeouts", 1, directory.path, "slot table")
            self.log.add("directories_taken_out", 1, directory.path)

    # ---- writes that the kernel keeps -------------------------------------------------------------------------

    def hold(self, directory: SsdDirectory | None, slots: NDArray[np.int32], tags: NDArray[np.uint64]) -> None:
        """Writes to these slots have failed, and may still be done: by the kernel, in this directory, or by a rank."""
        self._held.update((tag, (directory, slot)) for tag, slot in zip(tags.tolist(), slots.tolist(), strict=True))
        self._slots.retire(slots)

    def holds(self, directory: SsdDirectory) -> bool:
        """Whether slots of a directory are held."""
        return any(owner is directory for owner, _ in self._held.values())

    def let_go(self, busy: NDArray[np.uint64]) -> None:
        """Give back the slots that are held, except those whose tags are among ``busy``."""
        if not self._held:
            return
        over = self._held.keys() - set(busy.tolist())
        slots = np.array([self._held.pop(tag)[1] for tag in over], dtype=np.int32)
        self._slots.restore(slots[self._errors[slots] < _ERRORS_OF_SLOT])
