"""The host tier: CPU memory that several processes map, made of slots."""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from flexkv._core.mapping import SharedMapping
from flexkv._core.sealed_memory import sealed_memfd
from flexkv.errors import CapacityError

logger = logging.getLogger("flexkv.storage")

OnExtent = Callable[[int, bool], None]
"""``on_extent(num_slots, last)``: ``num_slots`` slots are populated; ``last``: there will be no more."""

_PART_BYTES = 64 << 20
"""Memory populated at a time, in bytes. ``close`` waits for one part (10 to 30 ms), so parts are small."""

_CLOSE_S = 10.0
"""Longest wait of ``close`` for the part that is being populated. Only a kernel that hangs takes this long."""

_HUGE_PAGE_BYTES = 2 << 20
"""Size of the pages that ``MADV_COLLAPSE`` makes (x86-64, and arm64 with 4 KiB pages)."""

_NICENESS = 5
"""Niceness of the thread that populates. It takes a quarter of a core that the engine's threads compete for."""


def _remedy(error: OSError | OverflowError, hugepage_bytes: int) -> str:
    """The setting or limit that helps against an error of the kernel."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if hugepage_bytes:
        return "set vm.nr_hugepages, or turn hugepages off"
    return "set cpu_cache_gb (or num_cpu_blocks, where that is set) lower"


class HostPool:
    """``num_slots`` slots of ``slot_bytes`` bytes in a memfd, so that other processes can map the same memory.

    ``populate`` allocates the memory in the background, in huge pages where possible; a slot is usable when
    ``populate`` has reported it.

    Parameters
    ----------
    slot_bytes, num_slots : int
    hugepage_bytes : int
        0: ordinary pages; else the size of hugepages to use (2 MiB, 1 GiB).
    content : bytes
        Describes the meaning of a slot's bytes (``SlotLayout.content``); the pool keeps it for its users.

    Raises
    ------
    CapacityError
        The kernel has no address space, or no hugepages of that size.
    """

    def __init__(self, slot_bytes: int, num_slots: int, hugepage_bytes: int = 0, content: bytes = b"") -> None:
        if slot_bytes < 1 or num_slots < 1:
            raise CapacityError(f"a pool of {num_slots} slots of {slot_bytes} bytes: give the host tier more memory")
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.content = content
        self.fixed_slots = num_slots
        """Slots whose memory is never given back: only these may be pinned by this process."""
        self._page_bytes = hugepage_bytes or mmap.PAGESIZE
        self.num_bytes = self.bytes_of(num_slots)
        self.huge_bytes = 0
        """Bytes that were collapsed into huge pages."""
        self.numa_nodes: Sequence[int] = ()
        """NUMA nodes that hold the pool's parts in turn; none: the kernel chooses. Must be set before ``populate``."""
        self._collapsing = not hugepage_bytes
        self._refusals: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._done = 0                      # bytes that are populated
        self._asked = 0                     # slots that are to be
        self.fd = -1
        try:
            self.fd = sealed_memfd("flexkv-host-pool", self.num_bytes, hugepage_bytes)
            self._memory = SharedMapping(self.fd, self.num_bytes)
        except (OSError, OverflowError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise CapacityError(
                f"no host pool of {self.num_bytes} bytes ({num_slots} slots of {slot_bytes}): {error}; "
                f"{_remedy(error, hugepage_bytes)}"
            ) from error

    @property
    def memory(self) -> memoryview:
        """All slots, one after another, without the unused end of the last hugepage."""
        return memoryview(self._memory)[: self.num_slots * self.slot_bytes]

    def slot(self, index: int) -> memoryview:
        """The bytes of one slot, writable."""
        if not 0 <= index < self.num_slots:
            raise IndexError(f"slot {index} of {self.num_slots}")
        return memoryview(self._memory)[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def populate(self, on_extent: OnExtent, num_slots: int | None = None) -> None:
        """Allocate the memory of the first ``num_slots`` slots (default: of all) on a background thread, part by part.

        ``on_extent`` is called on that thread, with more slots each time, and once with ``last`` if all slots of the
        pool are populated, unless ``close`` is called before. If memory runs out, the pool stays at the size allocated
        so far, and an error is logged; without ``num_slots``, these slots are the last. Must not be called again before
        this has ended (``is_populating``).
        """
        self._asked = self.num_slots if num_slots is None else num_slots
        until = self.bytes_of(self._asked)
        self._thread = threading.Thread(
            target=self._populate, args=(on_extent, until, num_slots is None), name="flexkv-pool", daemon=True
        )
        self._thread.start()

    @property
    def is_populating(self) -> bool:
        """Whether memory is being allocated."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def populated_slots(self) -> int:
        """Number of slots that are populated; it changes while ``is_populating``."""
        return min(self._done // self.slot_bytes, self._asked)

    def bytes_of(self, num_slots: int) -> int:
        """Bytes of the pages that the first ``num_slots`` slots need."""
        return -(-num_slots * self.slot_bytes // self._page_bytes) * self._page_bytes

    def give_back(self, num_slots: int) -> None:
        """Free the memory of all slots from ``num_slots`` on, until ``populate`` allocates it again. Nothing may access
        it, or have it pinned; and ``is_populating`` must be False."""
        keep = self.bytes_of(num_slots)
        if keep < self._done and self.fd >= 0:
            self._memory.free(keep, self._done - keep)
            self._done, self._asked = keep, num_slots

    def _populate(self, on_extent: OnExtent, until: int, is_final: bool) -> None:
        with suppress(OSError):             # optional: it only spares the engine's threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        out_of_memory = False
        while self._done < until and not out_of_memory and not self._stop.is_set():
            size = min(_PART_BYTES, until - self._done)
            self._place(self._done, size)
            self._collapse(self._done, size)
            try:
                self._allocate(self._done, size)    # all pages, or the pages that ``_collapse`` left out
                self._done += size
            except OSError as error:
                out_of_memory = True
                logger.error(
                    "the host pool stops at %d of %d bytes: %s; set cpu_cache_gb lower",
                    self._done, self.num_bytes, error.strerror,
                )
            if not self._stop.is_set():
                on_extent(self.populated_slots, (out_of_memory and is_final) or self._done == self.num_bytes)
        logger.info(
            "the host pool has %d slots, %d of %d MiB in huge pages",
            self.populated_slots, self.huge_bytes >> 20, self._done >> 20,
        )

    def _place(self, start: int, size: int) -> None:
        """Choose the NUMA node of a part that is still empty."""
        if not self.numa_nodes:
            return
        node = self.numa_nodes[start // _PART_BYTES % len(self.numa_nodes)]
        if refusal := self._memory.place(start, size, node):
            logger.warning(
                "the host pool cannot be placed on NUMA node %d (%s), so the kernel chooses the nodes; see "
                "numa_nodes and /sys/devices/system/node/has_memory", node, os.strerror(refusal),
            )
            self.numa_nodes = ()

    def _allocate(self, start: int, size: int) -> None:
        while True:
            try:
                return os.posix_fallocate(self.fd, start, size)
            except OSError as error:
                if error.errno != errno.EINTR or self._stop.is_set():
                    raise

    def _collapse(self, start: int, size: int) -> None:
        """Make huge pages of a part that is still empty.

        One small page of each is allocated first, because the kernel refuses to collapse an empty range. Collapsing
        fills the rest with zeros, which is faster than zeroing 512 small pages and copying them.
        """
        first = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        whole = (start + size - first) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if not self._collapsing or whole <= 0:
            return
        try:
            for page in range(first, first + whole, _HUGE_PAGE_BYTES):
                self._allocate(page, mmap.PAGESIZE)
        except OSError:                     # out of memory: the caller meets the same error, and reports it
            return
        refusal = self._memory.collapse(first, whole)
        if not refusal:
            self.huge_bytes += whole
            return
        self._collapsing = refusal not in (errno.EINVAL, errno.EPERM)       # these two: this kernel never collapses
        if refusal not in self._refusals:
            self._refusals.add(refusal)
            logger.info(
                "%s of the host pool consists of small pages, which take longer to pin: the kernel makes no huge pages "
                "(%s)", "a part" if self._collapsing else "the rest", os.strerror(refusal),
            )

    def close(self) -> None:
        """Stop populating, and free the memory as soon as no other process maps it. May be called again."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():     # the thread uses descriptor and mapping: neither may be closed
                logger.error("the host pool stays until this process ends: the kernel has not populated a part of it "
                             "within %g s", _CLOSE_S)
                return
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            try:
                self._memory.close()
            except BufferError:  # a caller still holds a slot: the memory is freed with that view
                logger.debug("the host pool is closed while a slot of it is in use")
