"""Least recently used."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class LRU(EvictionPolicy):
    """Evicts the nodes that were used longest ago."""

    def place(self, events: NDArray[np.void]) -> None:
        events["priority"] = events["last_access"] + self.hit_reward_seconds * events["hits"]
