"""The queues of a store: between its files and host memory, and between its files and the pages of a GPU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.ssd.batches import Batch

Taken = tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint64]]
"""Tags, results and checksums, as ``IoQueue.take`` gives them."""


class StoreQueues:
    """Submits each batch to the queue that can move it, and takes the results of all queues. The caller must hold the
    store's lock.

    Parameters
    ----------
    host : IoQueue, or a queue with its interface
    num_host_slots, slot_bytes : int
    """

    def __init__(self, host: Any, num_host_slots: int, slot_bytes: int) -> None:
        self.host = host
        self._num_host_slots = num_host_slots
        self._device: Any = None
        self._dying: list[Any] = []          # closed queues whose rank's process may still write
        self._slot_bytes = slot_bytes

    def attach(self, device: Any) -> None:
        """Attach a queue with the interface of ``GdsQueue``. An earlier queue must be closed, and its results taken."""
        if self._device is not None and not self._device.at_rest:
            self._dying.append(self._device)
        self._device = device

    @property
    def device_is_ready(self) -> bool:
        """Whether batches with a fence can be moved now."""
        return self._device is not None and self._device.ready

    def places(self, fence: int | None) -> int:
        """Number of host slots; with a fence, an upper bound for the number of pages, which only the rank knows."""
        return self._num_host_slots if fence is None else int(np.iinfo(np.int32).max)

    def takes(self, fence: int | None) -> bool:
        """Whether a batch with this fence can be moved now."""
        return fence is None or self.device_is_ready

    def submit(self, batch: Batch, file: int) -> None:
        """Submit all blocks of a batch, whose slots are in the file with index ``file``."""
        local = batch.slots.astype(np.int64) - batch.directory.first_slot
        offsets = local * self._slot_bytes, batch.host_slots.astype(np.int64) * self._slot_bytes
        files = np.full(len(local), file, dtype=np.int32)
        if batch.fence is None:
            self.host.submit(batch.kind, batch.tags(), files, *offsets, self._slot_bytes)
        else:
            self._device.submit(batch.kind, batch.tags(), files, *offsets, self._slot_bytes, batch.fence)
        batch.submitted = True

    def cancel(self, batch: Batch) -> None:
        """Cancel the blocks of a batch that have not begun."""
        queue = self.host if batch.fence is None else self._device
        if queue is not None:
            queue.cancel(batch.tags()[batch.left()])

    def take(self) -> Taken:
        """Results of all queues since the last call."""
        queues = [self.host] if self._device is None else [self.host, self._device]
        tags, results, checksums = zip(*[queue.take() for queue in queues], strict=True)
        if self._device is not None and self._device.closed:
            self._dying.append(self._device)
            self._device = None
        return np.concatenate(tags), np.concatenate(results), np.concatenate(checksums)

    def busy(self) -> NDArray[np.uint64]:
        """Tags of the blocks under way, and of the blocks that a rank that hung up may still move."""
        self._dying = [queue for queue in self._dying if not queue.at_rest]
        queues = [self.host, *self._dying] if self._device is None else [self.host, self._device, *self._dying]
        return np.concatenate([queue.busy() for queue in queues])

    def close_device(self) -> None:
        """Close the GPU's queue; ``take`` reports the results of its blocks."""
        if self._device is not None:
            self._device.close()
