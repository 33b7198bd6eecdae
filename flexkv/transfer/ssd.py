"""SSD executor: gives ops between host slots and SSD slots to the store, and takes in what it reports."""

import itertools
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.tier import Slots
from flexkv.config import CacheConfig
from flexkv.protocol.ring import OpKind
from flexkv.storage.ssd.gds_queue import GdsQueue
from flexkv.storage.ssd.recovery import Recovered
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.graph import OpStatus, TransferOp

logger = logging.getLogger("flexkv.transfer")


class Store(Protocol):
    """The interface of ``SsdStore``. No method waits, but ``recover``, ``clear`` and ``close``."""

    event_fd: int
    num_slots: int
    slot_bytes: int

    @property
    def slots(self) -> Slots:
        """Its slots; whoever allocates and frees them locks."""

    def register(self, upto_bytes: int) -> None:
        """So many bytes of host memory exist by now."""

    def recover(self) -> Recovered:
        """Read back what was written before the start; its slots are allocated."""

    def attach_device(self, make_queue: Callable[[list[int]], GdsQueue]) -> None:
        """From now on it can move blocks between its files, whose descriptors it gives, and the pages of a GPU, as soon
        as the queue is ready."""

    @property
    def device_is_ready(self) -> bool:
        """Whether it can now."""

    def write(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        parents: NDArray[np.uint64], fence: int | None = None,
    ) -> None:
        """Write host slots (with a ``fence``: pages of the GPU) into SSD slots, and record their keys."""

    def read(
        self, job: int, slots: NDArray[np.int32], host_slots: NDArray[np.int32], keys: NDArray[np.uint64],
        fence: int | None = None,
    ) -> None:
        """Read SSD slots into host slots (pages of the GPU), and verify that they hold the blocks of ``keys``."""

    def erase(self, job: int, slots: NDArray[np.int32]) -> None:
        """Have SSD slots hold nothing, also after a restart."""

    def suspect(self, slots: NDArray[np.int32], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: after reads that failed, slots whose block is lost, or that had errors."""

    def cancel(self, job: int) -> None:
        """What has not begun fails."""

    def results(self) -> list[tuple[int, NDArray[np.intp], NDArray[np.bool_]]]:
        """``(job, indices, ok)`` of what has ended, each index once."""

    def clear(self) -> None:
        """Forget everything, also after a restart. Waits for the disks."""

    def usable(self) -> bool:
        """Whether reads and writes are taken now."""

    def usable_slots(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: slots that can be read and written now."""

    def stats(self) -> dict[str, int]:
        """Counts since the start."""

    def close(self) -> None:
        """Wait for what is under way (bounded); afterwards nothing touches host memory."""


MakeStore = Callable[[CacheConfig, int, bytes, object], Store]
"""``make_store(config, slot_bytes, domain, memory)``."""


class SsdExecutor(Executor):
    """Moves blocks between host slots, or pages of a GPU, and the slots of a store, which it owns.

    Each submission of blocks of an op is one job of the store.

    Parameters
    ----------
    store : Store
    """

    kinds = frozenset({OpKind.DISK2H, OpKind.H2DISK, OpKind.DISK2D, OpKind.D2DISK, OpKind.ERASE})

    def __init__(self, store: Store) -> None:
        self._store = store
        self.event_fd = store.event_fd
        self._jobs: dict[int, tuple[TransferOp, NDArray[np.intp], Progress]] = {}
        self._left: dict[int, int] = {}
        self._ids = itertools.count(1)
        self._given_up = False

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, doomed: bool = False) -> None:
        is_read = op.kind in (OpKind.DISK2H, OpKind.DISK2D)
        if op.kind is OpKind.ERASE and not self._given_up and not doomed:
            self._store.erase(self._new_job(op, indices, progress), op.dst[indices])
            return
        if self._given_up or doomed or op.keys is None or (op.parents is None and not is_read):
            progress(op, indices, np.zeros(len(indices), dtype=np.bool_))
            return
        job = self._new_job(op, indices, progress)
        fence = op.fence if op.kind in (OpKind.DISK2D, OpKind.D2DISK) else None
        src, dst, keys = op.src[indices], op.dst[indices], op.keys[indices]
        if is_read:
            self._store.read(job, src, dst, keys, fence)
        elif op.parents is not None:
            self._store.write(job, dst, src, keys, op.parents[indices], fence)

    def _new_job(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress) -> int:
        job = next(self._ids)
        self._jobs[job] = (op, indices, progress)
        self._left[job] = len(indices)
        return job

    def cancel(self, op: TransferOp) -> None:
        for job, (other, _, _) in list(self._jobs.items()):
            if other is op:
                self._store.cancel(job)

    def drain(self) -> bool:
        results = self._store.results()
        for job, which, ok in results:
            op, indices, progress = self._jobs[job]
            progress(op, indices[which], np.asarray(ok))
            self._left[job] -= len(which)
            if self._left[job] == 0:
                del self._jobs[job], self._left[job]
        return bool(results)

    def give_up(self) -> None:
        self._given_up = True
        try:
            self._store.close()                # a slot that is still read into must not be another's
        except Exception:
            logger.exception("the SSD store cannot be closed: what it was moving keeps its slots")
            return
        for op, indices, progress in self._jobs.values():
            left = indices[~op.resolved[indices]]
            try:
                if op.status is OpStatus.RUNNING:
                    progress(op, left, np.zeros(len(left), dtype=np.bool_))
            except Exception:
                logger.exception("task %d cannot be told that its reads or writes have failed", op.task_id)
        self._jobs.clear()

    def close(self) -> None:
        self._store.close()
