"""Least frequently used."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class LFU(EvictionPolicy):
    """Evicts the nodes with the fewest hits, and among these the least recently used. One queue for each number of
    hits; the last queue takes all higher numbers."""

    num_queues = 64

    def place(self, events: NDArray[np.void]) -> None:
        events["queue"] = np.minimum(events["hits"], self.num_queues - 1)
        events["priority"] = events["last_access"] + self.hit_reward_seconds * events["hits"]
