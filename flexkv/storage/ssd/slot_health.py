"""Error counts of the slots and directories of a store."""

import errno
import os

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.limbo import Limbo
from flexkv.storage.ssd.directory import SsdDirectory
from flexkv.storage.ssd.fault_log import FaultLog
from flexkv.storage.ssd.striped_slots import StripedSlots

LATE = np.array([-errno.ETIMEDOUT, -errno.ESHUTDOWN])
"""Results of accesses that may still happen: by the kernel after the deadline, or by a rank that hung up."""

_ERRORS_OF_SLOT = 2
"""Number of errors after which a slot is retired."""


class SlotHealth:
    """Counts errors: too many errors of a slot retire it, too many in a row take its directory offline. The caller must
    hold the store's lock.

    A slot that may still be written after its write failed is in quarantine: it is not allocated until that write has
    ended.

    Parameters
    ----------
    slots : StripedSlots
    """

    def __init__(self, slots: StripedSlots, num_slots: int) -> None:
        self.log = FaultLog((
            "read_errors", "write_errors", "table_errors", "timeouts", "checksum_mismatches", "key_mismatches",
            "slots_retired", "directories_gone_offline", "refused",
        ))
        self._slots = slots
        self._errors = np.zeros(num_slots, dtype=np.uint8)
        self._quarantine = Limbo()                                         # held by the tags of writes
        self._owners: dict[int, SsdDirectory | None] = {}                  # the directory of each such write

    def had_errors(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether each slot had an error."""
        return np.asarray(self._errors[slots] > 0)

    def judge(
        self, directory: SsdDirectory, slots: NDArray[np.int32], results: NDArray[np.int32], kind: str
    ) -> bool:
        """Count the errors in the queue's results ((n,) 0 or negative errno) of slots. Returns whether this takes the
        directory offline.

        A timeout does not count against its slot, because one access that hangs delays all accesses of its file.
        """
        if not results.any():
            return False
        num_late = int((results == -errno.ETIMEDOUT).sum())
        out = self._count(directory, num_late, "timeouts", "an access did not end in time")
        failed = (results < 0) & ~np.isin(results, LATE) & (results != -errno.ECANCELED)
        detail = os.strerror(-int(results[failed][0])) if failed.any() else ""
        return self.fault(directory, slots[failed], kind, detail) or out

    def fault(self, directory: SsdDirectory, slots: NDArray[np.int32], kind: str, detail: str) -> bool:
        """Count an error of each slot. Returns whether this takes the directory offline."""
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
        self.log.add("directories_gone_offline", 1, directory.path)
        return True

    def hung(self, directory: SsdDirectory, seconds: float) -> None:
        """Take a directory offline whose thread has made no progress for ``seconds``, if it is online."""
        if directory.take_offline(f"its slot table has not answered for {seconds:g} s"):
            self.log.add("timeouts", 1, directory.path, "slot table")
            self.log.add("directories_gone_offline", 1, directory.path)

    # ---- writes that failed and may still happen --------------------------------------------------------------

    def quarantine(self, directory: SsdDirectory | None, slots: NDArray[np.int32], tags: NDArray[np.uint64]) -> None:
        """Keep slots from use whose writes failed and may still happen: by the kernel in ``directory``, or (None) by a
        rank."""
        for i, tag in enumerate(tags.tolist()):
            self._quarantine.hold(slots[i : i + 1], [tag])
            self._owners[tag] = directory
        self._slots.retire(slots)

    def has_quarantine(self, directory: SsdDirectory) -> bool:
        """Whether slots of a directory are in quarantine because of the kernel."""
        return any(owner is directory for owner in self._owners.values())

    def release(self, busy: NDArray[np.uint64]) -> None:
        """Release the slots in quarantine whose writes are not among the tags ``busy``."""
        for tag in self._owners.keys() - set(busy.tolist()):
            del self._owners[tag]
            slots = self._quarantine.release(tag)
            self._slots.restore(slots[self._errors[slots] < _ERRORS_OF_SLOT])
