"""Which host slots are being filled from SSD, and by which fetch."""

import itertools

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import FetchPlan, Join


class FetchTable:
    """Fetches under way, by host slot. The caller locks.

    Parameters
    ----------
    num_slots : int
        Of the host tier.
    """

    def __init__(self, num_slots: int) -> None:
        self._fetch_of = np.zeros(num_slots, dtype=np.int64)       # 0: none
        self._index_of = np.zeros(num_slots, dtype=np.int32)
        self._ids = itertools.count(1)
        self.num_blocks = 0

    def new_id(self) -> int:
        """For a fetch that is about to be added."""
        return next(self._ids)

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
        """Which of these slots (-1: none) a fetch fills."""
        return (host_slots >= 0) & (self._fetch_of[host_slots] > 0)

    def joins(self, host_slots: NDArray[np.int32]) -> tuple[Join, ...]:
        """Whom those who read these slots have to wait for."""
        fetches = self._fetch_of[host_slots]
        joins = []
        for fetch_id in np.unique(fetches[fetches > 0]).tolist():
            mine = np.flatnonzero(fetches == fetch_id)
            joins.append(Join(fetch_id, mine, self._index_of[host_slots[mine]].astype(np.intp)))
        return tuple(joins)
