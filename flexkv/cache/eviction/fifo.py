"""First in, first out."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class FIFO(EvictionPolicy):
    """What came to the tier first goes first, however it was used."""

    def place(self, events: NDArray[np.void]) -> None:
        events["rank"] += self.hit_reward_seconds * events["new_hits"]
