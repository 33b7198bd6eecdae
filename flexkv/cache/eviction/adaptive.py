"""Learns what is used again."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.ghosts import Ghosts
from flexkv._core.ranking import RETURN_DTYPE
from flexkv._core.reuse import NUM_CLASSES, ReuseStatistics
from flexkv.cache.eviction.policy import Choice, EvictionPolicy


class Adaptive(EvictionPolicy):
    num_queues = NUM_CLASSES
    wants_pieces = True

    def __init__(self, capacity: int, hit_reward_seconds: float = 0.0) -> None:
        super().__init__(capacity, hit_reward_seconds)
        self.ghosts = Ghosts(max(8192, capacity // 8))
        self._statistics = ReuseStatistics()
        self._returns = np.zeros(0, dtype=RETURN_DTYPE)

    def returned(self, events: NDArray[np.void], returns: NDArray[np.void]) -> None:
        self._returns = returns

    def place(self, events: NDArray[np.void]) -> None:
        self._statistics.place(events, self._returns)

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        queue, below = self._statistics.choose(heads)
        return Choice(queue, below=below)

    def evicted(self, pieces: NDArray[np.void]) -> None:
        self.ghosts.add(pieces["first_key"], pieces["blocks"], pieces["rank"], pieces["mark"])
