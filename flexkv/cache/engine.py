"""The control plane: one index over the slots of all tiers. It plans and evicts, and moves no bytes."""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.load_or_compute import LoadOrCompute
from flexkv.cache.direct import direct_blocks, direct_gets
from flexkv.cache.lower_tier import LowerTier, TierService
from flexkv.cache.pins import Pins
from flexkv.cache.plan import DEVICE, GetPlan, MatchResult, Move, PutPlan
from flexkv.cache.promotions import Promotions
from flexkv.cache.puts import plan_put
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.cache.sources import Sources, find_sources
from flexkv.cache.tier import HOST, MakePolicy, Tier
from flexkv.cache.write_backs import end_write_back, plan_write_back
from flexkv.protocol.requests import Pin


class GlobalCacheEngine:
    """Index, slots and eviction of the host tier and of the tiers below it.

    Thread safe: every method holds one lock for microseconds; no method waits for a transfer.

    A tier is known by its number: 0 is the host, 1 the first tier below it. A block is *absent*, *writing* or *ready*
    on each tier; only ready blocks are offered. It is writing on a tier while a move to that tier is under way. A block
    that a plan has acquired, or a user has pinned, keeps its slots.

    Parameters
    ----------
    num_slots : int
        Slots of the host tier when the pool is fully grown.
    make_policy : MakePolicy
        Makes an ``EvictionPolicy`` for each tier and tenant.
    evict_start_threshold : float
        Share of the usable slots of a tier in use, above which ``evict_ahead`` frees slots.
    evict_ratio : float
        Share of the usable slots that one such batch frees; 4,096 slots at most.
    clock : callable
        Monotonic time in seconds.
    lower : mapping from str to int, optional
        The tiers below the host, the fastest first: prefix of the tier's statistics, and the maximum number of slots
        that ``attach`` will add.
    quotas : Quotas, optional
        Quotas of namespaces. The number of a quota there is the ``tenant`` of blocks here.
    max_pinned_share : float
        Maximum share of the host slots that users can pin.
    load_or_compute : LoadOrCompute, optional
        Default: loads all blocks.
    """

    def __init__(
        self,
        num_slots: int,
        make_policy: MakePolicy,
        evict_start_threshold: float = 1.0,
        evict_ratio: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        lower: Mapping[str, int] | None = None,
        quotas: Quotas | None = None,
        max_pinned_share: float = 0.5,
        load_or_compute: LoadOrCompute | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._clock = clock
        self._latest = -math.inf
        self._host_slots = SlotAllocator(0, num_slots)
        self._load_or_compute = load_or_compute or LoadOrCompute()
        self._quotas = quotas or Quotas()
        common = make_policy, self._quotas, evict_start_threshold, evict_ratio
        self._host = Tier(HOST, self._host_slots, num_slots, *common)
        capacities = lower or {}
        self._lower = [LowerTier(i, name, n, *common) for i, (name, n) in enumerate(capacities.items(), HOST + 1)]
        self._tiers = [self._host, *self._lower]
        self._max_slots = num_slots + sum(capacities.values())
        self._promotions = Promotions(num_slots if self._lower else 0, self._host, self._lower)
        self._pins = Pins(self._quotas, max_pinned_share)
        self._tree = self._new_tree()
        self._retired: list[RadixTree] = []
        self.epoch = 0                  # number of resets; a plan is valid in the epoch in which it was made

    def _new_tree(self) -> RadixTree:
        # Twice the slots: a block without a slot stays in the index while a block below it is in use.
        tree = RadixTree(2 * self._max_slots, len(self._tiers))
        tree.configure([tier.num_queues for tier in self._tiers], self._quotas.ttl_s)
        return tree

    def _tick(self) -> float:
        """Time of a change, later than the time of every earlier change, so that changes are ordered."""
        self._latest = max(self._clock(), self._latest + 1e-6)
        return self._latest

    def grow(self, num_slots: int) -> None:
        """Raise the number of usable host slots to ``num_slots`` (the pool grows while it is in service)."""
        with self._lock:
            self._host_slots.grow(num_slots)

    def withdraw(self, num_slots: int) -> bool:
        """Allocate no host slot from ``num_slots`` on any more, and evict a bounded number of the blocks there. Must be
        called until it returns True: none of these slots is in use then. ``grow`` makes them usable again."""
        with self._lock:
            self._host_slots.withdraw(min(num_slots, self._host_slots.bound))
            self._host.withdraw(self._tree, num_slots)
            return self._host_slots.settle()

    # ---- get --------------------------------------------------------------------------------------------------

    def match(self, keys: NDArray[np.uint64], start: int = 0, tenant: int = 0) -> MatchResult:
        """Count the leading blocks of ``keys`` ((n, 2) uint64) that are available. Changes nothing.

        ``start``: first block that the request wants. Blocks before it must be ready on any tier, and are not loaded.
        """
        with self._lock:
            match = self._tree.match(keys, self._clock(), tenant)
            start = min(start, match.num_ready)
            found = self._sources(keys, match, start, choose=True)
        return MatchResult(found.stop, found.reason, len(found.slow), found.evicted_at)

    def _sources(
        self, keys: NDArray[np.uint64], match: Match, start: int, choose: bool, host_only: bool = False
    ) -> Sources:
        return find_sources(
            self._tree, self._lower, self._promotions, self._load_or_compute, keys, match, start, choose, host_only
        )

    def begin_get(
        self, keys: NDArray[np.uint64], start: int, stop: int, choose: bool = True, host_only: bool = False,
        tenant: int = 0,
    ) -> GetPlan:
        """Acquire the leading blocks of ``[start, stop)`` that are available. The plan ends at the first unavailable
        block and may be empty.

        Blocks that are on a lower tier alone get host slots, unless that tier loads directly. The load must wait for
        the moves that fill these slots (``joins``). The caller must start the plan's ``moves`` to the host; each must
        be passed to ``end_move`` once.

        ``choose``: end before blocks that the engine computes faster than they load. ``host_only``: end before blocks
        that are not ready on the host.

        Every plan must be passed to ``end_get`` once; its ``moves`` to DEVICE to ``end_move`` before that.
        """
        with self._lock:
            keys, now = keys[:stop], self._tick()
            match = self._tree.match(keys, now, tenant)
            start = min(start, match.num_ready)
            found = self._sources(keys, match, start, choose, host_only)
            try:
                self._tree.acquire(keys, start, found.stop)
            except MemoryError:                  # CapacityError is one
                found.abandon(start)
            moves: tuple[Move, ...] = ()
            if joins := len(found.slow) > 0:
                direct = direct_blocks(self._lower, match, found)
                if len(slow := found.slow[direct == HOST]):
                    short, moves = self._promotions.begin(self._tree, keys, match, found.slots, slow, tenant, now)
                    if short < found.stop:
                        self._tree.release(keys, short, found.stop)
                        found.end(short, MissReason.NO_ROOM)
                moves = (*moves, *direct_gets(self._tree, self._lower, keys, match, found, direct))
            keys, slots = keys[: found.stop], found.slots[start : found.stop]
            self._use(keys, now, tenant)
            plan = GetPlan(
                keys, start, found.stop, slots, found.reason, self._tree, moves,
                self._promotions.joins(slots) if joins else (), found.evicted_at, self._host_slots.generations(slots),
            )
            if plan.joins:
                self._promotions.join(plan)
            return plan

    def end_get(self, plan: GetPlan, loaded: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        """Release the blocks of ``plan``. Its slots must not be read any more. Its moves to the host continue.

        Returns a mask ((n,) bool) of the ``loaded`` blocks ((n,) bool) whose slots were freed during the load. Their
        KV must not be used. None: there are no such blocks, or the plan has ended already.
        """
        with self._lock:
            if self._host.stale.has_ended(plan.read, plan.slots, "read"):
                return None
            stale = self._host.stale.end_read(self._host_slots, plan, loaded)
            plan.tree.release(plan.keys, plan.start, plan.stop)
            if plan.joins:
                self._promotions.leave(plan)
            self._sweep_retired()
            return stale

    @property
    def loads_directly(self) -> bool:
        """Whether gets read blocks of any lower tier straight into the engine's pages."""
        return any(tier.loads_directly for tier in self._lower)

    # ---- moves ------------------------------------------------------------------------------------------------

    def begin_read(self, move: Move) -> None:
        """Record that the reads of a move from a lower tier to DEVICE have begun."""
        with self._lock:
            self._lower[move.source - 1].begin_read(move)

    def end_move(self, move: Move, ok: NDArray[np.bool_], lost: NDArray[np.bool_] | None = None) -> None:
        """End a move of a get, or a write-back. No transfer may access its slots any more.

        Blocks that are ``ok`` ((m,) bool) become ready on the target, the others absent there. Blocks that are ``lost``
        ((m,) bool; default: those that a read from a lower tier did not move) become absent on the source.
        """
        with self._lock:
            if move.target == DEVICE:
                self._lower[move.source - 1].end_read(move, int(ok.sum()), ~ok if lost is None else lost)
            elif move.target == HOST:
                self._promotions.end(move, ok, lost, self._clock())
            else:
                end_write_back(move, self._host, self._lower[move.target - 1], ok)
            self._sweep_retired()

    # ---- put --------------------------------------------------------------------------------------------------

    def begin_put(
        self, keys: NDArray[np.uint64], start: int, stop: int, tenant: int = 0, direct: bool = False
    ) -> PutPlan:
        """Allocate host slots for the absent blocks of ``[start, stop)``; evicts other blocks if none is free.

        The plan skips blocks that are ready on any tier, or that another request is writing. It is shorter, or empty,
        if slots run out or a block before ``start`` is absent. ``direct``: if there are too few host slots, the first
        blocks get slots on a lower tier that saves directly, if there is one. Every plan must be passed to ``end_put``
        once.
        """
        with self._lock:
            plan = plan_put(self._tree, self._host, self._lower, keys[:stop], start, tenant, direct, self._tick)
            if len(plan) or (len(plan.keys) and math.isfinite(self._quotas.ttl_s[tenant])):
                self._use(plan.keys, self._latest, tenant, hit=False)          # starts their ttl_s again
            return plan

    def _use(self, keys: NDArray[np.uint64], now: float, tenant: int, hit: bool = True) -> None:
        with suppress(MemoryError):              # recording a use may allocate; the plan must survive a failure
            self._tree.touch(keys, now, hit, tenant)
            for tier in self._tiers:
                tier.used(self._tree)

    def end_put(self, plan: PutPlan, written: NDArray[np.bool_]) -> None:
        """End a put: ``written`` blocks ((m,) bool) become ready, the others absent. No transfer may write to the slots
        of ``plan`` any more."""
        with self._lock:
            for move in plan.moves:
                self._tiers[move.target].end_writing(move, written[plan.where(move)])
            self._sweep_retired()

    # ---- lower tiers ------------------------------------------------------------------------------------------

    def has_slot(self, tier: int, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: whether each block has a slot on a tier, ready or being written."""
        with self._lock:
            return np.asarray(self._tree.slots(keys, tier) >= 0)

    def room(self, tier: int, keys: NDArray[np.uint64]) -> tuple[int, int]:
        """Tenant of a sequence, and number of slots that this tenant can take on a tier without eviction."""
        with self._lock:
            tenant = self._tree.tenant_of(keys)
            return tenant, self._tiers[tier].room(self._tree, tenant)

    def begin_write_back(self, tier: int, keys: NDArray[np.uint64], limit: int) -> Move | None:
        """Allocate slots of a lower tier for up to ``limit`` leading blocks that are ready on the host and absent on
        that tier.

        Returns None if there is no such block, or no slot. Every move must be passed to ``end_move`` once.
        """
        with self._lock:
            below = self._lower[tier - 1]
            if not below.is_usable:
                return None
            return plan_write_back(self._tree, self._host, below, keys, limit, self._tick())

    def erased(self, move: Move) -> None:
        """Free the slots ``move.to_erase`` of a write-back that has ended. Must be called once they were erased."""
        with self._lock:
            self._tiers[move.target].release(move)

    def attach(
        self, tier: int, service: TierService, chains: Iterable[tuple[NDArray[np.uint64], NDArray[np.int32]]] = ()
    ) -> bool:
        """Put a lower tier into service, with the blocks that it holds.

        Must be called before the tier's first ``begin_write_back``. The lock is released after each chain.

        ``chains``: sequences ((n, 2) uint64) from their first block, and the slot of each block ((n,) int32; -1: the
        block was in an earlier chain). These slots must be allocated. A sequence is skipped, and its slots are freed,
        if blocks before it were evicted meanwhile or the index has no room for it.

        Returns False if the index was reset at any time. The caller then owns the slots of the remaining ``chains``.
        """
        with self._lock:
            self._lower[tier - 1].attach(service)
            self._host.removal_reason = MissReason.NOT_ADMITTED
        for keys, slots in chains:
            with self._lock:
                if self.epoch:
                    return False
                self._lower[tier - 1].recover(self._tree, keys, slots, self._tick())
        return True

    def free(self, tier: int, slots: NDArray[np.int32]) -> None:
        """Free slots ((n,) int32) of recovered blocks that did not enter the index."""
        with self._lock:
            self._tiers[tier].slots.free(slots)

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        """Set the speed of the engine's prefill, which decides whether blocks are loaded or computed; 0: unknown."""
        with self._lock:
            self._load_or_compute.prefill_tokens_per_s = tokens_per_s

    # ---- pins -------------------------------------------------------------------------------------------------

    def pin(self, keys: NDArray[np.uint64], name: str, tenant: int = 0) -> Pin:
        """Pin the leading blocks of ``keys`` that are cached, on any tier, until ``unpin`` or ``reset``. Raises
        PinError."""
        with self._lock:
            now = self._tick()
            keys = keys[: self._tree.match(keys, now, tenant).num_ready]
            pin = self._pins.add(self._tree, keys, name, tenant, self._host.slots.capacity)
            self._use(keys, now, tenant, hit=False)
            return pin

    def unpin(self, name: str) -> Pin:
        """Unpin: the blocks can be evicted again. Raises PinError."""
        with self._lock:
            return self._pins.remove(self._tree, name)

    def pins(self) -> list[Pin]:
        """All pins, oldest first."""
        with self._lock:
            return self._pins.list()

    # ---- eviction, reset --------------------------------------------------------------------------------------

    def evict_ahead(self) -> int:
        """Evict expired blocks, blocks beyond a quota, and a batch of blocks on each tier whose share of slots in use
        exceeds ``evict_start_threshold``. Returns the number of slots freed. Not for the request path."""
        with self._lock:
            now = self._tick()
            freed = self._host.evict_ahead(self._tree, now)
            for tier in self._lower:
                if tier.is_usable:               # else eviction would free no usable slot
                    freed += tier.evict_ahead(self._tree, now)
            return freed

    def abandon_reads_that_hang(self, progressed: Collection[int] = ()) -> None:
        """Evict blocks that a lower tier does not deliver in time (``TierService.read_deadline_s``). ``progressed``:
        tiers from which a block was read since the last call."""
        with self._lock:
            self._promotions.abandon_overdue(self._tick(), progressed)

    def reset(self) -> None:
        """Drop every block. Plans in flight remain valid, but their blocks are not offered any more."""
        with self._lock:
            self._pins.clear(self._tree)
            self._retired.append(self._tree)
            for tier in self._tiers:
                tier.start_over()
            self._tree = self._new_tree()
            self.epoch += 1
            self._sweep_retired()

    def _sweep_retired(self) -> None:
        for tree in self._retired[:]:
            for tier in self._tiers:
                tier.sweep(tree)
            if tree.num_blocks == 0:
                self._retired.remove(tree)

    # ---- statistics -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Current blocks, slots and bytes of the index; blocks evicted since the start."""
        with self._lock:
            stats = {
                "num_slots": self._host.slots.capacity,
                "indexed_blocks": self._tree.num_blocks,
                "index_bytes": self._tree.memory_bytes,
                "pinned_blocks": sum(self._pins.blocks),
                **self._host.stats(self._tree, ""),
            }
            if self._lower:
                stats["blocks_being_fetched"] = self._promotions.num_blocks
            for tier in self._lower:
                stats[f"{tier.name}_slots"] = tier.slots.capacity
                stats |= tier.stats(self._tree, f"{tier.name}_")
            return stats

    def check_integrity(self) -> None:
        """Raise InvariantError unless every slot of each tier is free, belongs to exactly one block, or is in limbo."""
        with self._lock:
            held = [tree.check_integrity() for tree in [self._tree, *self._retired]]
            for tier in self._tiers:
                tier.check_integrity(np.concatenate([slots[tier.number] for slots in held]))
