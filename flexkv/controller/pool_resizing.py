"""Growth and shrinking of a host pool that is in service, so that memory can go from one pool to another."""

import time
from collections.abc import Callable

from flexkv.controller.host_memory import HostMemory
from flexkv.controller.space import Space
from flexkv.transfer.pool_growth import PoolGrowth

_PATIENCE_S = 30.0
"""Time that the blocks in use may take to leave the slots that a pool loses, in seconds. Blocks that a user has pinned
may stay for good, and their slots are used again after this time."""


class PoolResizing:
    """Changes the number of slots of a pool. A slot whose memory is given back is in no plan, and no rank has it
    pinned.

    A shrink has these steps. ``step`` takes the next one when it may be taken, and waits for nothing:

    1. Slots beyond the new number are not used any more. Their blocks are evicted, those in use when they are released.
    2. The ranks unpin the memory, and confirm that. From here on the shrink cannot be undone, and waits for as long as
       a rank neither confirms nor ends.
    3. The memory is given back to the kernel.

    Must be called by one thread.

    Parameters
    ----------
    memory : HostMemory
        A pool that may shrink.
    space : Space
    growth : PoolGrowth
    clock : callable
        Monotonic time in seconds.

    Attributes
    ----------
    slots : int
        Slots that have memory, or will have it. A shrink lowers the number when the memory is given back.
    """

    def __init__(
        self, memory: HostMemory, space: Space, growth: PoolGrowth, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._memory, self._space, self._growth, self._clock = memory, space, growth, clock
        self._target: int | None = None
        self._deadline: float | None = None          # of step 1; None: in step 2
        self.slots = 0

    @property
    def is_growing(self) -> bool:
        """Whether slots that were asked for are not usable yet."""
        pool = self._memory.pool
        return pool is None or pool.is_populating or self._growth.usable < pool.populated_slots

    @property
    def may_shrink(self) -> bool:
        """Whether ``shrink`` may be called: no memory is being allocated, and no connected rank is about to pin some.
        Without a rank, slots may stay unusable for as long as no engine needs them."""
        pool = self._memory.pool
        return not self.is_shrinking and pool is not None and not pool.is_populating and (
            not self._growth.has_ranks or self._growth.usable >= pool.populated_slots
        )

    @property
    def slots_with_memory(self) -> int:
        """Slots that are populated, once no memory is being allocated: fewer than ``slots`` if memory has run out."""
        pool = self._memory.pool
        return self.slots if pool is None or pool.is_populating else pool.populated_slots

    @property
    def is_shrinking(self) -> bool:
        """Whether a shrink has begun and not ended."""
        return self._target is not None

    def grow(self, num_slots: int) -> None:
        """Populate memory up to ``num_slots`` slots. Neither ``is_growing`` nor ``is_shrinking`` may be True."""
        self._memory.grow(num_slots)
        self.slots = num_slots

    def shrink(self, num_slots: int) -> None:
        """Begin to give back the memory of slots from ``num_slots`` on. Only if ``may_shrink``, or if memory has run
        out."""
        self._target, self._deadline = num_slots, self._clock() + _PATIENCE_S
        self._growth.limit(num_slots)

    def step(self) -> None:
        """Continue a shrink."""
        if self._target is None:
            return
        if self._deadline is not None:
            if self._space.withdraw(self._target):
                self._deadline = None
                self._memory.lower(self._target, self._growth.lower)
            elif self._clock() > self._deadline:
                self._end()
            return
        if self._growth.is_lowered:
            self._memory.give_back(self._target)
            self.slots = self._target
            self._end()

    def _end(self) -> None:
        self._target = self._deadline = None
        self._growth.raise_limit()
