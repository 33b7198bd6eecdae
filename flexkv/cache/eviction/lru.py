"""Least recently used, with upstream FlexKV's frequency-aware grace time."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class LRU(EvictionPolicy):
    """What was used longest ago goes first; every hit counts as ``hit_reward_seconds`` of later use."""

    def score(self, nodes: NDArray[np.void], now: float) -> NDArray[np.float64]:
        score: NDArray[np.float64] = nodes["last_access"] + self.hit_reward_seconds * nodes["hits"]
        return score
