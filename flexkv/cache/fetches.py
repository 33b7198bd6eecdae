"""Which host slots are being filled from SSD, and by which fetch."""

import itertools

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.plan import IN_PLACE, FetchPlan, Join
from flexkv.cache.tier import SsdTier, Tier


class FetchTable:
    """Fetches under way, by host slot. The caller locks.

    Parameters
    ----------
    num_slots : int
        Of the host tier.
    """

    def __init__(self, num_slots: int) -> None:
        self._fetch_of = np.zeros(num_slots - IN_PLACE, dtype=np.int64)    # 0: none; at the end for what has no slot
        self._index_of = np.zeros(num_slots, dtype=np.int32)
        self._ids = itertools.count(1)
        self.num_blocks = 0

    def begin(
        self, tree: RadixTree, host: Tier, ssd: SsdTier, keys: NDArray[np.uint64], match: Match,
        slots: NDArray[np.int32], slow: NDArray[np.intp], group: int, now: float,
    ) -> tuple[int, FetchPlan | None]:
        """Give host slots, in ``slots``, to blocks that are on SSD alone; returns where they end, and what to read."""
        wanted = slow[slots[slow] < 0]
        taken = host.take(tree, len(wanted), group, now)
        stop = int(wanted[len(taken)]) if len(taken) < len(wanted) else match.num_ready
        wanted = wanted[: len(taken)]
        if len(wanted) == 0:
            return stop, None
        keys = keys[: wanted[-1] + 1]
        plan = FetchPlan(keys, wanted.astype(np.int32), tree, match.slots[wanted], taken, next(self._ids))
        if not host.place(plan, taken, now):
            return int(wanted[0]), None
        try:
            tree.pin(keys, int(wanted[0]), len(keys))
        except MemoryError:                        # CapacityError is one
            host.displace(plan, taken)
            return int(wanted[0]), None
        plan.read = ssd.slots.generations(plan.ssd_slots)
        slots[wanted] = taken
        self.add(plan)
        ssd.planner.read_began()
        return stop, plan

    def add(self, plan: FetchPlan) -> None:
        """A fetch begins."""
        self._fetch_of[plan.host_slots] = plan.fetch_id
        self._index_of[plan.host_slots] = np.arange(len(plan))
        self.num_blocks += len(plan)

    def remove(self, plan: FetchPlan) -> None:
        """It has ended."""
        self._fetch_of[plan.host_slots] = 0
        self.num_blocks -= len(plan)

    def filling(self, host_slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these slots (-1, IN_PLACE: none) a fetch fills."""
        return np.asarray(self._fetch_of[host_slots] > 0)

    def joins(self, host_slots: NDArray[np.int32]) -> tuple[Join, ...]:
        """Whom those who read these slots (-1, IN_PLACE: none) have to wait for."""
        fetches = self._fetch_of[host_slots]
        joins = []
        for fetch_id in np.unique(fetches[fetches > 0]).tolist():
            mine = np.flatnonzero(fetches == fetch_id)
            joins.append(Join(fetch_id, mine, self._index_of[host_slots[mine]].astype(np.intp)))
        return tuple(joins)
