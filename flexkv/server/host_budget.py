"""One budget of host memory for the pools of a daemon, which it divides between them by use."""

import math
import mmap
import threading
import time
from collections.abc import Callable
from typing import Protocol

from flexkv.errors import CapacityError

EXTENT_BYTES = 64 << 20
"""Shares change in multiples of this, in bytes: a rank pins and unpins an extent in about 0.1 s."""

PART_BYTES = 16 << 20
"""Ranks pin memory in parts of this size, or of one slot (``REGISTER_BYTES`` of csrc/cuda_copy.c). An extent must
consist of whole parts, because a part can only be unpinned as a whole."""

_HALF_LIFE_S = 60.0
"""Time after which bytes that were moved count half, in seconds."""

_ADVANTAGE = 2.0
"""A pool gets memory of another one if it moves this many times as many bytes per byte of memory. Near 1, two pools
would exchange memory forever."""

_REST_S = 10.0
"""Time after which a pool that has grown, or that could not shrink, may be asked to yield, in seconds."""

_PATIENCE_S = 2.0
"""A shrink that takes longer does not keep another pool from being asked, in seconds: its ranks may be stopped."""

_EVICTS_S = 2.0
"""Time for which a pool counts as one that evicts, after it has evicted blocks, in seconds."""

_FREE_SHARE = 8
"""A pool grows, while there is unassigned memory, when less than 1/8 of its slots is free."""

_STEP_SHARE = 4
"""A pool grows, and yields, by up to 1/4 of its memory at a time."""

_FIRST_BYTES = 1 << 30
"""Maximum memory of a new pool at its start, in bytes: it is populated in less than a second."""


class Resizing(Protocol):
    """The part of ``PoolResizing`` that the budget uses."""

    slots: int

    @property
    def is_growing(self) -> bool: ...
    @property
    def is_shrinking(self) -> bool: ...
    @property
    def may_shrink(self) -> bool: ...
    @property
    def slots_with_memory(self) -> int: ...
    def grow(self, num_slots: int) -> None: ...
    def shrink(self, num_slots: int) -> None: ...
    def step(self) -> None: ...


class PoolUse(Protocol):
    """Counts of a pool, as the budget reads them. Called by ``HostBudget.balance``."""

    @property
    def resizing(self) -> Resizing: ...
    @property
    def has_engines(self) -> bool:
        """Whether an engine uses the pool."""

    @property
    def moved_blocks(self) -> int:
        """Blocks loaded and saved since the start."""

    def evicted_and_free(self) -> tuple[int, int]:
        """Blocks evicted since the start, and slots that are free now."""


class Share:
    """The share of one pool; a ``MemoryShare`` of its ``HostMemory``.

    Attributes
    ----------
    guaranteed_bytes : int
        The share never falls below this, in whole extents.
    pool : PoolUse
        Must be set before the first ``HostBudget.balance``.
    slots : int
        Slots that count against the budget: those that have memory, will have it, or are about to lose it.
    """

    pool: PoolUse

    def __init__(self, budget: "HostBudget", name: str, guaranteed_bytes: int) -> None:
        self._budget = budget
        self.name = name
        self.guaranteed_bytes = guaranteed_bytes
        self.slot_bytes = 0                          # 0: no rank has registered
        self.slots = self.max_slots = self.extent_slots = self.fixed_slots = 0
        self.yields_from = self.grows_from = -math.inf         # times from which it may be asked to yield, and may grow
        self.shrinks_since = math.inf
        self._moved_bytes = 0.0                      # decayed
        self._last = (0, 0, -math.inf)               # blocks moved, blocks evicted; time of the last eviction
        self.num_free = 0

    def begin(self, slot_bytes: int) -> tuple[int, int, int]:
        """See ``MemoryShare``."""
        return self._budget.begin(self, slot_bytes)

    def bytes_of(self, num_slots: int) -> int:
        """Bytes of the pages that ``num_slots`` slots need."""
        return -(-num_slots * self.slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def held_bytes(self) -> int:
        """Bytes that no other pool can have."""
        return max(self.bytes_of(self.slots), self.guaranteed_bytes)

    @property
    def density(self) -> float:
        """Bytes moved lately per byte of memory: the use of the share."""
        return self._moved_bytes / max(self.bytes_of(self.slots), self.bytes_of(self.extent_slots), 1)

    def observe(self, now: float, decay: float) -> None:
        """Read the counts of the pool, and continue its shrink."""
        resizing = self.pool.resizing
        was_shrinking = resizing.is_shrinking
        resizing.step()
        if was_shrinking and not resizing.is_shrinking:
            if resizing.slots == self.slots:         # its blocks are in use
                self.yields_from = now + _REST_S
            self.slots, self.shrinks_since = resizing.slots, math.inf
        if not resizing.is_shrinking and resizing.slots_with_memory < self.slots:      # memory has run out
            self.grows_from = now + _REST_S
            if (kept := self.whole(resizing.slots_with_memory)) >= self.fixed_slots:
                resizing.shrink(kept)
        moved, (evicted, self.num_free) = self.pool.moved_blocks, self.pool.evicted_and_free()
        self._moved_bytes = self._moved_bytes * decay + (moved - self._last[0]) * self.slot_bytes
        self._last = (moved, evicted, now if evicted > self._last[1] else self._last[2])

    def is_short(self, now: float) -> bool:
        """Whether the pool needs more slots, and can get them now."""
        if not self.pool.has_engines or self.slots >= self.max_slots or self.is_changing or now < self.grows_from:
            return False
        return self.num_free < max(self.extent_slots, self.slots // _FREE_SHARE)

    @property
    def is_spent(self) -> bool:
        """Whether the pool has yielded all its memory."""
        return self.slot_bytes > 0 and not self.slots and not self.guaranteed_bytes and not self.is_changing

    @property
    def is_changing(self) -> bool:
        """Whether the pool grows or shrinks now."""
        return self.pool.resizing.is_growing or self.pool.resizing.is_shrinking

    def evicts(self, now: float) -> bool:
        """Whether the pool has evicted blocks lately, or has no memory at all."""
        return not self.slots or now - self._last[2] < _EVICTS_S

    def whole(self, num_slots: int) -> int:
        """The largest number of slots that consists of whole extents, or is all; ``num_slots`` at most."""
        return self.max_slots if num_slots >= self.max_slots else num_slots // self.extent_slots * self.extent_slots

    def floor(self) -> int:
        """Slots that the pool keeps in any case."""
        least = self.extent_slots if self.pool.has_engines else 0
        return max(self.fixed_slots, min(least, self.max_slots))


class HostBudget:
    """Divides host memory between the pools of a daemon. Thread safe.

    ``balance`` grows a pool that runs out of free slots: from unassigned memory, else, if it evicts, from the pool
    that moves the fewest bytes per byte of its memory. A pool without engines yields first. No pool falls below its
    guarantee, which is never given to another one. Memory counts as held by a pool until it was given back, so the
    pools together never have more than the budget. The exception is a rank that leaves: memory that it has pinned is
    free a moment later, when it has unpinned it.

    Parameters
    ----------
    num_bytes : int
    num_blocks : int, optional
        Replaces ``num_bytes``: the memory of this number of blocks of the first pool.
    extent_bytes : int
        Only for tests without a GPU; a multiple of ``PART_BYTES`` otherwise.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self, num_bytes: int, num_blocks: int | None = None, extent_bytes: int = EXTENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_bytes = num_bytes
        self._num_blocks = num_blocks
        self._extent_bytes = extent_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._shares: list[Share] = []
        self._reserved: dict[str, int] = {}          # guarantees of models that have no pool
        self._looked = clock()

    def reserve(self, name: str, num_bytes: int) -> None:
        """Keep memory for the pool that ``open`` makes for ``name``."""
        self._reserved[name] = num_bytes

    def open(self, name: str) -> Share:
        """The share of a new pool, with the guarantee of ``name``, if it has one that no other pool has."""
        with self._lock:
            share = Share(self, name, self._reserved.pop(name, 0))
            self._shares.append(share)
            return share

    def close(self, share: Share) -> None:
        """End a share; the memory of its pool was given back."""
        with self._lock:
            self._shares.remove(share)
            if share.guaranteed_bytes:
                self._reserved[share.name] = share.guaranteed_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that the pools have or may claim."""
        return sum(share.held_bytes for share in self._shares) + sum(self._reserved.values())

    def _available(self, share: Share) -> int:
        """Bytes by which a share can grow without an effect on others."""
        return self._num_bytes - self.held_bytes + share.held_bytes - share.bytes_of(share.slots)

    def begin(self, share: Share, slot_bytes: int) -> tuple[int, int, int]:
        """See ``MemoryShare.begin``."""
        with self._lock:
            if self._num_blocks is not None:
                self._num_bytes, self._num_blocks = self._num_blocks * slot_bytes, None
            share.slot_bytes, share.slots, share.max_slots = slot_bytes, 0, self._num_bytes // slot_bytes
            if not share.max_slots:
                raise CapacityError(f"slots of {slot_bytes} bytes, {self._num_bytes} bytes in all: raise cpu_cache_gb")
            share.extent_slots = self._extent(slot_bytes)
            share.fixed_slots = self._within(share, share.whole(
                -(-share.guaranteed_bytes // share.bytes_of(share.extent_slots)) * share.extent_slots
            ))
            first = min(_FIRST_BYTES, max(self._available(share) // 2, share.bytes_of(share.extent_slots)))
            share.slots = max(share.fixed_slots, self._within(share, share.whole(first // slot_bytes)))
            share.yields_from = self._clock() + _REST_S
            share.pool.resizing.slots = share.slots
            return share.max_slots, share.slots, share.fixed_slots

    def _extent(self, slot_bytes: int) -> int:
        """Slots of an extent, in whole parts; fewer if the budget is small."""
        extent_bytes = self._extent_bytes
        if extent_bytes >= PART_BYTES:
            extent_bytes = max(PART_BYTES, min(extent_bytes, self._num_bytes // 16))
        part = max(1, PART_BYTES // slot_bytes) if extent_bytes >= PART_BYTES else 1
        return max(1, -(-extent_bytes // (part * slot_bytes))) * part

    def _within(self, share: Share, num_slots: int) -> int:
        """The largest number of slots, in whole extents, that the budget allows; ``num_slots`` at most."""
        most = share.bytes_of(share.slots) + self._available(share)
        while num_slots > 0 and share.bytes_of(num_slots) > most:
            num_slots = (num_slots - 1) // share.extent_slots * share.extent_slots
        return max(0, num_slots)

    def balance(self) -> None:
        """Continue the shrinks under way, and begin growth and shrinks that are due. Must be called often, by one
        thread."""
        with self._lock:
            now = self._clock()
            decay = 0.5 ** ((now - self._looked) / _HALF_LIFE_S)
            self._looked = now
            begun = [share for share in self._shares if share.slot_bytes]
            for share in begun:
                share.observe(now, decay)
            for share in sorted(begun, key=lambda share: (share.slots > 0, -share.density)):
                if share.is_short(now):
                    self._grow(share, begun, now)

    def _grow(self, share: Share, begun: list[Share], now: float) -> None:
        step = max(share.extent_slots, share.slots // _STEP_SHARE)
        slots = self._within(share, share.whole(share.slots + step))
        if slots > share.slots:
            share.slots = slots
            share.yields_from = now + _REST_S
            share.pool.resizing.grow(slots)
        elif share.evicts(now) and not any(0 <= now - other.shrinks_since < _PATIENCE_S for other in begun):
            wanted = share.bytes_of(share.extent_slots) - self._available(share)
            self._take(share, max(wanted, share.bytes_of(share.slots) // _STEP_SHARE), begun, now)

    def _take(self, share: Share, wanted: int, begun: list[Share], now: float) -> None:
        """Ask the pool with the least use to yield ``wanted`` bytes, or a part."""
        donors = [
            other for other in begun
            if other is not share and other.pool.resizing.may_shrink and other.floor() < other.slots
            and (not share.slots or now >= other.yields_from)
            and (not other.pool.has_engines or not share.slots or _ADVANTAGE * other.density < share.density)
        ]
        if not donors:
            return
        donor = min(donors, key=lambda other: (other.pool.has_engines, other.density))
        extents = -(-wanted // donor.bytes_of(donor.extent_slots))
        if donor.pool.has_engines:
            extents = min(extents, max(1, donor.slots // _STEP_SHARE // donor.extent_slots))
        kept = max(donor.floor(), (donor.slots - 1) // donor.extent_slots * donor.extent_slots
                   - (extents - 1) * donor.extent_slots)
        donor.shrinks_since = now
        donor.pool.resizing.shrink(kept)
