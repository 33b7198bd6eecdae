"""Contents of the slots of a store, in memory."""

import numpy as np
from numpy.typing import NDArray


class SlotLedger:
    """Key and checksum of the block in each slot, and whether the slot is being written. The caller must hold the
    store's lock.

    Attributes
    ----------
    checksums : (num_slots,) uint64
    writing : (num_slots,) bool
    recorded : (num_slots,) bool
        The slot table may hold a record, which must be emptied before the slot is written. Only the thread of the
        slot's directory may access it, once the store is in service.
    """

    def __init__(self, num_slots: int) -> None:
        self._keys = np.zeros((num_slots, 2), dtype=np.uint64)      # zeros: empty
        self.checksums = np.zeros(num_slots, dtype=np.uint64)
        self.writing = np.zeros(num_slots, dtype=np.bool_)
        self.recorded = np.zeros(num_slots, dtype=np.bool_)

    def holds(self, slots: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: whether each slot holds the block of its key in ``keys`` ((n, 2) uint64)."""
        held = self._keys[slots]
        same: NDArray[np.bool_] = (held == keys).all(axis=1) & held.any(axis=1)
        return same

    def checksums_of(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """(n,) uint64: checksums of slots, which the caller's moves keep from changing; 0 for an empty slot. Needs no
        lock."""
        return np.where(self._keys[slots].any(axis=1), self.checksums[slots], np.uint64(0))

    def learn(self, slots: NDArray[np.int32], keys: NDArray[np.uint64], checksums: NDArray[np.uint64]) -> None:
        """Enter the blocks that these slots hold."""
        self._keys[slots] = keys
        self.checksums[slots] = checksums

    def forget(self, slots: NDArray[np.int32] | slice) -> None:
        """Mark these slots as empty."""
        self._keys[slots] = 0
