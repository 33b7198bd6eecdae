"""One tier: its slots, and what goes when they run out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._core.radix import RadixTree
from flexkv._core.slots import SlotAllocator
from flexkv.cache.eviction import EvictionPolicy
from flexkv.cache.planner import LoadPlanner
from flexkv.errors import InvariantError

HOST = 0
"""Tier number of CPU memory in the index."""

SSD = 1
"""Tier number of local SSD in the index."""


class Slots(Protocol):
    """The interface of ``SlotAllocator``."""

    @property
    def num_free(self) -> int:
        """Slots that can be had."""

    @property
    def capacity(self) -> int:
        """All slots."""

    def allocate(self, count: int) -> NDArray[np.int32] | None:
        """Take ``count`` slots; None if fewer are free."""

    def free(self, slots: NDArray[np.int32]) -> None:
        """Give slots back."""

    def is_free(self, slot: int) -> bool:
        """Whether ``slot`` is free."""

    def check_integrity(self) -> None:
        """Raise InvariantError if a count is wrong."""


class Tier:
    """Slots of one tier of the index. The caller locks.

    Parameters
    ----------
    number : int
        ``HOST`` or ``SSD``.
    slots : Slots
    policy : EvictionPolicy
    start_threshold : float
        Share of the slots in use, above which ``evict_ahead`` frees slots.
    ratio : float
        Share of the slots that one batch frees.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        number: int,
        slots: Slots,
        policy: EvictionPolicy,
        start_threshold: float,
        ratio: float,
        clock: Callable[[], float],
    ) -> None:
        self.number = number
        self.slots = slots
        self.evicted_blocks = 0
        self._policy = policy
        self._start_threshold = start_threshold
        self._ratio = ratio
        self._clock = clock

    def take(self, tree: RadixTree, count: int) -> NDArray[np.int32]:
        """Slots for ``count`` blocks, or for as many as can be had; evicts where too few are free. None are had
        where the tier goes out of service just now."""
        self.make_room(tree, count)
        slots = self.slots.allocate(min(count, self.slots.num_free))
        return np.zeros(0, dtype=np.int32) if slots is None else slots

    def make_room(self, tree: RadixTree, count: int) -> None:
        """Evict until ``count`` slots are free, or nothing more may go."""
        if count > self.slots.num_free:
            self.evict(tree, max(count - self.slots.num_free, self._batch()))

    def evict_ahead(self, tree: RadixTree) -> int:
        """Free a batch of slots if fewer than the watermark are free; returns how many."""
        used = self.slots.capacity - self.slots.num_free
        if used <= self._start_threshold * self.slots.capacity:
            return 0
        return self.evict(tree, self._batch())

    def _batch(self) -> int:
        return max(1, int(self._ratio * self.slots.capacity))

    def evict(self, tree: RadixTree, want: int) -> int:
        """Free up to ``want`` slots, by policy; returns how many."""
        freed, num_looked_at = 0, want           # each gives at least one slot, unless something holds it
        while freed < want:
            candidates = tree.evictable(self.number)
            score = self._policy.score(tree.nodes_view()[candidates], self._clock())
            is_part = len(candidates) > num_looked_at
            if is_part:
                lowest = np.argpartition(score, num_looked_at - 1)[:num_looked_at]
                candidates, score = candidates[lowest], score[lowest]
            slots = tree.evict(self.number, candidates[np.argsort(score, kind="stable")], want - freed)
            if len(slots) == 0:
                if not is_part:
                    break
                num_looked_at *= 4
            self.slots.free(slots)
            freed += len(slots)
        self.evicted_blocks += freed
        return freed

    def sweep(self, tree: RadixTree) -> None:
        """Free all slots of a tree that is out of use, but those that something still reads or writes."""
        while len(slots := tree.evict(self.number, tree.evictable(self.number), tree.num_blocks)):
            self.slots.free(slots)

    def check_integrity(self, held: NDArray[np.int32]) -> None:
        """Raise InvariantError unless every slot is free, or held by exactly one block (``held`` lists those)."""
        self.slots.check_integrity()
        if len(np.unique(held)) != len(held):
            raise InvariantError(f"tier {self.number}: two blocks hold one slot")
        if len(held) + self.slots.num_free != self.slots.capacity:
            raise InvariantError(
                f"tier {self.number}: {len(held)} slots indexed + {self.slots.num_free} free != "
                f"{self.slots.capacity} in all"
            )
        if any(self.slots.is_free(int(slot)) for slot in held):
            raise InvariantError(f"tier {self.number}: a block holds a slot that is free")


def no_slots() -> Slots:
    """Of a tier that is not there yet."""
    return SlotAllocator(0)


@dataclass(frozen=True, slots=True, eq=False)
class SsdTier:
    """What the index is told of the SSD tier when it comes into service.

    Attributes
    ----------
    slots : Slots
    planner : LoadPlanner
    usable : callable
        Whether blocks can be read and written now.
    usable_slots : callable
        Which of these slots ((n,) int32) can be; (n,) bool. Asked only while ``usable()``.
    """

    slots: Slots
    planner: LoadPlanner
    usable: Callable[[], bool]
    usable_slots: Callable[[NDArray[np.int32]], NDArray[np.bool_]]

    def in_service(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: slots ((n,) int32; -1: none) whose block can be read now."""
        there = slots >= 0
        if not there.any() or not self.usable():
            return np.zeros(len(slots), dtype=np.bool_)
        there[there] = self.usable_slots(slots[there])
        return there
