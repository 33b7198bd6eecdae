"""ARC (Megiddo, Modha: ARC: a self-tuning, low overhead replacement cache, FAST 2003)."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.ghosts import Ghosts
from flexkv.cache.eviction.policy import Choice, EvictionPolicy

RECENT, FREQUENT = 0, 1


class ARC(EvictionPolicy):
    """Two LRU queues: nodes used once, and nodes used again. An evicted node that returns shows which of the queues was
    too short."""

    num_queues = 2
    wants_pieces = True
    max_waiting = 1                          # each return must change the shares before the next return is processed

    def __init__(self, capacity: int, hit_reward_seconds: float = 0.0) -> None:
        super().__init__(capacity, hit_reward_seconds)
        self._share = 0.0                    # blocks that the first queue should have
        self._ghosts = (Ghosts(capacity), Ghosts(capacity))

    def place(self, events: NDArray[np.void]) -> None:
        new = events["is_new"].nonzero()[0]
        if len(new):
            keys = events["first_key"][new]
            for queue in (RECENT, FREQUENT):
                back = new[np.isfinite(self._ghosts[queue].take(keys))]
                if len(back):
                    self._came_back(queue, int(events["length"][back].sum()))
                    events["queue"][back] = FREQUENT
        events["queue"][events["new_hits"] > 0] = FREQUENT
        events["priority"] = events["last_access"] + self.hit_reward_seconds * events["hits"]

    def _came_back(self, queue: int, blocks: int) -> None:
        """Enlarge a queue to which ``blocks`` evicted blocks returned; by more if the other queue has more ghosts."""
        mine, other = self._ghosts[queue].num_blocks + blocks, self._ghosts[1 - queue].num_blocks
        step = blocks * max(1.0, other / mine)
        self._share = min(self._share + step, self.capacity) if queue == RECENT else max(self._share - step, 0.0)

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        can_go = np.isfinite(heads)
        if can_go[RECENT] and blocks[RECENT] > self._share:
            return Choice(RECENT, leave=int(self._share))
        return Choice(FREQUENT if can_go[FREQUENT] else RECENT)

    def evicted(self, pieces: NDArray[np.void]) -> None:
        for queue in (RECENT, FREQUENT):
            gone = pieces[pieces["queue"] == queue]
            self._ghosts[queue].add(gone["first_key"], gone["blocks"], gone["priority"])
            self._ghosts[queue].trim(self.capacity if queue == FREQUENT else self.capacity - int(self._share))
