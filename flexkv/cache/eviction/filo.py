"""First in, last out."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class FILO(EvictionPolicy):
    """Evicts the nodes that came to the tier last, so that the nodes that filled it first stay."""

    def place(self, events: NDArray[np.void]) -> None:
        priority = np.where(events["is_new"], -events["priority"], events["priority"])
        events["priority"] = priority + self.hit_reward_seconds * events["new_hits"]
