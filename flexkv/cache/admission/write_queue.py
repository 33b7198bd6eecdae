"""Queue of the sequences to write to a lower tier: bounded, and fair between namespaces."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_Sequence = tuple[NDArray[np.uint64], NDArray[np.intp]]
"""Keys ((n, 2) uint64), and the positions of the blocks to write ((m,) intp), ascending."""


class WriteQueue:
    """Sequences of each tenant in order of arrival; tenants take turns. The caller must serialize calls.

    When the queue is full, a tenant with less than an even share of it can still add blocks up to that share: the
    latest blocks of tenants above their share are dropped. So a tenant that floods the queue delays the writes of
    another tenant, but does not displace them.

    Parameters
    ----------
    max_blocks : int
        Maximum number of blocks of all tenants together.

    Attributes
    ----------
    left_out : int
        Blocks dropped since the start: blocks that did not fit when they were added, and queued blocks that were
        dropped for another tenant.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max = max_blocks
        self._queues: dict[int, dict[bytes, _Sequence]] = {}     # in the order of their turns; by last key; none empty
        self._blocks: dict[int, int] = {}                        # of each tenant
        self.left_out = 0

    @property
    def num_blocks(self) -> int:
        """Queued blocks of all tenants."""
        return sum(self._blocks.values())

    def add(self, tenant: int, keys: NDArray[np.uint64], blocks: NDArray[np.intp]) -> int:
        """Queue the blocks at positions ``blocks`` ((m,) intp, ascending) of a sequence (``keys``: (n, 2) uint64), or
        the first of them if not all fit. Replaces an entry of the same sequence. Returns the number of blocks
        queued."""
        self.remove(tenant, keys[-1])
        share = self._max // len(self._queues.keys() | {tenant})
        room = max(0, self._max - self.num_blocks, share - self._blocks.get(tenant, 0))
        count = min(len(blocks), room)
        self.left_out += len(blocks) - count
        if count == 0:
            return 0
        while (excess := self.num_blocks + count - self._max) > 0:
            self._shorten(excess, share)
        self._append(tenant, keys, blocks[:count])
        return count

    def _append(self, tenant: int, keys: NDArray[np.uint64], blocks: NDArray[np.intp]) -> None:
        keys = keys[: blocks[-1] + 1]
        self.remove(tenant, keys[-1])
        self._queues.setdefault(tenant, {})[keys[-1].tobytes()] = keys, blocks
        self._blocks[tenant] = self._blocks.get(tenant, 0) + len(blocks)

    def _shorten(self, count: int, share: int) -> None:
        """Drop up to ``count`` blocks of the latest sequence of the largest tenant, down to ``share``."""
        tenant = max(self._blocks, key=self._blocks.__getitem__)
        keys, blocks = next(reversed(self._queues[tenant].values()))
        count = min(count, len(blocks), self._blocks[tenant] - share)
        self.remove(tenant, keys[-1])
        if count < len(blocks):
            self._append(tenant, keys, blocks[:-count])
        self.left_out += count

    def remove(self, tenant: int, last_key: NDArray[np.uint64]) -> bool:
        """Remove the sequence that ends with a key ((2,) uint64) from the queue; False if it is not queued."""
        _, blocks = self._queues.get(tenant, {}).pop(last_key.tobytes(), (None, ()))
        if len(blocks) == 0:
            return False
        self._blocks[tenant] -= len(blocks)
        if not self._queues[tenant]:
            del self._queues[tenant], self._blocks[tenant]
        return True

    def first(self) -> tuple[int, NDArray[np.uint64]] | None:
        """The tenant whose turn it is, and the keys ((n, 2) uint64) of its oldest sequence; None: the queue is empty.
        Removes nothing."""
        for tenant, queue in self._queues.items():
            return tenant, next(iter(queue.values()))[0]
        return None

    def sequences(self) -> Iterator[_Sequence]:
        """All queued sequences: keys ((n, 2) uint64), and positions of the queued blocks ((m,) intp)."""
        for queue in self._queues.values():
            yield from queue.values()

    def end_turn(self, tenant: int) -> None:
        """Move a tenant behind all other tenants."""
        if tenant in self._queues:
            self._queues[tenant] = self._queues.pop(tenant)

    def clear(self) -> None:
        """Drop all queued sequences."""
        self._queues.clear()
        self._blocks.clear()
