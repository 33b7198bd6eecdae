"""Segmented LRU (Karedla, Love, Wherry: Caching strategies to improve disk system performance, IEEE Computer 1994)."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import Choice, EvictionPolicy

PROBATION, PROTECTED = 0, 1

_PROTECTED_SHARE = 0.8
"""Maximum share of the tier for the protected queue."""


class SLRU(EvictionPolicy):
    """Two LRU queues: nodes that were hit are protected, up to a share of the tier; other nodes are evicted first."""

    num_queues = 2

    def place(self, events: NDArray[np.void]) -> None:
        hit = events["new_hits"] > 0
        events["queue"][hit] = PROTECTED
        events["lives"][hit] = 1
        events["priority"] = events["last_access"] + self.hit_reward_seconds * events["hits"]

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        most = int(_PROTECTED_SHARE * self.capacity)
        if blocks[PROTECTED] > most and np.isfinite(heads[PROTECTED]):
            return Choice(PROTECTED, leave=most, spare_to=PROBATION)
        return super().choose(blocks, heads)
