"""Least frequently used."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class LFU(EvictionPolicy):
    """What was hit least often goes first; of equals, what was used longest ago. A queue for each number of hits."""

    num_queues = 64

    def place(self, events: NDArray[np.void]) -> None:
        events["queue"] = np.minimum(events["hits"], self.num_queues - 1)
        events["rank"] = events["last_access"] + self.hit_reward_seconds * events["hits"]
