"""First in, last out."""

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction.policy import EvictionPolicy


class FILO(EvictionPolicy):
    """What came to the tier last goes first: what fills it once stays."""

    def place(self, events: NDArray[np.void]) -> None:
        rank = np.where(events["is_new"], -events["rank"], events["rank"])
        events["rank"] = rank + self.hit_reward_seconds * events["new_hits"]
