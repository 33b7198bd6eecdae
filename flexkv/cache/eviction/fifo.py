"""First in, first out."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class FIFO(EvictionPolicy):
    """Evicts the nodes that came to the tier first. Hits count only through ``hit_reward_seconds``."""

    def place(self, events: NDArray[np.void]) -> None:
        events["priority"] += self.hit_reward_seconds * events["new_hits"]
