"""Store executor: submits ops to a store, for example the SSD tier, and collects its results."""

import itertools
import logging

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.ring import OpKind
from flexkv.storage.store import Store, differ
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.graph import OpStatus, TransferOp

logger = logging.getLogger("flexkv.transfer")


class StoreExecutor(Executor):
    """Moves blocks between host slots, or pages of a GPU, and the slots of a store, which it owns.

    Each submission of blocks of an op is one job of the store.

    Parameters
    ----------
    store : Store
    tier : int
        Number of the lower tier whose store it is.
    """

    kinds = frozenset({OpKind.STORE2H, OpKind.H2STORE, OpKind.STORE2D, OpKind.D2STORE, OpKind.ERASE})

    def __init__(self, store: Store, tier: int = 1) -> None:
        self.tier = tier
        self._store = store
        self.event_fd = store.event_fd
        self._jobs: dict[int, tuple[TransferOp, NDArray[np.intp], Progress]] = {}
        self._left: dict[int, int] = {}
        self._ids = itertools.count(1)
        self._abandoned = False

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False) -> None:
        is_read = op.kind in (OpKind.STORE2H, OpKind.STORE2D)
        if op.kind is OpKind.ERASE and not self._abandoned and not failed:
            self._store.erase(self._new_job(op, indices, progress), op.dst[indices])
            return
        if self._abandoned or failed or op.keys is None or (op.parents is None and not is_read):
            progress(op, indices, np.zeros(len(indices), dtype=np.bool_))
            return
        job = self._new_job(op, indices, progress)
        fence = op.fence if op.kind in (OpKind.STORE2D, OpKind.D2STORE) else None
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
            where = indices[which]
            progress(op, where, np.asarray(ok) & ~self._altered(op, where))
            self._left[job] -= len(which)
            if self._left[job] == 0:
                del self._jobs[job], self._left[job]
        return bool(results)

    def _altered(self, op: TransferOp, where: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(k,) bool: blocks of a read of which the store has another checksum than the op."""
        if op.checksums is None:
            return np.zeros(len(where), dtype=np.bool_)
        return differ(self._store.checksums(op.src[where]), op.checksums[where])

    def abandon(self) -> None:
        self._abandoned = True
        try:
            self._store.close()                # first: a slot that is still written must not be freed
        except Exception:
            logger.exception("the store cannot be closed: blocks in progress keep their slots")
            return
        for op, indices, progress in self._jobs.values():
            left = indices[~op.resolved[indices]]
            try:
                if op.status is OpStatus.RUNNING:
                    progress(op, left, np.zeros(len(left), dtype=np.bool_))
            except Exception:
                logger.exception("the failure of reads or writes of task %d cannot be reported", op.task_id)
        self._jobs.clear()

    def close(self) -> None:
        self._store.close()
