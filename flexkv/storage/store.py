"""The contract of a lower tier: a store of blocks outside of host memory."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.config import CacheConfig
from flexkv.storage.recovered import Recovered, nothing_recovered

Results = list[tuple[int, NDArray[np.intp], NDArray[np.bool_]]]
"""``(job, indices, ok)``: blocks of a job that have ended, and whether each was moved."""


class Slots(Protocol):
    """The slots of a tier: the interface of ``SlotAllocator``. The caller must serialize calls."""

    @property
    def num_free(self) -> int:
        """Number of slots that can be allocated."""

    @property
    def capacity(self) -> int:
        """Number of slots in use plus slots that can be allocated."""

    def allocate(self, count: int) -> NDArray[np.int32] | None:
        """Allocate ``count`` slots; returns them ((count,) int32), or None if fewer are free."""

    def free(self, slots: NDArray[np.int32]) -> None:
        """Free slots ((n,) int32), which must be in use."""

    def generations(self, slots: NDArray[np.int32]) -> NDArray[np.uint32]:
        """(n,) uint32: number of times that each slot was freed, modulo 2**32."""

    def changed(self, slots: NDArray[np.int32], generations: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
        """(n,) bool: slots that were freed since they had these generations; None if no slot was."""

    def is_free(self, slot: int) -> bool:
        """Whether ``slot`` is free."""

    def check_integrity(self) -> None:
        """Raise InvariantError if a count is wrong."""


class Store(ABC):
    """Holds blocks of ``slot_bytes`` bytes each, and moves them from and to host slots.

    Every move names both the slot and the key of each block. A store with fixed places (files on a disk) puts a block
    at the place of its slot, and uses the key to verify a read. A store of objects keeps a block under its key, and
    uses slots only to bound the number of blocks.

    Lifecycle:

    1. ``recover``, once.
    2. ``write``, ``read``, ``erase`` and ``cancel`` in any order; ``results`` reports their results.
    3. ``close``.

    A store must:

    - report every block of every job exactly once, also after ``cancel`` and after a failure;
    - touch neither the host slot nor its own slot of a block after it has reported the block;
    - report a read as good only if the host slot then holds the bytes that were written under that key;
    - never wait in a method, except in ``recover``, ``clear`` and ``close``, whose waits are bounded.

    A caller must:

    - allocate a slot before it is written, and not free it before that write has been reported;
    - call ``results`` when ``event_fd`` is readable, and at least once a second.

    Methods may be called from any thread, one at a time.

    Attributes
    ----------
    event_fd : int
        Readable when ``results`` has something to report.
    num_slots : int
    slot_bytes : int
    slots : Slots
        The caller must serialize their allocation and release.
    """

    event_fd: int
    num_slots: int
    slot_bytes: int
    slots: Slots

    def register(self, upto_bytes: int) -> None:  # noqa: B027
        """Announce that host memory exists up to ``upto_bytes``, for as long as the store is open. The store must not
        keep memory beyond that pinned."""

    def recover(self) -> Recovered:
        """Find the blocks that were written before the start, and allocate their slots."""
        return nothing_recovered()

    @abstractmethod
    def write(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        parents: NDArray[np.uint64], fence: int | None = None,
    ) -> None:
        """Write blocks from host memory.

        Parameters
        ----------
        job : int
            Identifies the blocks of this call in ``results`` and ``cancel``.
        slots, host_slots : (n,) int32
        keys, parents : (n, 2) uint64
            A parent of zeros: the first block of a sequence.
        fence : int, optional
            If given, ``host_slots`` are pages of a GPU, which may be accessed from this step of the engine on. Only
            after ``attach_device``.
        """

    @abstractmethod
    def read(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        fence: int | None = None,
    ) -> None:
        """Read blocks into host memory, and verify them. Parameters as in ``write``."""

    @abstractmethod
    def checksums(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """(n,) uint64: XXH3-64 of the bytes of the block in each slot, as they were written and reported; 0: there is
        none, or it is unknown. A read that is good has verified its bytes against it."""

    @abstractmethod
    def erase(self, job: int, slots: NDArray[np.int32]) -> None:
        """Empty slots ((n,) int32): ``recover`` must not find their blocks after a restart either."""

    @abstractmethod
    def cancel(self, job: int) -> None:
        """Fail the blocks of a job whose move has not begun."""

    @abstractmethod
    def results(self) -> Results:
        """Blocks that have ended since the last call."""

    @abstractmethod
    def clear(self) -> None:
        """Drop every block; ``recover`` must not find them after a restart either."""

    def usable(self) -> bool:
        """Whether blocks can be read and written now."""
        return True

    def usable_slots(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: slots ((n,) int32) that can be read and written now."""
        return np.full(len(slots), self.usable())

    def stats(self) -> dict[str, int]:
        """Counts since the start, by name."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Wait for moves under way, for a bounded time. Afterwards the store does not access host memory. May be
        called again."""

    # ---- direct moves between the store and a GPU; optional ---------------------------------------------------

    def attach_device(self, make_queue: Callable[[list[int]], Any]) -> None:
        """Move blocks between the files of this store and the pages of a GPU, once the queue is ready.

        ``make_queue(fds) -> GdsQueue`` gets the descriptors of the files. A store without files closes the queue.
        """
        make_queue([]).close()

    @property
    def device_is_ready(self) -> bool:
        """Whether ``read`` and ``write`` take a ``fence`` now."""
        return False

    def suspect(self, slots: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: whether the block of each slot must be dropped after its direct read failed, because the slot does
        not hold the key any more or had errors."""
        return np.ones(len(slots), dtype=np.bool_)


def differ(found: NDArray[np.uint64], expected: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(n,) bool: blocks with two different checksums ((n,) uint64 each). A checksum of 0 is unknown, and differs from
    none."""
    return np.asarray((found != expected) & (found != 0) & (expected != 0))


MakeStore = Callable[[CacheConfig, int, bytes, object], Store]
"""``make_store(config, slot_bytes, domain, memory)``; ``memory`` is a writable buffer of the host slots."""


@dataclass(frozen=True, slots=True)
class TierKind:
    """A kind of lower tier: its settings and its store. ``flexkv.config.tiers`` lists the kinds.

    Attributes
    ----------
    name : str
        Prefix of its statistics.
    label : str
        Name in the log.
    num_bytes : callable
        ``num_bytes(config)``: size of the tier; 0: it is not configured.
    make_store : MakeStore
    writes_all : callable
        ``writes_all(config)``: whether every block is written; else blocks with evidence of reuse (``WriteBack``).
    write_bytes_per_s : callable
        ``write_bytes_per_s(config)``: maximum rate of writes; 0: no limit.
    read_deadline_s : callable
        ``read_deadline_s(config)``: as in ``TierService``.
    closed_stats : callable
        ``closed_stats(config)``: counts of the store while it is not open.
    """

    name: str
    label: str
    num_bytes: Callable[[CacheConfig], int]
    make_store: MakeStore
    writes_all: Callable[[CacheConfig], bool]
    write_bytes_per_s: Callable[[CacheConfig], float]
    read_deadline_s: Callable[[CacheConfig], float] = lambda config: math.inf
    closed_stats: Callable[[CacheConfig], dict[str, int]] = lambda config: {}


class NullStore(Store):
    """A store without slots: every move fails."""

    def __init__(self, slot_bytes: int) -> None:
        self.num_slots = 0
        self.slot_bytes = slot_bytes
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.slots = SlotAllocator(0)
        self._results: Results = []

    def _refuse(self, job: int, count: int) -> None:
        self._results.append((job, np.arange(count), np.zeros(count, dtype=np.bool_)))
        os.eventfd_write(self.event_fd, 1)

    def write(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        parents: NDArray[np.uint64], fence: int | None = None,
    ) -> None:
        self._refuse(job, len(slots))

    def read(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        fence: int | None = None,
    ) -> None:
        self._refuse(job, len(slots))

    def checksums(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        return np.zeros(len(slots), dtype=np.uint64)

    def erase(self, job: int, slots: NDArray[np.int32]) -> None:
        self._refuse(job, len(slots))

    def cancel(self, job: int) -> None:
        """Do nothing: every move has ended."""

    def results(self) -> Results:
        results, self._results = self._results, []
        if results:
            os.eventfd_read(self.event_fd)
        return results

    def clear(self) -> None:
        """Do nothing: there are no blocks."""

    def usable(self) -> bool:
        return False

    def close(self) -> None:
        if self.event_fd >= 0:
            os.close(self.event_fd)
            self.event_fd = -1
