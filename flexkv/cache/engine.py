"""The control plane: one index over the slots of all tiers. It plans and evicts, and moves no bytes."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.direct import direct_get, lose
from flexkv.cache.fetches import FetchTable
from flexkv.cache.pins import Pins
from flexkv.cache.plan import DirectPlan, FetchPlan, GetPlan, MatchResult, PutPlan, WritePlan
from flexkv.cache.puts import plan_put
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.cache.sources import find_sources
from flexkv.cache.tier import HOST, SSD, MakePolicy, SsdTier, Tier, no_slots
from flexkv.cache.writes import plan_write
from flexkv.errors import CapacityError
from flexkv.protocol.requests import Pin


class GlobalCacheEngine:
    """Index, slots and eviction of the host tier and of the SSD tier below it, if there is one.

    Thread safe: every method holds one lock for microseconds; no method waits for a transfer.

    A block is *absent*, *writing* or *ready* on each tier; only ready blocks are offered. On the host it is writing
    between ``begin_put`` and ``end_put``, and between ``begin_get`` and ``end_fetch`` if it comes from SSD; on SSD
    between ``begin_write`` and ``end_write``. A block that a plan has acquired, or a user has pinned, keeps its slots.

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
    num_ssd_slots : int
        Maximum number of slots of the SSD tier that ``attach_ssd`` will add; 0: there will be none.
    quotas : Quotas, optional
        Quotas of namespaces. The number of a quota there is the ``tenant`` of blocks here.
    max_pinned_share : float
        Maximum share of the host slots that users can pin.
    """

    def __init__(
        self,
        num_slots: int,
        make_policy: MakePolicy,
        evict_start_threshold: float = 1.0,
        evict_ratio: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        num_ssd_slots: int = 0,
        quotas: Quotas | None = None,
        max_pinned_share: float = 0.5,
    ) -> None:
        self._lock = threading.RLock()
        self._clock = clock
        self._latest = -math.inf
        self._host_slots = SlotAllocator(0, num_slots)
        self._max_slots = num_slots + num_ssd_slots
        self._quotas = quotas or Quotas()
        common = make_policy, self._quotas, evict_start_threshold, evict_ratio
        self._host = Tier(HOST, self._host_slots, num_slots, *common)
        self._below = Tier(SSD, no_slots(), num_ssd_slots, *common)
        self._tiers = [self._host, self._below] if num_ssd_slots else [self._host]
        self._ssd: SsdTier | None = None
        self._fetches = FetchTable(num_slots if num_ssd_slots else 0)
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

    # ---- get --------------------------------------------------------------------------------------------------

    def match(self, keys: NDArray[np.uint64], start: int = 0, tenant: int = 0) -> MatchResult:
        """Count the leading blocks of ``keys`` ((n, 2) uint64) that are available. Changes nothing.

        ``start``: first block that the request wants. Blocks before it must be ready on any tier, and are not loaded.
        """
        with self._lock:
            match = self._tree.match(keys, self._clock(), tenant)
            start = min(start, match.num_ready)
            found = find_sources(self._tree, self._ssd, self._fetches, keys, match, start, choose=True)
        return MatchResult(found.stop, found.reason, len(found.slow), found.evicted_at)

    def begin_get(
        self, keys: NDArray[np.uint64], start: int, stop: int, choose: bool = True, host_only: bool = False,
        tenant: int = 0, direct: bool = False,
    ) -> GetPlan:
        """Acquire the leading blocks of ``[start, stop)`` that are available. The plan ends at the first unavailable
        block and may be empty.

        Blocks that are on SSD alone get host slots. The load must wait for the fetches that fill these slots
        (``joins``). The blocks that no earlier fetch reads are in ``fetch``, which the caller must start.

        ``choose``: skip blocks that the engine computes faster than they load. ``host_only``: skip blocks that are not
        ready on the host. ``direct``: SSD blocks are returned in ``direct`` and not read into host slots.

        Every plan must be passed to ``end_get`` once; its ``direct``, if any, to ``end_direct_get`` before that.
        """
        with self._lock:
            keys, now = keys[:stop], self._tick()
            match = self._tree.match(keys, now, tenant)
            start = min(start, match.num_ready)
            found = find_sources(self._tree, self._ssd, self._fetches, keys, match, start, choose, host_only)
            try:
                self._tree.acquire(keys, start, found.stop)
            except MemoryError:                  # CapacityError is one
                found.abandon(start)
            fetch, straight = None, direct_get(self._tree, self._below, keys, match, found) if direct else None
            if len(found.slow) and self._ssd is not None and not direct:
                short, fetch = self._fetches.begin(
                    self._tree, self._host, self._ssd, keys, match, found.slots, found.slow, tenant, now
                )
                if short < found.stop:
                    self._tree.release(keys, short, found.stop)
                    found.end(short, MissReason.NO_ROOM)
            keys, slots = keys[: found.stop], found.slots[start : found.stop]
            self._use(keys, now, tenant)
            joins = self._fetches.joins(slots) if len(found.slow) else ()
            return GetPlan(
                keys, start, found.stop, slots, found.reason, self._tree, fetch, joins, found.evicted_at, straight,
                self._host_slots.generations(slots),
            )

    def end_get(self, plan: GetPlan, loaded: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        """Release the blocks of ``plan``. Its slots must not be read any more. Its fetch continues.

        Returns a mask ((n,) bool) of the ``loaded`` blocks ((n,) bool) whose slots were freed during the load. Their
        KV must not be used. None: there are no such blocks, or the plan has ended already.
        """
        with self._lock:
            if self._host.stale.has_ended(plan.read, plan.slots, "read"):
                return None
            stale = self._host.stale.end_read(self._host_slots, plan, loaded)
            plan.tree.release(plan.keys, plan.start, plan.stop)
            self._sweep_retired()
            return stale

    def end_fetch(self, plan: FetchPlan, arrived: NDArray[np.bool_]) -> None:
        """End a fetch: blocks that ``arrived`` ((m,) bool) become ready on the host, the others absent on both tiers.
        No transfer may access the slots of ``plan`` any more."""
        with self._lock:
            if self._host.stale.has_ended(plan.filled, plan.host_slots, "fetch"):
                return
            self._fetches.remove(plan)
            if self._ssd is not None:
                self._ssd.load_or_compute.read_ended(int(arrived.sum()))
            self._host.end_writing(plan, plan.host_slots, arrived)
            lose(self._below, plan, ~arrived)
            plan.tree.release(plan.keys, int(plan.blocks[0]), len(plan.keys))
            self._sweep_retired()

    def begin_direct_get(self) -> None:
        """Note that the reads of a plan's ``direct`` have begun."""
        with self._lock:
            if self._ssd is not None:
                self._ssd.load_or_compute.read_began()

    def end_direct_get(self, plan: DirectPlan, num_read: int | None, lost: NDArray[np.bool_]) -> None:
        """End direct reads: ``lost`` blocks ((m,) bool) become absent on SSD. ``num_read``: number of blocks read;
        None if the reads had not begun."""
        with self._lock:
            if self._ssd is not None and num_read is not None:
                self._ssd.load_or_compute.read_ended(num_read)
            lose(self._below, plan, lost)

    # ---- put --------------------------------------------------------------------------------------------------

    def begin_put(
        self, keys: NDArray[np.uint64], start: int, stop: int, tenant: int = 0, direct: bool = False
    ) -> PutPlan:
        """Allocate host slots for the absent blocks of ``[start, stop)``; evicts other blocks if none is free.

        The plan skips blocks that are ready on any tier, or that another request is writing. It is shorter, or empty,
        if slots run out or a block before ``start`` is absent. ``direct``: if there are too few host slots, the first
        blocks get SSD slots, as many as are available. Every plan must be passed to ``end_put`` once.
        """
        with self._lock:
            plan = plan_put(
                self._tree, self._host, self._below, self._ssd, keys[:stop], start, tenant, direct, self._tick
            )
            if len(plan.all_blocks) or (len(plan.keys) and math.isfinite(self._quotas.ttl_s[tenant])):
                self._use(plan.all_keys, self._latest, tenant, hit=False)      # starts their ttl_s again
            return plan

    def _use(self, keys: NDArray[np.uint64], now: float, tenant: int, hit: bool = True) -> None:
        with suppress(MemoryError):              # recording a use may allocate; the plan must survive a failure
            self._tree.touch(keys, now, hit, tenant)
            for tier in self._tiers:
                tier.used(self._tree)

    def end_put(self, plan: PutPlan, written: NDArray[np.bool_]) -> None:
        """End a put: ``written`` blocks ((m,) bool, of ``all_blocks``) become ready, the others absent. No transfer may
        write to the slots of ``plan`` any more."""
        with self._lock:
            self._host.end_writing(plan, plan.slots, written[plan.where(plan)])
            if plan.direct is not None:
                self._below.end_writing(plan.direct, plan.direct.ssd_slots, written[plan.where(plan.direct)])
            self._sweep_retired()

    # ---- write-back -------------------------------------------------------------------------------------------

    def on_ssd(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: whether each block has a slot on SSD, ready or being written."""
        with self._lock:
            return np.asarray(self._tree.slots(keys, SSD) >= 0)

    def ssd_room(self, keys: NDArray[np.uint64]) -> tuple[int, int]:
        """Tenant of a sequence, and number of its blocks that SSD can take without eviction."""
        with self._lock:
            tenant = self._tree.tenant_of(keys)
            return tenant, self._below.room(self._tree, tenant)

    def begin_write(self, keys: NDArray[np.uint64], limit: int) -> WritePlan | None:
        """Allocate SSD slots for up to ``limit`` leading blocks that are ready on the host and absent on SSD.

        Returns None if there is no such block, or no slot. Every plan must be passed to ``end_write`` once.
        """
        with self._lock:
            if self._ssd is None or not self._ssd.usable():
                return None
            return plan_write(self._tree, self._host, self._below, keys, limit, self._tick())

    def end_write(self, plan: WritePlan, written: NDArray[np.bool_]) -> None:
        """End a write-back: ``written`` blocks ((m,) bool) become ready on SSD, the others absent there. No transfer
        may access the slots of ``plan`` any more."""
        with self._lock:
            if self._host.stale.has_ended(plan.read, plan.host_slots, "write-back"):
                return
            stale = self._host.stale.find(self._host_slots, plan.host_slots, plan.read, "write-back")
            plan.read = None
            self._below.end_writing(plan, plan.ssd_slots, written if stale is None else written & ~stale)
            plan.tree.release(plan.keys, int(plan.blocks[0]), len(plan.keys))
            self._sweep_retired()

    # ---- the SSD tier -----------------------------------------------------------------------------------------

    def attach_ssd(
        self, tier: SsdTier, chains: Iterable[tuple[NDArray[np.uint64], NDArray[np.int32]]] = ()
    ) -> bool:
        """Put the SSD tier into service, with the blocks that it holds.

        Must be called before the first ``begin_write``. The lock is released after each chain.

        Parameters
        ----------
        tier : SsdTier
        chains : iterable of (keys, slots)
            Sequences ((n, 2) uint64) from their first block, and the slot of each block ((n,) int32; -1: the block was
            in an earlier chain). These slots must be allocated. A sequence is skipped, and its slots are freed, if
            blocks before it were evicted meanwhile or the index has no room for it.

        Returns
        -------
        bool
            False if the index was reset at any time. The caller then owns the slots of the remaining ``chains``.
        """
        with self._lock:
            self._ssd = tier
            self._below.slots = tier.slots
            self._host.removal_reason = MissReason.NOT_ADMITTED
        for keys, slots in chains:
            with self._lock:
                if self.epoch:
                    return False
                absent = self._tree.absent(keys)
                fits = not (slots[absent] < 0).any()
                if fits:
                    with suppress(CapacityError):
                        self._tree.insert(keys, slots, SSD, self._tick())
                    fits = self._tree.set_ready(keys, slots, SSD) > 0 or not (slots >= 0).any()
                if not fits:
                    tier.slots.free(slots[slots >= 0])
        return True

    def free_ssd(self, slots: NDArray[np.int32]) -> None:
        """Free SSD slots of recovered blocks that are not used."""
        with self._lock:
            self._below.slots.free(slots)

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
        """All pins."""
        with self._lock:
            return self._pins.list()

    # ---- eviction, reset --------------------------------------------------------------------------------------

    def evict_ahead(self) -> int:
        """Evict expired blocks, blocks beyond a quota, and a batch of blocks on each tier whose share of slots in use
        exceeds ``evict_start_threshold``. Returns the number of slots freed. Not for the request path."""
        with self._lock:
            now = self._tick()
            freed = self._host.evict_ahead(self._tree, now)
            if self._ssd is not None and self._ssd.usable():     # if not usable, eviction would free no usable slot
                freed += self._below.evict_ahead(self._tree, now)
            return freed

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
            if len(self._tiers) > 1:
                stats |= {
                    "ssd_slots": self._below.slots.capacity,
                    "blocks_being_fetched": self._fetches.num_blocks,
                    **self._below.stats(self._tree, "ssd_"),
                }
            return stats

    def check_integrity(self) -> None:
        """Check that every slot of each tier is free or belongs to exactly one block: free + indexed = total.

        Raises
        ------
        InvariantError
        """
        with self._lock:
            held = [tree.check_integrity() for tree in [self._tree, *self._retired]]
            for tier in self._tiers:
                tier.check_integrity(np.concatenate([slots[tier.number] for slots in held]))
