"""The host tier: CPU memory that several processes map, made of slots."""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable

from flexkv._core.sealed_memory import sealed_memfd
from flexkv.errors import CapacityError

logger = logging.getLogger("flexkv.storage")

_CHUNK_BYTES = 64 << 20
"""Memory taken at a time while the pool grows: small enough to stop soon, large enough to be quick."""


def _remedy(error: OSError | OverflowError, hugepage_bytes: int) -> str:
    """The setting or limit that helps against an error of the kernel."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if hugepage_bytes:
        return "set vm.nr_hugepages, or turn hugepages off"
    return "set cpu_cache_gb (or num_cpu_blocks, where that is set) lower"


class HostPool:
    """``num_slots`` slots of ``slot_bytes`` bytes in a memfd, so that other processes can map the same memory.

    The memory is taken by ``populate``, in the background; a slot is usable when ``populate`` has said so.

    Parameters
    ----------
    slot_bytes, num_slots : int
    hugepage_bytes : int
        0: ordinary pages; else the size of hugepages to use (2 MiB, 1 GiB).

    Raises
    ------
    CapacityError
        The kernel has no address space, or no hugepages of that size.
    """

    def __init__(self, slot_bytes: int, num_slots: int, hugepage_bytes: int = 0) -> None:
        if slot_bytes < 1 or num_slots < 1:
            raise CapacityError(f"a pool of {num_slots} slots of {slot_bytes} bytes: give the host tier more memory")
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        page = hugepage_bytes or mmap.PAGESIZE
        self.num_bytes = -(-slot_bytes * num_slots // page) * page
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.fd = -1
        try:
            self.fd = sealed_memfd("flexkv-host-pool", self.num_bytes, hugepage_bytes)
            self._memory = mmap.mmap(self.fd, self.num_bytes)
        except (OSError, OverflowError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise CapacityError(
                f"no host pool of {self.num_bytes} bytes ({num_slots} slots of {slot_bytes}): {error}; "
                f"{_remedy(error, hugepage_bytes)}"
            ) from error

    @property
    def memory(self) -> memoryview:
        """All slots, one after another, and not what a last hugepage has beyond them."""
        return memoryview(self._memory)[: self.num_slots * self.slot_bytes]

    def slot(self, index: int) -> memoryview:
        """The bytes of one slot, writable."""
        if not 0 <= index < self.num_slots:
            raise IndexError(f"slot {index} of {self.num_slots}")
        return memoryview(self._memory)[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def populate(self, on_extent: Callable[[int], None]) -> None:
        """Take the memory in the background.

        ``on_extent`` is called on that thread with the number of slots that are usable so far, more each time. When
        memory runs out the pool stays as large as it is, and the log says so.
        """
        self._thread = threading.Thread(target=self._populate, args=(on_extent,), name="flexkv-pool", daemon=True)
        self._thread.start()

    def _populate(self, on_extent: Callable[[int], None]) -> None:
        done = 0
        while done < self.num_bytes and not self._stop.is_set():
            size = min(_CHUNK_BYTES, self.num_bytes - done)
            try:
                os.posix_fallocate(self.fd, done, size)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                logger.error(
                    "the host pool stops at %d of %d bytes: %s; set cpu_cache_gb lower",
                    done, self.num_bytes, error.strerror,
                )
                return
            done += size
            if not self._stop.is_set():
                on_extent(min(done // self.slot_bytes, self.num_slots))

    def close(self) -> None:
        """Stop growing and give the memory back, as soon as no other process maps it. Can be called again."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            try:
                self._memory.close()
            except BufferError:  # a caller still holds a slot: the memory goes with that view
                logger.debug("the host pool is closed while a slot of it is in use")
