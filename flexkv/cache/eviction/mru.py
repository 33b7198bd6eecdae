"""Most recently used."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class MRU(EvictionPolicy):
    """What was used last goes first: for scans over more than fits, again and again."""

    def place(self, events: NDArray[np.void]) -> None:
        events["rank"] = self.hit_reward_seconds * events["hits"] - events["last_access"]
