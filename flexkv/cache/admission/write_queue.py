"""What waits to be written to a tier below: bounded in all, and fair between namespaces."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_Sequence = tuple[NDArray[np.uint64], NDArray[np.intp]]
"""Keys ((n, 2) uint64), and the positions of the blocks to write ((m,) intp), ascending."""


class WriteQueue:
    """Sequences of each quota group, in the order in which they came; groups take turns. The caller locks.

    Where not all has room, a group that has less than an even part of the queue gets it, at the cost of what came last
    of those that have more. So one that floods delays another's writes by its turns, and takes none of them away.

    Parameters
    ----------
    max_blocks : int
        Of all groups together.

    Attributes
    ----------
    left_out : int
        Blocks that had no room, of what was added or of what waited, since the start.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max = max_blocks
        self._queues: dict[int, dict[bytes, _Sequence]] = {}     # in the order of their turns; by last key; none empty
        self._blocks: dict[int, int] = {}                        # of each group
        self.left_out = 0

    @property
    def num_blocks(self) -> int:
        """Of all groups."""
        return sum(self._blocks.values())

    def add(self, group: int, keys: NDArray[np.uint64], blocks: NDArray[np.intp]) -> int:
        """Queue the blocks at these positions of a sequence, or as many of the first of them as have room; returns how
        many."""
        self.remove(group, keys[-1])
        share = self._max // len(self._queues.keys() | {group})
        room = max(0, self._max - self.num_blocks, share - self._blocks.get(group, 0))
        count = min(len(blocks), room)
        self.left_out += len(blocks) - count
        if count == 0:
            return 0
        while (excess := self.num_blocks + count - self._max) > 0:
            self._shorten(excess, share)
        self._append(group, keys, blocks[:count])
        return count

    def _append(self, group: int, keys: NDArray[np.uint64], blocks: NDArray[np.intp]) -> None:
        keys = keys[: blocks[-1] + 1]
        self.remove(group, keys[-1])
        self._queues.setdefault(group, {})[keys[-1].tobytes()] = keys, blocks
        self._blocks[group] = self._blocks.get(group, 0) + len(blocks)

    def _shorten(self, count: int, share: int) -> None:
        """Leave out up to ``count`` blocks of what came last of the largest group, which has more than ``share``."""
        group = max(self._blocks, key=self._blocks.__getitem__)
        keys, blocks = next(reversed(self._queues[group].values()))
        count = min(count, len(blocks), self._blocks[group] - share)
        self.remove(group, keys[-1])
        if count < len(blocks):
            self._append(group, keys, blocks[:-count])
        self.left_out += count

    def remove(self, group: int, last_key: NDArray[np.uint64]) -> bool:
        """Take the sequence that ends with a key ((2,) uint64) off the queue; False if it is not there."""
        _, blocks = self._queues.get(group, {}).pop(last_key.tobytes(), (None, ()))
        if len(blocks) == 0:
            return False
        self._blocks[group] -= len(blocks)
        if not self._queues[group]:
            del self._queues[group], self._blocks[group]
        return True

    def first(self) -> tuple[int, NDArray[np.uint64]] | None:
        """Whose turn it is, and the sequence that is the next of it; None: nothing waits."""
        for group, queue in self._queues.items():
            return group, next(iter(queue.values()))[0]
        return None

    def sequences(self) -> Iterator[_Sequence]:
        """All that waits."""
        for queue in self._queues.values():
            yield from queue.values()

    def end_turn(self, group: int) -> None:
        """It is the others' turn now."""
        if group in self._queues:
            self._queues[group] = self._queues.pop(group)

    def clear(self) -> None:
        """Forget all of it."""
        self._queues.clear()
        self._blocks.clear()
