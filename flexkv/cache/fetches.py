"""Table of the host slots that fetches fill from SSD."""

import itertools

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.plan import IN_PLACE, FetchPlan, Join
from flexkv.cache.tier import SsdTier, Tier


class FetchTable:
    """Fetches under way, by host slot. The caller must hold the engine's lock.

    Parameters
    ----------
    num_slots : int
        Slots of the host tier.

    Attributes
    ----------
    num_blocks : int
        Blocks that fetches are reading.
    """

    def __init__(self, num_slots: int) -> None:
        # 0: no fetch. The last two places are always 0, for the indices -1 (no slot) and IN_PLACE.
        self._fetch_of = np.zeros(num_slots - IN_PLACE, dtype=np.int64)
        self._index_of = np.zeros(num_slots, dtype=np.int32)
        self._ids = itertools.count(1)
        self.num_blocks = 0

    def begin(
        self, tree: RadixTree, host: Tier, ssd: SsdTier, keys: NDArray[np.uint64], match: Match,
        slots: NDArray[np.int32], slow: NDArray[np.intp], tenant: int, now: float,
    ) -> tuple[int, FetchPlan | None]:
        """Allocate host slots, entered in ``slots``, for the blocks at positions ``slow`` that have none.

        Returns the position of the first block without a slot (``match.num_ready`` if there is none), and the reads.
        """
        wanted = slow[slots[slow] < 0]
        taken = host.take(tree, len(wanted), tenant, now)
        stop = int(wanted[len(taken)]) if len(taken) < len(wanted) else match.num_ready
        wanted = wanted[: len(taken)]
        if len(wanted) == 0:
            return stop, None
        keys = keys[: wanted[-1] + 1]
        plan = FetchPlan(keys, wanted.astype(np.int32), tree, match.slots[wanted], taken, next(self._ids))
        if not host.place(plan, taken, now):
            return int(wanted[0]), None
        try:
            tree.acquire(keys, int(wanted[0]), len(keys))
        except MemoryError:                        # CapacityError is one
            host.displace(plan, taken)
            return int(wanted[0]), None
        plan.read = ssd.slots.generations(plan.ssd_slots)
        slots[wanted] = taken
        self.add(plan)
        ssd.load_or_compute.read_began()
        return stop, plan

    def add(self, plan: FetchPlan) -> None:
        """Enter a fetch that begins."""
        self._fetch_of[plan.host_slots] = plan.fetch_id
        self._index_of[plan.host_slots] = np.arange(len(plan))
        self.num_blocks += len(plan)

    def remove(self, plan: FetchPlan) -> None:
        """Remove a fetch that has ended."""
        self._fetch_of[plan.host_slots] = 0
        self.num_blocks -= len(plan)

    def filling(self, host_slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether a fetch fills each of these slots ((n,) int32; -1, IN_PLACE: no slot)."""
        return np.asarray(self._fetch_of[host_slots] > 0)

    def joins(self, host_slots: NDArray[np.int32]) -> tuple[Join, ...]:
        """Fetches that a reader of these slots ((n,) int32; -1, IN_PLACE: no slot) must wait for."""
        fetches = self._fetch_of[host_slots]
        joins = []
        for fetch_id in np.unique(fetches[fetches > 0]).tolist():
            mine = np.flatnonzero(fetches == fetch_id)
            joins.append(Join(fetch_id, mine, self._index_of[host_slots[mine]].astype(np.intp)))
        return tuple(joins)
