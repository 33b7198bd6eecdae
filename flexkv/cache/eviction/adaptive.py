"""Adaptive eviction: learns which blocks are used again, and when (docs/design/0008-adaptive-eviction.md)."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.eviction_queues import RETURN_DTYPE
from flexkv._core.index.ghosts import Ghosts
from flexkv._core.index.reuse_statistics import NUM_QUEUES, ReuseStatistics, remember
from flexkv.cache.eviction.policy import Choice, EvictionPolicy

_GHOST_SHARE = 8
"""Blocks of the tier for each evicted piece that is remembered. At 8 the record takes 4 bytes a block."""

_MIN_GHOSTS = 8192
"""Minimum number of evicted pieces that are remembered (256 KiB). A small tier would otherwise observe no returns."""


class Adaptive(EvictionPolicy):
    """Evicts the nodes with the lowest expected hits per block and second, learned from which blocks were used again,
    and when.

    Until it has statistics it is LRU. ``flexkv._core.index.reuse_statistics`` documents the statistics and their
    sources.
    """

    num_queues = NUM_QUEUES
    wants_pieces = True

    ghosts: Ghosts

    def __init__(self, capacity: int, hit_reward_seconds: float = 0.0) -> None:
        super().__init__(capacity, hit_reward_seconds)
        self.ghosts = Ghosts(max(_MIN_GHOSTS, capacity // _GHOST_SHARE))
        self._statistics = ReuseStatistics()
        self._returns = np.zeros(0, dtype=RETURN_DTYPE)

    def returned(self, events: NDArray[np.void], returns: NDArray[np.void]) -> None:
        self._returns = returns

    def place(self, events: NDArray[np.void]) -> None:
        self._statistics.place(events, self._returns)
        self._returns = self._returns[:0]

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        queue, below = self._statistics.choose(heads)
        return Choice(queue, below=below)

    def evicted(self, pieces: NDArray[np.void]) -> None:
        remember(pieces, self.ghosts)
