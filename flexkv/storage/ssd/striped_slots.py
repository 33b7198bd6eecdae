"""Slots of several directories as one range of numbers."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.errors import InvariantError
from flexkv.storage.ssd.directory import SsdDirectory

_CHUNK_BYTES = 8 << 20
"""Size of the slots allocated from one directory before the next is considered: large enough for one fast write."""


Parts = Iterator[tuple[SsdDirectory, NDArray[np.intp]]]
"""Directories, and the indices of their slots in an array of slots."""


class StripedSlots:
    """Allocator over directories, with the interface of ``SlotAllocator``. May be called from any thread.

    Slots come from the directory that would finish its queue first, in runs of adjacent slots. Retired slots, and free
    slots of offline directories, cannot be allocated: they count neither as free nor in ``capacity``. A directory may
    be taken offline at any time, so ``allocate`` may return None although ``num_free`` was sufficient just before.

    Parameters
    ----------
    directories : sequence of SsdDirectory
    """

    def __init__(self, directories: Sequence[SsdDirectory]) -> None:
        self._directories = list(directories)
        self._parts = [SlotAllocator(directory.num_slots) for directory in directories]
        self._first = np.array([directory.first_slot for directory in directories], dtype=np.int64)
        self._chunk = max(1, _CHUNK_BYTES // directories[0].slot_bytes)
        self._total = sum(directory.num_slots for directory in directories)
        self._in_use = np.zeros(self._total, dtype=np.bool_)
        self._num_in_use = 0
        self._generations = np.zeros(self._total, dtype=np.uint32)
        self._retired = np.zeros(self._total, dtype=np.bool_)
        self._hidden = [0] * len(directories)               # retired slots that are free in their part
        self._turn = 0
        self._lock = threading.RLock()

    @property
    def capacity(self) -> int:
        """Slots in use, and slots that can be allocated."""
        with self._lock:
            return self._num_in_use + self.num_free

    @property
    def num_free(self) -> int:
        """Slots that can be allocated."""
        with self._lock:
            return sum(self._available(i) for i, directory in enumerate(self._directories) if directory.usable)

    def _available(self, which: int) -> int:
        return self._parts[which].num_free - self._hidden[which]

    def allocate(self, count: int) -> NDArray[np.int32] | None:
        """Allocate ``count`` slots.

        Returns
        -------
        (count,) int32 ndarray, or None if fewer are available (then no slot is allocated)
        """
        if count < 0:
            raise ValueError(f"allocate {count} slots")
        taken: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        pending = [float(directory.queued_bytes) for directory in self._directories]
        with self._lock:
            if count > self.num_free:
                return None
            left = count
            while left:
                which = self._soonest(pending)
                if which is None:                           # a directory was taken offline meanwhile
                    self.free(np.concatenate(taken))
                    return None
                taken.append(self._take(which, min(left, self._chunk)))
                pending[which] += len(taken[-1]) * self._directories[which].slot_bytes
                left -= len(taken[-1])
        return np.concatenate(taken)

    def _soonest(self, pending: list[float]) -> int | None:
        """Index of the directory that would finish its queue first. Equal directories take turns."""
        num = len(self._directories)
        order = [(self._turn + i) % num for i in range(num)]
        able = [i for i in order if self._directories[i].usable and self._available(i)]
        if not able:
            return None
        which = min(able, key=lambda i: pending[i] / self._directories[i].bandwidth)
        self._turn = which + 1
        return which

    def _take(self, which: int, want: int) -> NDArray[np.int32]:
        part = self._parts[which]
        slots = part.allocate(min(want, part.num_free))
        if slots is None:
            raise InvariantError(f"{part.num_free} slots are free, but cannot be allocated")
        slots = slots + np.int32(self._first[which])
        retired = self._retired[slots]                      # retired while free: they stay allocated in their part
        self._hidden[which] -= int(retired.sum())
        slots = slots[~retired]
        self._in_use[slots] = True
        self._num_in_use += len(slots)
        return slots

    def take_only(self, slots: NDArray[np.int32]) -> None:
        """Allocate exactly these slots, also of offline directories. Raises InvariantError if any slot is in use."""
        with self._lock:
            if self._num_in_use:
                raise InvariantError(f"{self._num_in_use} slots are in use already")
            everything = np.concatenate([self._take(i, part.num_free) for i, part in enumerate(self._parts)])
            self.free(np.setdiff1d(everything, slots))

    def free(self, slots: NDArray[np.int32]) -> None:
        """Free slots. Raises InvariantError, and changes nothing, if one of them is not in use."""
        with self._lock:
            if len(slots) and (slots.min() < 0 or slots.max() >= self._total):
                raise InvariantError(f"slots {slots.min()} to {slots.max()}: there are {self._total}")
            if not self._in_use[slots].all() or len(np.unique(slots)) != len(slots):
                raise InvariantError("a slot is not in use, and cannot be freed")
            self._in_use[slots] = False
            self._generations[slots] += np.uint32(1)
            self._num_in_use -= len(slots)
            slots = slots[~self._retired[slots]]
            owner = self.owner(slots)
            for which in np.unique(owner):
                self._parts[which].free((slots[owner == which] - self._first[which]).astype(np.int32))

    def generations(self, slots: NDArray[np.int32]) -> NDArray[np.uint32]:
        """(n,) uint32: number of times that each slot was freed, modulo 2**32."""
        return self._generations[slots]

    def changed(self, slots: NDArray[np.int32], generations: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
        """(n,) bool: slots that were freed since they had these generations; None if no slot was."""
        changed = self._generations[slots] != generations
        return changed if changed.any() else None

    def on_usable(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether the directory of each slot is online."""
        return np.array([directory.usable for directory in self._directories])[self.owner(slots)]

    def by_directory(self, slots: NDArray[np.int32], chosen: NDArray[np.bool_]) -> Parts:
        """For each directory, the indices of its ``chosen`` slots ((n,) bool), in the order of slots."""
        owner, order = self.owner(slots), np.argsort(slots, kind="stable")
        order = order[chosen[order]]
        for which, directory in enumerate(self._directories):
            if len(mine := order[owner[order] == which]):
                yield directory, mine

    def stats(self) -> dict[str, int]:
        """Current counts of the directories."""
        return {
            "directories": len(self._directories),
            "directories_usable": sum(directory.usable for directory in self._directories),
            "queued_bytes": sum(directory.queued_bytes for directory in self._directories),
            "num_slots": self._total,
        }

    def owner(self, slots: NDArray[np.int32]) -> NDArray[np.intp]:
        """(n,) intp: index of the directory of each slot."""
        return np.searchsorted(self._first, slots, side="right") - 1

    def retire(self, slots: NDArray[np.int32]) -> int:
        """Exclude these slots from allocation until they are restored; returns the number of slots newly retired."""
        with self._lock:
            new = np.unique(slots[~self._retired[slots]])
            self._retired[new] = True
            for which in self.owner(new[~self._in_use[new]]):
                self._hidden[which] += 1
            return len(new)

    def restore(self, slots: NDArray[np.int32]) -> None:
        """Make retired slots ((n,) int32) available for allocation again."""
        with self._lock:
            slots = np.unique(slots[self._retired[slots]])
            self._retired[slots] = False
            idle = slots[~self._in_use[slots]]
            for which, slot in zip(self.owner(idle).tolist(), idle.tolist(), strict=True):
                local = slot - int(self._first[which])
                if self._parts[which].is_free(local):
                    self._hidden[which] -= 1
                else:                                       # freed, or taken from its part, while it was retired
                    self._parts[which].free(np.array([local], dtype=np.int32))

    def is_retired(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether each slot is retired."""
        return self._retired[slots]

    def is_free(self, slot: int) -> bool:
        """Whether ``slot`` is not in use."""
        if not 0 <= slot < self._total:
            raise ValueError(f"slot {slot}: there are {self._total}")
        return not self._in_use[slot]

    def check_integrity(self) -> None:
        """Recount all slots; raise InvariantError if a count is wrong."""
        with self._lock:
            for part in self._parts:
                part.check_integrity()
            idle = self._total - int(self._in_use.sum()) - int((self._retired & ~self._in_use).sum())
            had = sum(self._available(i) for i in range(len(self._parts)))
            if int(self._in_use.sum()) != self._num_in_use or idle != had:
                raise InvariantError(f"{self._num_in_use} slots are counted in use, {had} free; {idle} are free")
