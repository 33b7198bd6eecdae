"""What the slots of a store hold, as far as it knows."""

import numpy as np
from numpy.typing import NDArray


class SlotLedger:
    """Of each slot: the key and the checksum in its record, and whether it is being written. The caller locks.

    Attributes
    ----------
    checksums : (num_slots,) uint64
    writing : (num_slots,) bool
    recorded : (num_slots,) bool
        The table may hold a record, so it has to be emptied before the slot is written. Belongs to the thread of the
        slot's directory.
    """

    def __init__(self, num_slots: int) -> None:
        self._keys = np.zeros((num_slots, 2), dtype=np.uint64)      # zeros: nothing
        self.checksums = np.zeros(num_slots, dtype=np.uint64)
        self.writing = np.zeros(num_slots, dtype=np.bool_)
        self.recorded = np.zeros(num_slots, dtype=np.bool_)

    def holds(self, slots: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: whether each slot holds the block of the key beside it."""
        held = self._keys[slots]
        same: NDArray[np.bool_] = (held == keys).all(axis=1) & held.any(axis=1)
        return same

    def learn(self, slots: NDArray[np.int32], keys: NDArray[np.uint64], checksums: NDArray[np.uint64]) -> None:
        """These slots hold these blocks."""
        self._keys[slots] = keys
        self.checksums[slots] = checksums

    def forget(self, slots: NDArray[np.int32] | slice) -> None:
        """These slots hold nothing."""
        self._keys[slots] = 0
