"""The tiers below host memory: wires the moves of gets and puts to the data plane."""

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import DEVICE, GetPlan, Move, PutPlan
from flexkv.cache.tier import HOST
from flexkv.config import CacheConfig
from flexkv.controller.lower_tier import IDLE_S, LowerTier, drain_deadline
from flexkv.protocol.ring import OpKind
from flexkv.storage.host_pool import HostPool
from flexkv.storage.ssd.gds_queue import GdsEnd
from flexkv.storage.store import TierKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp

_FETCH_SHARE = 4
"""No prefetch begins while 1/4 of the host slots are being read into: running requests need room."""


class Tiering:
    """The lower tiers of a space. Thread safe.

    Parameters
    ----------
    config : CacheConfig
    domain : bytes
        Identity of everything that must be equal for KV to be comparable.
    kinds : sequence of TierKind
        The tiers, the fastest first; at least one.
    on_opened : callable
        Called once, when every store is open or cannot be opened.
    """

    def __init__(
        self, config: CacheConfig, domain: bytes, kinds: Sequence[TierKind],
        on_opened: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_opened = on_opened
        self._num_opening = len(kinds)
        self._tiers = [
            LowerTier(number, kind, config, domain, self._opened) for number, kind in enumerate(kinds, HOST + 1)
        ]
        self._lock = threading.Lock()          # taken before the index's and the data plane's
        self._promotions: dict[int, TransferOp] = {}
        self._num_read: dict[int, int] = {}    # blocks of them from each tier at the last ``abandon_reads_that_hang``
        self._usable_slots = 0
        self._transfer: TransferEngine | None = None

    def _opened(self) -> None:
        with self._lock:
            self._num_opening -= 1
            is_last = self._num_opening == 0
        if is_last:
            self._on_opened()

    @property
    def description(self) -> str:
        """Text about the tiers for the log."""
        return "; ".join(tier.description for tier in self._tiers)

    def grow(self, cache: GlobalCacheEngine, transfer: TransferEngine, pool: HostPool, num_slots: int) -> None:
        """Record that the pool has ``num_slots`` usable slots. The first call opens the stores in the background."""
        with self._lock:
            self._transfer, self._usable_slots = transfer, num_slots
        for tier in self._tiers:
            tier.grow(cache, transfer, pool, num_slots)

    def limit(self, num_slots: int) -> None:
        """Record that the pool shrinks to ``num_slots`` slots."""
        with self._lock:
            self._usable_slots = min(self._usable_slots, num_slots)
        for tier in self._tiers:
            tier.limit(num_slots)

    def attach_gds(self, end: GdsEnd) -> None:
        """Give the first lower tier a rank's socket for GPUDirect Storage; see ``LowerTier.attach_gds``."""
        self._tiers[0].attach_gds(end)

    def reset(self) -> None:
        """Drop the blocks of all lower tiers. The index must have been reset before."""
        for tier in self._tiers:                # a block written while an earlier tier is cleared would be lost
            tier.suspend()
        for tier in self._tiers:
            tier.reset()

    def shutdown(self) -> None:
        """Write the queued blocks, for at most ``DRAIN_S`` seconds. The data plane closes the stores."""
        deadline = drain_deadline()
        for tier in self._tiers:                # all write during the time of the first
            tier.flush()
        for tier in self._tiers:
            tier.shutdown(deadline)

    # ---- gets and puts ----------------------------------------------------------------------------------------

    def begin_get(
        self, cache: GlobalCacheEngine, keys: NDArray[np.uint64], start: int, stop: int, choose: bool, host_only: bool,
        tenant: int = 0,
    ) -> tuple[GetPlan, tuple[Dependency, ...]]:
        """Plan a get with ``cache.begin_get``, whose arguments these are, and start the plan's moves to the host.
        Returns the plan, and the dependencies of its blocks on such moves, its own and those of earlier plans."""
        with self._lock:
            plan = cache.begin_get(keys, start, stop, choose, host_only, tenant)
            promotions = plan.to(HOST)
            for move in promotions:
                self._promotions[move.move_id] = TransferOp(
                    OpKind.STORE2H, move.src, move.dst, keys=move.keys[move.blocks], tier=move.source,
                    checksums=move.checksums,
                )
            needs = tuple(Dependency(self._promotions[join.move_id], join.mine, join.theirs) for join in plan.joins)
            ops = [self._promotions[move.move_id] for move in promotions]
        if self._transfer is not None:
            for move, op in zip(promotions, ops, strict=True):
                graph = TransferGraph(next(self._transfer.task_ids), [op])
                self._transfer.submit(graph, partial(self._promoted, cache, move), background=True)
        if plan.stop > 0:
            self._notify(plan.keys)
        return plan, needs

    def _promoted(self, cache: GlobalCacheEngine, move: Move, graph: TransferGraph) -> None:
        with self._lock:
            cache.end_move(move, graph.ops[0].ok)
            del self._promotions[move.move_id]
        cache.evict_ahead()

    @property
    def promotes_enough(self) -> bool:
        """Whether reads from lower tiers fill 1/``_FETCH_SHARE`` of the host slots, so that no prefetch should
        begin."""
        with self._lock:
            return sum(len(op) for op in self._promotions.values()) * _FETCH_SHARE >= self._usable_slots

    def end_get(self, cache: GlobalCacheEngine, plan: GetPlan, ops: Sequence[TransferOp]) -> None:
        """End the direct moves of a get. ``ops``: their ops, in the order of ``plan.to(DEVICE)``, of a graph that is
        quiesced; empty if the moves did not begin."""
        for i, move in enumerate(plan.to(DEVICE)):
            if ops:
                ok = ops[i].ok
                cache.end_move(move, ok, self._tiers[move.source - 1].lost(move, ok))
            else:
                nothing = np.zeros(len(move), dtype=np.bool_)
                cache.end_move(move, nothing, lost=nothing)

    def put_ended(self, plan: PutPlan) -> None:
        """Report to the lower tiers that the blocks of a put are ready, so that they may write them."""
        self._notify(plan)

    def _notify(self, event: PutPlan | NDArray[np.uint64]) -> None:
        for tier in self._tiers:
            tier.notify(event)

    def abandon_reads_that_hang(self, cache: GlobalCacheEngine) -> None:
        """Evict the blocks of reads that take longer than their tier's read deadline, if no block was read from that
        tier meanwhile. Must be called regularly."""
        with self._lock:
            num_read = dict.fromkeys(range(HOST + 1, len(self._tiers) + 1), 0)
            for op in self._promotions.values():
                num_read[op.tier] += op.num_resolved
            before, self._num_read = self._num_read, num_read
        cache.abandon_reads_that_hang([tier for tier, count in num_read.items() if count > before.get(tier, 0)])

    def run_background_work(self) -> float:
        """Start the writes to all tiers that may start now; returns the seconds until the next call."""
        return min((tier.write() for tier in self._tiers), default=IDLE_S)

    def stats(self) -> dict[str, int]:
        """Counts of the lower tiers; each name begins with the name of its tier."""
        return {name: n for tier in self._tiers for name, n in tier.stats().items()}
