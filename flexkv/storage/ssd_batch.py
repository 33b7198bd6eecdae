"""Blocks of one job in one directory, on their way."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.slot_table import RECORD
from flexkv.storage.ssd_directory import SsdDirectory

READ, WRITE = 0, 1
"""As the queue names them."""

Result = tuple[int, NDArray[np.intp], NDArray[np.bool_]]
"""Job, indices of its blocks, and whether each of them succeeded."""

_POSITION_BITS = 32
"""Of a tag; the rest is the batch's number."""


@dataclass(eq=False, slots=True)
class Batch:
    """What the queue is given at a time. A block is known by its position here, and to the caller by its index.

    Attributes
    ----------
    number : int
    kind : int
    job : int
    directory : SsdDirectory
    indices : (n,) intp
        Of the caller's job.
    slots, host_slots : (n,) int32
    keys, parents : (n, 2) uint64
    sequence : int
        Of the first block's record.
    submitted : bool
        The queue has it.
    moved : (n,) bool
        The data is written, the record is not yet.
    late : (n,) bool
        A read has failed because it took too long, and the kernel may still write to its host slot.
    ended : (n,) bool
        The caller has been told.
    """

    number: int
    kind: int
    job: int
    directory: SsdDirectory
    indices: NDArray[np.intp]
    slots: NDArray[np.int32]
    host_slots: NDArray[np.int32]
    keys: NDArray[np.uint64]
    parents: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))
    sequence: int = 0
    submitted: bool = False
    moved: NDArray[np.bool_] = field(init=False)
    late: NDArray[np.bool_] = field(init=False)
    ended: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.moved = np.zeros(len(self.indices), dtype=np.bool_)
        self.late = np.zeros(len(self.indices), dtype=np.bool_)
        self.ended = np.zeros(len(self.indices), dtype=np.bool_)

    def tags(self) -> NDArray[np.uint64]:
        """(n,) what the queue knows each block by."""
        return np.arange(len(self.indices), dtype=np.uint64) | np.uint64(self.number << _POSITION_BITS)

    def records(
        self, positions: NDArray[np.intp], checksums: NDArray[np.uint64], domain: int
    ) -> NDArray[np.void]:
        """What the slot table is to say of these positions."""
        records = np.zeros(len(positions), dtype=RECORD)
        records["key"], records["parent"] = self.keys[positions], self.parents[positions]
        records["checksum"], records["domain"], records["length"] = checksums, domain, self.directory.slot_bytes
        records["sequence"] = self.sequence + positions
        return records

    def left(self) -> NDArray[np.intp]:
        """Positions that have no result yet."""
        return np.flatnonzero(~self.ended)

    @staticmethod
    def positions(tags: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Positions in their batch."""
        return (tags & np.uint64((1 << _POSITION_BITS) - 1)).astype(np.intp)

    @staticmethod
    def group(tags: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Batch number, and where in ``tags`` its tags are."""
        numbers = tags >> np.uint64(_POSITION_BITS)
        for number in dict.fromkeys(numbers.tolist()):
            yield number, np.flatnonzero(numbers == number)


class Batches:
    """Batches that are under way, and results that nobody has taken yet. The caller locks.

    Attributes
    ----------
    event_fd : int
        Readable when there may be results.
    num_ok : dict
        Blocks that succeeded, by kind.
    """

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.num_ok = {READ: 0, WRITE: 0}
        self._batches: dict[int, Batch] = {}
        self._jobs: dict[int, set[Batch]] = {}
        self._last_number = 0
        self._results: list[Result] = []

    def __iter__(self) -> Iterator[Batch]:
        return iter(list(self._batches.values()))

    def __len__(self) -> int:
        return len(self._batches)

    def get(self, number: int) -> Batch | None:
        """A batch that is under way."""
        return self._batches.get(number)

    def late(self) -> list[Batch]:
        """Those with blocks that are late."""
        return [batch for batch in self._batches.values() if batch.late.any()]

    def of_job(self, job: int) -> list[Batch]:
        """What of a job is under way."""
        return list(self._jobs.get(job, ()))

    def begin(
        self, kind: int, job: int, directory: SsdDirectory, where: NDArray[np.intp], slots: NDArray[np.int32],
        host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
    ) -> Batch:
        """Blocks ``where`` of a job are under way now."""
        self._last_number += 1
        batch = Batch(self._last_number, kind, job, directory, where, slots[where], host_slots[where], keys[where])
        self._batches[batch.number] = batch
        self._jobs.setdefault(job, set()).add(batch)
        directory.begin(len(where) * directory.slot_bytes)
        return batch

    def end(self, batch: Batch, positions: NDArray[np.intp], ok: NDArray[np.bool_]) -> None:
        """These positions of a batch have their result."""
        if len(positions) == 0:
            return
        batch.ended[positions], batch.late[positions] = True, False
        num_ok = int(ok.sum())
        self.num_ok[batch.kind] += num_ok
        slot_bytes = batch.directory.slot_bytes
        batch.directory.end(len(positions) * slot_bytes, num_ok * slot_bytes)
        self.tell(batch.job, batch.indices[positions], ok)
        if batch.ended.all():
            del self._batches[batch.number]
            self._jobs[batch.job].discard(batch)
            if not self._jobs[batch.job]:
                del self._jobs[batch.job]

    def tell(self, job: int, indices: NDArray[np.intp], ok: NDArray[np.bool_]) -> None:
        """A result for whoever asks next."""
        if len(indices):
            self._results.append((job, indices, ok))
            if self.event_fd >= 0:
                os.eventfd_write(self.event_fd, 1)

    def take_results(self) -> list[Result]:
        """Results that have not been taken."""
        self.quiet()
        results, self._results = self._results, []
        return results

    def quiet(self) -> None:
        """Make ``event_fd`` unreadable until there is more."""
        if self.event_fd >= 0:
            with suppress(BlockingIOError):
                os.eventfd_read(self.event_fd)

    def close(self) -> None:
        """Close ``event_fd``; once."""
        os.close(self.event_fd)
        self.event_fd = -1
