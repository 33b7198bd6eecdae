"""Cost of eviction: during every put, and ahead of need as in service."""

import gc
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import POLICIES
from flexkv.config import CacheConfig
from flexkv.tools.bench.filled_tree import NEW, SHARED, random_keys
from flexkv.tools.bench.report import Line

_GET_SHARE = 0.25
"""Share of puts that come after another use of an old sequence."""


class FullEngine:
    """An engine whose host tier is full of sequences of 2,048 blocks that share their first 128.

    Parameters
    ----------
    policy : str
    num_blocks : int
    start_threshold, ratio : float
        See ``GlobalCacheEngine``; by default no block is evicted ahead of need.
    """

    def __init__(self, policy: str, num_blocks: int, start_threshold: float = 1.0, ratio: float = 0.0) -> None:
        self.cache = GlobalCacheEngine(num_blocks, POLICIES[policy], start_threshold, ratio)
        self.cache.grow(num_blocks)
        self._rng = np.random.default_rng(0)
        self._shared = random_keys(self._rng, SHARED)
        self._used: list[NDArray[np.uint64]] = []
        self._ready = np.ones(SHARED + NEW, dtype=np.bool_)
        while self.cache.stats()["evicted_blocks"] == 0:
            self.put()
            self.evict_ahead()

    def put(self) -> float:
        """Put a sequence; returns the seconds until it has slots."""
        if self._used and self._rng.random() < _GET_SHARE:
            old = self._used[int(self._rng.integers(len(self._used)))]
            plan = self.cache.begin_get(old, 0, len(old))
            self.cache.end_get(plan)
        keys = np.concatenate([self._shared, random_keys(self._rng, NEW)])
        start = time.perf_counter()
        put = self.cache.begin_put(keys, 0, len(keys))
        took = time.perf_counter() - start
        self.cache.end_put(put, self._ready[: len(put)])
        self._used = [*self._used[-255:], keys]
        return took

    def evict_ahead(self) -> float:
        """Evict ahead of need; returns the duration in seconds, for which requests wait."""
        start = time.perf_counter()
        self.cache.evict_ahead()
        return time.perf_counter() - start


def run(num_blocks: int, n: int = 1000) -> Iterator[Line]:
    """Measure every policy: microseconds for each evicted block, of a put, and of a batch evicted ahead of need."""
    for policy in POLICIES:
        full = FullEngine(policy, num_blocks)
        before = full.cache.stats()["evicted_blocks"]
        gc.collect()
        took = np.array([full.put() for _ in range(n)]) * 1e6
        evicted = full.cache.stats()["evicted_blocks"] - before
        full.cache.check_integrity()
        p50, p99 = (round(float(np.percentile(took, q)), 1) for q in (50, 99))
        size = f"{num_blocks / 1e6:.3g} M blocks"
        yield Line("evict", f"{policy}, a block, {size}", round(took.sum() / evicted, 4), "us", n=n)
        yield Line("evict", f"{policy}, a put of 1,920, {size}", p50, "us", n=n, p50=p50, p99=p99)
        yield Line("evict", f"{policy}, the longest put, {size}", round(float(took.max()), 1), "us", n=n)
        del full
        full = FullEngine(policy, num_blocks, CacheConfig.evict_start_threshold, CacheConfig.evict_ratio)
        took = np.array([(full.put(), full.evict_ahead()) for _ in range(n)]) * 1e6
        case = f"{policy}, longest put or batch ahead, as in service, {size}"
        yield Line("evict", case, round(float(took.max()), 1), "us", n=n)
