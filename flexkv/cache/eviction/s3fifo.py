"""S3-FIFO (Yang et al.: FIFO queues are all you need for cache eviction, SOSP 2023)."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.ghosts import Ghosts
from flexkv.cache.eviction.policy import Choice, EvictionPolicy

SMALL, MAIN = 0, 1

_SMALL_SHARE = 0.1
"""Share of the tier for the small queue, as in the paper."""

_MAX_LIVES = 3
"""Maximum number of times that a node of the main queue is spared, as in the paper."""


class S3FIFO(EvictionPolicy):
    """A new node enters a small queue. It moves to the main queue if it is hit there, or if it returns soon after its
    eviction.

    A node in the main queue is spared once for each hit, three times at most. A node that returns enters the main queue
    directly if no more blocks than the main queue holds were evicted from the small queue since.
    """

    num_queues = 2
    wants_pieces = True

    def __init__(self, capacity: int, hit_reward_seconds: float = 0.0) -> None:
        super().__init__(capacity, hit_reward_seconds)
        self._small = int(_SMALL_SHARE * capacity)
        self._ghosts = Ghosts(capacity)

    def place(self, events: NDArray[np.void]) -> None:
        new = events["is_new"].nonzero()[0]
        known = np.isfinite(self._ghosts.take(events["first_key"][new]))
        events["queue"][new] = np.where(known, MAIN, SMALL)
        events["lives"] = np.minimum(events["lives"] + events["new_hits"], _MAX_LIVES)
        events["priority"] += self.hit_reward_seconds * events["new_hits"]

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        can_go = np.isfinite(heads)
        if can_go[SMALL] and blocks[SMALL] > self._small:
            return Choice(SMALL, leave=self._small, spare_to=MAIN)
        return Choice(MAIN if can_go[MAIN] else SMALL, spare_to=MAIN)

    def evicted(self, pieces: NDArray[np.void]) -> None:
        gone = pieces[pieces["queue"] == SMALL]
        self._ghosts.add(gone["first_key"], gone["blocks"], gone["priority"])
        self._ghosts.trim(self.capacity - self._small)
