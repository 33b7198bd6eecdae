"""Which slots and directories of a store have failed too often."""

import errno
import os

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.fault_log import FaultLog
from flexkv.storage.ssd_directory import SsdDirectory
from flexkv.storage.striped_slots import StripedSlots

_ERRORS_OF_SLOT = 2
"""A slot with so many errors is retired."""


class SlotHealth:
    """Counts errors: too many of a slot retire it, too many in a row take its directory out. The caller locks.

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

    def judge(
        self, directory: SsdDirectory, slots: NDArray[np.int32], results: NDArray[np.int32], kind: str
    ) -> bool:
        """Look at the queue's results ((n,) 0 or negative errno) of slots; True: the directory is taken out now.

        A slot whose access took too long may still be accessed, so it is not used again.
        """
        if not results.any():
            return False
        late = slots[results == -errno.ETIMEDOUT]
        self._retire(directory, late)
        out = self.fault(directory, late, "timeouts", "an access did not end in time")
        failed = (results < 0) & (results != -errno.ETIMEDOUT) & (results != -errno.ECANCELED)
        detail = os.strerror(-int(results[failed][0])) if failed.any() else ""
        return self.fault(directory, slots[failed], kind, detail) or out

    def fault(self, directory: SsdDirectory, slots: NDArray[np.int32], kind: str, detail: str) -> bool:
        """Errors at slots; True: the directory is taken out now."""
        if len(slots) == 0:
            return False
        self.log.add(kind, len(slots), directory.path, detail)
        self._errors[slots] += 1
        self._retire(directory, slots[self._errors[slots] >= _ERRORS_OF_SLOT])
        if not directory.failed(len(slots)):
            return False
        self.log.add("directories_taken_out", 1, directory.path)
        return True

    def hung(self, directory: SsdDirectory, seconds: float) -> None:
        """A directory's thread has not gone on for so long: it is taken out, if it is not already."""
        if directory.take_out(f"its slot table has not answered for {seconds:g} s"):
            self.log.add("timeouts", 1, directory.path, "slot table")
            self.log.add("directories_taken_out", 1, directory.path)

    def _retire(self, directory: SsdDirectory, slots: NDArray[np.int32]) -> None:
        if len(slots):
            self.log.add("slots_retired", self._slots.retire(slots), directory.path, "they are not used again")
