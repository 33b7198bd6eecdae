"""Batches: blocks of one job in one directory that are being moved."""

import os
import select
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.ssd.directory import SsdDirectory
from flexkv.storage.ssd.slot_table import RECORD

READ, WRITE = 0, 1
"""Kinds of a batch, numbered as in ``IoQueue``."""

ERASE = 2
"""Kind of a batch that only empties records. It is not given to a queue."""

Result = tuple[int, NDArray[np.intp], NDArray[np.bool_]]
"""Job, indices of its blocks, and whether each of them succeeded."""


@dataclass(eq=False, slots=True)
class Batch:
    """Blocks that are submitted to a queue together. A block has a position in the batch, and an index in its job.

    Attributes
    ----------
    first_tag : int
        Tag of the block at position 0 in the queue. The tags of later blocks follow.
    kind : int
    job : int
    directory : SsdDirectory
    indices : (n,) intp
        Indices of the blocks in the caller's job.
    slots, host_slots : (n,) int32
    keys, parents : (n, 2) uint64
    fence : int or None
        If given, ``host_slots`` are pages of a GPU, which may be accessed from this step of its rank on.
    stopped : bool
        No further block is started. Pages of a GPU may hold other KV by now, so blocks that are still written from
        them are not recorded.
    sequence : int
        Sequence number of the first block's record.
    submitted : bool
        The batch was given to the queue.
    moved : (n,) bool
        The data is written, but not the record.
    late : (n,) bool
        The access exceeded its deadline, and the kernel may still access the host slot; so a read has no result yet.
    ended : (n,) bool
        The result has been reported.
    """

    first_tag: int
    kind: int
    job: int
    directory: SsdDirectory
    indices: NDArray[np.intp]
    slots: NDArray[np.int32]
    host_slots: NDArray[np.int32]
    keys: NDArray[np.uint64]
    fence: int | None = None
    parents: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))
    sequence: int = 0
    submitted: bool = False
    stopped: bool = False
    moved: NDArray[np.bool_] = field(init=False)
    late: NDArray[np.bool_] = field(init=False)
    ended: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.moved = np.zeros(len(self.indices), dtype=np.bool_)
        self.late = np.zeros(len(self.indices), dtype=np.bool_)
        self.ended = np.zeros(len(self.indices), dtype=np.bool_)

    def tags(self) -> NDArray[np.uint64]:
        """(n,) uint64: tag of each block in the queue."""
        return np.uint64(self.first_tag) + np.arange(len(self.indices), dtype=np.uint64)

    def records(
        self, positions: NDArray[np.intp], checksums: NDArray[np.uint64], domain: int
    ) -> NDArray[np.void]:
        """(m,) RECORD: records of the blocks at these positions, for the slot table."""
        records = np.zeros(len(positions), dtype=RECORD)
        records["key"], records["parent"] = self.keys[positions], self.parents[positions]
        records["checksum"], records["domain"], records["length"] = checksums, domain, self.directory.slot_bytes
        records["sequence"] = self.sequence + positions
        return records

    def left(self) -> NDArray[np.intp]:
        """Positions of the blocks without a result."""
        return np.flatnonzero(~self.ended)


def check_blocks(
    slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: Sequence[NDArray[np.uint64]], num_slots: int,
    num_host_slots: int,
) -> None:
    """Raise ValueError if lengths or shapes differ, or a slot does not exist."""
    for each in keys:
        if not len(slots) == len(host_slots) == len(each) or each.shape[1:] != (2,):
            raise ValueError(f"{len(slots)} slots, {len(host_slots)} host slots, keys of shape {each.shape}")
    for name, numbers, limit in (("slot", slots, num_slots), ("host slot", host_slots, num_host_slots)):
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= limit):
            raise ValueError(f"{name}s {numbers.min()} to {numbers.max()}: there are {limit}")


class Batches:
    """Batches under way, and results that have not been taken. The caller must hold the store's lock.

    Parameters
    ----------
    queue_fd : int
        Readable when the queue has results.

    Attributes
    ----------
    event_fd : int
        Readable when there are results here or in the queue.
    num_ok : dict
        Number of blocks that succeeded, by kind.
    """

    def __init__(self, queue_fd: int) -> None:
        self._epoll = select.epoll()
        self.event_fd = self._epoll.fileno()
        self._told_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            for fd in (self._told_fd, queue_fd):
                self.watch(fd)
        except BaseException:
            self.close()
            raise
        self.num_ok = {READ: 0, WRITE: 0, ERASE: 0}
        self._batches: dict[int, Batch] = {}                # by first tag, in ascending order
        self._jobs: dict[int, set[Batch]] = {}
        self._next_tag = 0                                  # one tag a block; 2**64 tags do not run out
        self._results: list[Result] = []

    def watch(self, queue_fd: int) -> None:
        """Make ``event_fd`` readable whenever ``queue_fd`` is, until that is closed."""
        self._epoll.register(queue_fd, select.EPOLLIN)

    def __iter__(self) -> Iterator[Batch]:
        return iter(list(self._batches.values()))

    def __len__(self) -> int:
        return len(self._batches)

    def of_tags(self, tags: NDArray[np.uint64]) -> Iterator[tuple[Batch, NDArray[np.intp], NDArray[np.intp]]]:
        """Batches under way that contain some of ``tags``: for each, the indices of its tags in ``tags``, and the
        positions of these blocks in the batch."""
        batches = list(self._batches.values())
        which = np.searchsorted(np.fromiter(self._batches, np.uint64, len(batches)), tags, side="right") - 1
        for i in np.unique(which[which >= 0]):
            positions = (tags - np.uint64(batches[i].first_tag)).astype(np.intp)
            at = np.flatnonzero((which == i) & (positions < len(batches[i].indices)))    # other tags: an ended batch
            if len(at):
                yield batches[i], at, positions[at]

    def late(self) -> list[Batch]:
        """Batches with late blocks."""
        return [batch for batch in self._batches.values() if batch.late.any()]

    def any_late(self, directory: SsdDirectory) -> bool:
        """Whether a directory has a batch with late blocks."""
        return any(batch.directory is directory for batch in self.late())

    def of_job(self, job: int) -> list[Batch]:
        """Batches of a job that are under way."""
        return list(self._jobs.get(job, ()))

    def begin(
        self, kind: int, job: int, directory: SsdDirectory, where: NDArray[np.intp], slots: NDArray[np.int32],
        host_slots: NDArray[np.int32], keys: NDArray[np.uint64], fence: int | None,
    ) -> Batch:
        """Make a batch of the blocks ``where`` of a job."""
        batch = Batch(
            self._next_tag, kind, job, directory, where, slots[where], host_slots[where], keys[where], fence
        )
        self._next_tag += len(where)
        self._batches[batch.first_tag] = batch
        self._jobs.setdefault(job, set()).add(batch)
        if kind != ERASE:
            directory.begin(len(where) * directory.slot_bytes)
        return batch

    def begin_erasing(
        self, job: int, directory: SsdDirectory, where: NDArray[np.intp], slots: NDArray[np.int32]
    ) -> Batch:
        """Make a batch that empties the records of the slots ``where`` of a job."""
        return self.begin(ERASE, job, directory, where, slots, slots, np.zeros((len(slots), 2), np.uint64), None)

    def end(self, batch: Batch, positions: NDArray[np.intp], ok: NDArray[np.bool_]) -> None:
        """Report the results of the blocks at these positions of a batch."""
        if len(positions) == 0:
            return
        batch.ended[positions], batch.late[positions] = True, False
        num_ok = int(ok.sum())
        self.num_ok[batch.kind] += num_ok
        slot_bytes = batch.directory.slot_bytes
        if batch.kind != ERASE:
            batch.directory.end(len(positions) * slot_bytes, num_ok * slot_bytes)
        self.report(batch.job, batch.indices[positions], ok)
        if batch.ended.all():
            del self._batches[batch.first_tag]
            self._jobs[batch.job].discard(batch)
            if not self._jobs[batch.job]:
                del self._jobs[batch.job]

    def report(self, job: int, indices: NDArray[np.intp], ok: NDArray[np.bool_]) -> None:
        """Add results for the next ``take_results``."""
        if len(indices):
            self._results.append((job, indices, ok))
            self.wake()

    def wake(self) -> None:
        """Make ``event_fd`` readable."""
        if self._told_fd >= 0:
            os.eventfd_write(self._told_fd, 1)

    def take_results(self) -> list[Result]:
        """Return the results since the last call."""
        self.drain_event()
        results, self._results = self._results, []
        return results

    def drain_event(self) -> None:
        """Reset ``event_fd``: results added before do not make it readable any more."""
        if self._told_fd >= 0:
            with suppress(BlockingIOError):
                os.eventfd_read(self._told_fd)

    def wait(self, seconds: float) -> None:
        """Wait until ``event_fd`` is readable, or for ``seconds``. Must be called without the lock."""
        self._epoll.poll(seconds)

    def close(self) -> None:
        """Close ``event_fd``. Must be called once."""
        self._epoll.close()
        os.close(self._told_fd)
        self._told_fd = -1
