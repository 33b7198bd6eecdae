"""Limbo: slots of evicted blocks that are not released yet."""

import math
from collections.abc import Collection, Hashable

import numpy as np
from numpy.typing import NDArray


class Limbo:
    """Slots between the two steps of eviction. An *evicted* block is in no match any more; its slot is *released*, and
    can be used again, once nothing can read or write it. Until then, its holders are here: reads and writes under way,
    or leases. The caller must serialize calls.
    """

    def __init__(self) -> None:
        self._holders: dict[int, set[Hashable]] = {}          # of each slot
        self._slots: dict[Hashable, set[int]] = {}            # of each holder
        self._until: dict[Hashable, float] = {}               # of each holder with a deadline

    def __len__(self) -> int:
        return len(self._holders)

    def hold(self, slots: NDArray[np.int32], holders: Collection[Hashable], until: float = math.inf) -> None:
        """Keep slots ((n,) int32) until each of the ``holders``, at least one, has released them.

        ``until``: time after which ``expire`` releases for these holders. Infinite for a transfer, which may touch the
        slots until it has ended, however long that takes.
        """
        if not holders:
            raise ValueError("a slot without a holder is free")
        for slot in slots.tolist():
            self._holders.setdefault(slot, set()).update(holders)
        for holder in holders:
            self._slots.setdefault(holder, set()).update(slots.tolist())
            if until < math.inf:
                self._until[holder] = until

    def release(self, holder: Hashable) -> NDArray[np.int32]:
        """(k,) int32, ascending: slots that are released because ``holder`` was the last to hold them. A holder that
        holds nothing is ignored."""
        self._until.pop(holder, None)
        released = []
        for slot in self._slots.pop(holder, ()):
            left = self._holders[slot]
            left.discard(holder)
            if not left:
                del self._holders[slot]
                released.append(slot)
        return np.array(sorted(released), dtype=np.int32)

    def expire(self, now: float) -> NDArray[np.int32]:
        """(k,) int32: slots that are released because the deadlines of their last holders have passed."""
        over = [holder for holder, until in self._until.items() if until <= now]
        return np.concatenate([np.zeros(0, dtype=np.int32), *(self.release(holder) for holder in over)])

    @property
    def slots(self) -> NDArray[np.int32]:
        """(n,) int32, ascending: the slots that are held."""
        return np.array(sorted(self._holders), dtype=np.int32)
