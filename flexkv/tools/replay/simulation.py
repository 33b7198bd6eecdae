"""Simulation of a trace with the real control plane. No KV is moved: every transfer ends at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.admission.write_back import WriteBack
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import policy_class
from flexkv.cache.lower_tier import TierService
from flexkv.config import CacheConfig
from flexkv.tools.replay.trace import Trace

_QUEUE_SHARE = 2
"""Divisor of the host tier: at most 1/2 of the host slots may wait for write-back, as in service."""


@dataclass(slots=True)
class Outcome:
    """Result of a replay, in blocks.

    Attributes
    ----------
    hits : int
        Cached leading blocks of all requests.
    host_hits : int
        Hits in host memory.
    ssd_written : int
        Blocks written to SSD.
    """

    hits: int = 0
    host_hits: int = 0
    ssd_written: int = 0


class Simulation:
    """A control plane without a data plane, on the trace's clock.

    All slots of a tier are used. In service, one or two percent are kept free ahead of need (``evict_ratio``).

    Parameters
    ----------
    policy : str
        Name of an eviction policy.
    host_blocks, ssd_blocks : int
        Capacities; no SSD tier if ``ssd_blocks`` is 0.
    write_all : bool
        Write all blocks to SSD; see ``WriteBack``.
    """

    def __init__(self, policy: str, host_blocks: int, ssd_blocks: int = 0, write_all: bool = False) -> None:
        self._now = 0.0
        self._cache, self._writer = _control_plane(policy, host_blocks, ssd_blocks, write_all, lambda: self._now)
        self._outcome = Outcome()

    def run(self, trace: Trace, progress: Callable[[int], object] = lambda count: None) -> Outcome:
        """Replay all requests; ``progress(count)`` is called for each ``count`` replayed requests."""
        ok = np.ones(int(np.diff(trace.starts).max(initial=0)), dtype=np.bool_)
        starts, keys = trace.starts.tolist(), trace.keys
        for i, self._now in enumerate(trace.seconds.tolist()):
            self._request(keys[starts[i] : starts[i + 1]], ok)
            progress(1)
        self._cache.check_integrity()
        return self._outcome

    def _request(self, keys: NDArray[np.uint64], ok: NDArray[np.bool_]) -> None:
        cache, writer = self._cache, self._writer
        plan = cache.begin_get(keys, 0, len(keys), choose=False)
        self._outcome.hits += plan.stop
        self._outcome.host_hits += plan.stop
        for move in plan.moves:
            self._outcome.host_hits -= len(move)
            cache.end_move(move, ok[: len(move)])
        cache.end_get(plan)
        if writer is not None and plan.stop:
            writer.hit(plan.keys)
            self._write(writer, ok)
        if plan.stop < len(keys):
            put = cache.begin_put(keys, plan.stop, len(keys))
            cache.end_put(put, ok[: len(put)])
            if writer is not None:
                writer.put(put)
                self._write(writer, ok)

    def _write(self, writer: WriteBack, ok: NDArray[np.bool_]) -> None:
        while (plan := writer.next()) is not None:
            writer.ended(plan, ok[: len(plan)])
            self._outcome.ssd_written += len(plan)


def _control_plane(
    policy: str, host_blocks: int, ssd_blocks: int, write_all: bool, clock: Callable[[], float]
) -> tuple[GlobalCacheEngine, WriteBack | None]:
    cache = GlobalCacheEngine(
        host_blocks, partial(policy_class(policy), hit_reward_seconds=CacheConfig.hit_reward_seconds), clock=clock,
        lower={"ssd": ssd_blocks} if ssd_blocks else None,
    )
    cache.grow(host_blocks)
    if ssd_blocks == 0:
        return cache, None
    cache.attach(1, TierService(
        SlotAllocator(ssd_blocks), CostModel(1, clock), lambda: True, lambda slots: slots >= 0
    ))
    writer = WriteBack(
        cache, 1, write_all=write_all, batch_blocks=ssd_blocks, max_in_flight_blocks=ssd_blocks,
        max_queued_blocks=max(1, host_blocks // _QUEUE_SHARE), blocks_per_s=0.0, clock=clock,
    )
    return cache, writer
