"""The host pool of a controller or a storage host: made for the first layout, and checked against the others."""

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from flexkv.errors import CapacityError, OtherLayoutError
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout

logger = logging.getLogger("flexkv.controller")

_HUGEPAGE_BYTES = 2 << 20
"""Size of the hugepages that are tried when there are none of a larger size."""

OnExtent = Callable[[int, bool], None]
"""``on_extent(num_slots, last)``: more slots are populated; ``last``: these are all. As in ``HostPool.populate``."""


class MemoryShare(Protocol):
    """The share of a pool in memory that several pools divide."""

    def begin(self, slot_bytes: int) -> tuple[int, int, int]:
        """Begin to use the share for slots of this size. Returns the number of slots that it can ever have, that it has
        now, and that it always keeps. Raises CapacityError. Any thread may call it."""


class HostMemory:
    """Makes the host pool, and keeps it.

    Parameters
    ----------
    host_bytes : int
    num_slots : int, optional
        Default: as many as fit ``host_bytes``.
    hugepage_bytes : int
        0: ordinary pages. If there are no hugepages of this size, smaller pages are used, with a warning.
    replaces : bool
        A layout that differs from the pool's gets a new pool, and the old one is freed. False: it is refused, because
        engines share the pool.
    share : MemoryShare, optional
        The pool grows and shrinks; ``host_bytes``, ``num_slots`` and ``hugepage_bytes`` have no effect.
    numa_nodes : sequence of int
        As ``HostPool.numa_nodes``.

    Attributes
    ----------
    pool : HostPool or None
    incarnation : str
        Identity of the pool's content: a new pool has another one.
    frees_at_close : bool
        ``close`` frees the memory also if another process still maps it. Set when none accesses it any more.
    """

    def __init__(
        self, host_bytes: int, num_slots: int | None = None, hugepage_bytes: int = 0, *, replaces: bool = False,
        share: MemoryShare | None = None, numa_nodes: Sequence[int] = (),
    ) -> None:
        self._host_bytes, self._num_slots, self._hugepage_bytes = host_bytes, num_slots, hugepage_bytes
        self._replaces, self._share, self._numa_nodes = replaces, share, numa_nodes
        self._first_slots: int | None = None         # that are populated at the start; None: all
        self.frees_at_close = False
        self._lock = threading.Lock()
        self._extent = (0, False)
        self._on_extent: OnExtent = lambda num_slots, last: None
        self.pool: HostPool | None = None
        self.incarnation = ""

    def pool_for(self, layout: SlotLayout, on_extent: OnExtent) -> HostPool:
        """The pool for a layout, which stays this object's. ``on_extent`` replaces the callable of an earlier call; it
        is called on this thread with the slots that are populated, and on another one with more.

        Raises
        ------
        OtherLayoutError
            The pool was made for another layout, and ``replaces`` is False.
        CapacityError
            There is no address space, or not one slot fits ``host_bytes``.
        """
        if self.pool is not None and (layout.slot_bytes, layout.content) != (self.pool.slot_bytes, self.pool.content):
            if not self._replaces:
                raise OtherLayoutError("the layout of a block differs from that of the engines whose cache it shares")
            self.close()
            self.pool = None
        if self.pool is None:
            self._make(layout)
        assert self.pool is not None  # narrowing: it was made
        with self._lock:                             # also while it is called: extents must come in order
            self._on_extent = on_extent
            if self._extent != (0, False):
                on_extent(*self._extent)
        return self.pool

    def _make(self, layout: SlotLayout) -> None:
        pool = self._allocate(layout)
        pool.numa_nodes = self._numa_nodes
        self._extent = (0, False)
        try:
            pool.populate(self._populated, self._first_slots)
        except BaseException:
            pool.close()
            raise
        self.pool = pool
        self.renew()

    def _allocate(self, layout: SlotLayout) -> HostPool:
        """A pool in hugepages of the size that is set, else in smaller ones, else in ordinary pages."""
        if self._share is not None:
            num_slots, self._first_slots, fixed_slots = self._share.begin(layout.slot_bytes)
            pool = HostPool(layout.slot_bytes, num_slots, 0, layout.content)
            pool.fixed_slots = fixed_slots
            return pool
        num_slots = self._num_slots if self._num_slots is not None else self._host_bytes // layout.slot_bytes
        smaller = [size for size in (_HUGEPAGE_BYTES,) if size < self._hugepage_bytes]
        for size in [self._hugepage_bytes, *smaller] if self._hugepage_bytes else ():
            try:
                return HostPool(layout.slot_bytes, num_slots, size, layout.content)
            except CapacityError as error:
                logger.warning("no hugepages of %d KiB, so the host pool gets smaller pages: %s", size >> 10, error)
        return HostPool(layout.slot_bytes, num_slots, 0, layout.content)

    def _populated(self, num_slots: int, last: bool) -> None:
        with self._lock:
            self._extent = (num_slots, last)
            self._on_extent(num_slots, last)

    def grow(self, num_slots: int) -> None:
        """Populate memory up to ``num_slots`` slots."""
        if self.pool is not None:
            self.pool.populate(self._populated, num_slots)

    def lower(self, num_slots: int, lower: Callable[[int], None]) -> None:
        """Record that slots from ``num_slots`` on are not populated for the callables of ``pool_for``, and call
        ``lower(num_slots)`` before any of them is called."""
        with self._lock:
            self._extent = (num_slots, False)
            lower(num_slots)

    def give_back(self, num_slots: int) -> None:
        """Free the memory of slots from ``num_slots`` on; as ``HostPool.give_back``."""
        if self.pool is not None:
            self.pool.give_back(num_slots)

    def renew(self) -> None:
        """Record that the content of the pool is lost, or of no use."""
        self.incarnation = secrets.token_hex(8)

    def leave(self) -> None:
        """Call the callable of ``pool_for`` no more."""
        with self._lock:
            self._on_extent = lambda num_slots, last: None

    def close(self) -> None:
        """Free the pool, which is not accessed any more. Can be called again."""
        if self.pool is not None:
            if self.frees_at_close and not self.pool.is_populating:
                self.pool.give_back(0)
            self.pool.close()
