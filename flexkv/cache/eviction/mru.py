"""Most recently used."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class MRU(EvictionPolicy):
    """Evicts the nodes that were used last. Suits repeated scans over more blocks than the tier holds."""

    def place(self, events: NDArray[np.void]) -> None:
        events["priority"] = self.hit_reward_seconds * events["hits"] - events["last_access"]
