"""One tier: its slots, and the eviction of blocks when the slots run out."""

import math
import sys
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.eviction import Pieces
from flexkv._core.index.eviction_queues import EvictionQueues
from flexkv._core.index.radix import RadixTree
from flexkv.cache.eviction import Choice, EvictionPolicy
from flexkv.cache.plan import Move
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.cache.stale import StaleResults
from flexkv.errors import InvariantError
from flexkv.storage.limbo import Limbo
from flexkv.storage.store import Slots

HOST = 0
"""Tier number of CPU memory in the index."""

MakePolicy = Callable[[int], EvictionPolicy]
"""``make_policy(capacity)``: a policy for a tier of ``capacity`` blocks."""

_THE_ONLY_QUEUE = Choice()

_NO_KEYS = np.zeros((0, 2), dtype=np.uint64)

_MOST_AT_ONCE = 4096
"""Maximum number of blocks that one call evicts ahead of need. Requests wait for the index meanwhile; the bound keeps
that wait independent of the size of the tier."""

_EXPIRE_NODES = 2000
"""Number of nodes that one sweep examines for expired blocks: few enough that requests do not notice the sweep."""


class Tier:
    """Slots of one tier of the index. The caller must hold the engine's lock.

    Three arguments occur in many methods: ``tree``, the index whose blocks have the slots; ``now``, the time in seconds
    on the engine's clock; ``tenant``, the number of a quota.

    Parameters
    ----------
    number : int
        Position in the engine's list of tiers; 0 is ``HOST``.
    slots : Slots
    capacity : int
        Maximum number of slots of the tier.
    make_policy : MakePolicy
    quotas : Quotas
    start_threshold : float
        Share of the slots in use, above which ``evict_ahead`` frees slots.
    ratio : float
        Share of the slots that one batch frees, up to ``_MOST_AT_ONCE``.
    """

    def __init__(
        self,
        number: int,
        slots: Slots,
        capacity: int,
        make_policy: MakePolicy,
        quotas: Quotas,
        start_threshold: float,
        ratio: float,
    ) -> None:
        self.number = number
        self.slots = slots
        self.removal_reason = MissReason.EVICTED
        """Reason recorded for blocks that are evicted for want of room and are on no other tier."""
        self.stale = StaleResults(number)
        self.limbo = Limbo()
        self.checksums = np.zeros(capacity, dtype=np.uint64)
        """XXH3-64 of the block in each slot, from the first write to a lower tier on; 0: not computed yet."""
        self.num_altered = 0
        self._evicted = self._expired = 0
        self._capacity = max(1, capacity)
        self._make_policy = make_policy
        self._quotas = quotas
        self._start_threshold = start_threshold
        self._ratio = ratio
        self.start_over()

    def start_over(self) -> None:
        """Replace the policies by new ones, without records of earlier uses."""
        self._policies = [self._make_policy(self._capacity) for _ in range(len(self._quotas))]

    @property
    def num_queues(self) -> int:
        """Number of queues of the tier's policy."""
        return self._policies[0].num_queues

    def take(
        self, tree: RadixTree, count: int, tenant: int, now: float, keep: NDArray[np.uint64] = _NO_KEYS
    ) -> NDArray[np.int32]:
        """Allocate ``count`` slots for blocks of a tenant, or as many as are available. Evicts blocks if too few slots
        are free, or the tenant has too many. Allocates none if the tier is taken offline during the call.
        Returns the slots ((k,) int32, k <= ``count``). ``keep``: as in ``make_room``."""
        count = self.make_room(tree, count, tenant, now, keep)
        slots = self.slots.allocate(min(count, self.slots.num_free))
        return np.zeros(0, dtype=np.int32) if slots is None else slots

    def make_room(
        self, tree: RadixTree, count: int, tenant: int, now: float, keep: NDArray[np.uint64] = _NO_KEYS
    ) -> int:
        """Evict until ``count`` slots are free for a tenant, or no block is evictable. Returns the number of slots that
        the tenant's quota allows it to take, ``count`` at most.

        ``keep`` ((n, 2) uint64): the blocks of this sequence are not evicted.
        """
        tree.acquire(keep, 0, len(keep))
        try:
            return self._make_room(tree, count, tenant, now)
        finally:
            tree.release(keep, 0, len(keep))

    def _make_room(self, tree: RadixTree, count: int, tenant: int, now: float) -> int:
        limit = self.limit(tenant)
        if limit < self.slots.capacity:
            count = min(count, limit)
            self._trim(tree, tenant, limit - count, now)
            count = max(0, min(count, limit - self._used(tree, tenant)))
        if count > self.slots.num_free:
            self.evict(tree, max(count - self.slots.num_free, self._batch()), now, tenant)
        return count

    def place(self, move: Move, now: float, tenant: int = 0) -> bool:
        """Enter the blocks of a move to this tier, and their slots, into the index, in state writing. False: the index
        is full, or memory is exhausted; the slots are freed then, and nothing else changes."""
        try:
            move.tree.insert(move.keys, move.by_position(move.dst), self.number, now, tenant)
        except MemoryError:                        # CapacityError is one
            self.slots.free(move.dst)
            return False
        move.filled = self.slots.generations(move.dst)
        self.set_checksums(move.dst, np.zeros(len(move), dtype=np.uint64))
        return True

    def displace(self, move: Move) -> None:
        """Undo ``place``: the blocks become absent, and their slots are freed."""
        move.tree.drop(move.keys, move.by_position(move.dst), self.number)
        self.slots.free(move.dst)

    def end_writing(self, move: Move, ok: NDArray[np.bool_]) -> None:
        """Make the blocks of a move to this tier that are ``ok`` ready, and the others absent. A result for slots that
        were freed meanwhile is refused. Slots that must be erased are not freed."""
        # This holds after a reset too: the retired tree offers no block, and frees a slot once no plan reads it.
        stale = self.stale.find(self.slots, move.dst, move.filled, "write")
        move.filled = None                           # a second result of this move is refused
        ok, failed = (ok, ~ok) if stale is None else (ok & ~stale, ~ok & ~stale)
        if ok.any():
            self.set_checksums(move.dst[ok], self._checksums_of(move)[ok])
            move.tree.set_ready(move.keys, move.by_position(move.dst, ok), self.number)
        if failed.any():
            move.tree.drop(move.keys, move.by_position(move.dst, failed), self.number, failed=True)
            self.slots.free(np.setdiff1d(move.dst[failed], move.to_erase, assume_unique=True))

    def set_checksums(self, slots: NDArray[np.int32], checksums: NDArray[np.uint64]) -> None:
        """Record the checksums ((n,) uint64; 0: unknown) of the blocks in slots ((n,) int32)."""
        if len(slots) and (last := int(slots.max())) >= len(self.checksums):      # more slots than were announced
            self.checksums = np.concatenate([self.checksums, np.zeros(last + 1 - len(self.checksums), np.uint64)])
        self.checksums[slots] = checksums

    def _checksums_of(self, move: Move) -> NDArray[np.uint64]:
        """(m,) uint64: checksums of the blocks of a move to this tier that has ended."""
        return move.checksums if len(move.checksums) else np.zeros(len(move), dtype=np.uint64)

    def release(self, holder: Hashable) -> None:
        """End the hold of a transfer or plan on slots in limbo; frees the slots that have no other holder."""
        self.slots.free(self.limbo.release(holder))

    def limit(self, tenant: int) -> int:
        """Maximum number of slots of a tenant."""
        return self._quotas.limit(tenant, self.slots.capacity)

    def has_room(self, tree: RadixTree, count: int, tenant: int) -> bool:
        """Whether ``count`` slots can be allocated for a tenant without eviction."""
        limit, capacity = self.limit(tenant), self.slots.capacity
        return count <= self.slots.num_free and (limit == capacity or self._used(tree, tenant) + count <= limit)

    def room(self, tree: RadixTree, tenant: int) -> int:
        """Number of slots that a tenant can take without an eviction, either at once or by the next ``evict_ahead``.

        The free slots that a batch of evictions leaves do not count, because taking them would trigger the next batch.
        """
        limit, capacity = self.limit(tenant), self.slots.capacity
        kept_free = capacity - int(self._start_threshold * capacity) + self._batch()
        room = self.slots.num_free - kept_free
        return max(0, room if limit == capacity else min(room, limit - self._used(tree, tenant)))

    def _used(self, tree: RadixTree, tenant: int) -> int:
        return int(tree.eviction_queues(self.number).blocks()[tenant].sum())

    def _trim(self, tree: RadixTree, tenant: int, most: int, now: float, limit: int = sys.maxsize) -> int:
        """Evict blocks of a tenant until it has ``most`` blocks; ``limit`` blocks at most."""
        excess = min(limit, self._used(tree, tenant) - most)
        if excess <= 0:
            return 0
        freed = self.reclaim(tree, excess, tenant)
        if freed == excess:
            return freed
        self._update_priorities(tree)
        return freed + self._evict_from(tree, tenant, excess - freed, now, MissReason.OVER_QUOTA)

    def evict_ahead(self, tree: RadixTree, now: float) -> int:
        """Evict a bounded number of expired blocks and of blocks beyond a quota, and a batch of blocks if the share of
        slots in use exceeds the threshold; returns the number of slots freed."""
        self.slots.free(self.limbo.expire(now))
        freed, capacity = self._sweep_expired(tree, now), self.slots.capacity
        for tenant in range(len(self._quotas)):       # recovered blocks count for tenant 0 until they are used
            if (limit := self.limit(tenant)) < capacity:
                freed += self._trim(tree, tenant, limit, now, _MOST_AT_ONCE)
        if capacity - self.slots.num_free <= self._start_threshold * capacity:
            return freed
        return freed + self.evict(tree, max(1, self._batch()), now)

    def _sweep_expired(self, tree: RadixTree, now: float) -> int:
        if not any(math.isfinite(ttl_s) for ttl_s in self._quotas.ttl_s):
            return 0
        expired = tree.expire(self.number, now, _EXPIRE_NODES, _MOST_AT_ONCE)
        self.slots.free(expired)
        self._expired += len(expired)
        return len(expired)

    def _batch(self) -> int:
        return min(_MOST_AT_ONCE, int(self._ratio * self.slots.capacity))

    # ---- the policy -------------------------------------------------------------------------------------------

    def used(self, tree: RadixTree) -> None:
        """Report the nodes that were used since the last report to the policy, once there are ``max_waiting`` of
        them."""
        if tree.eviction_queues(self.number).num_waiting >= self._policies[0].max_waiting:
            self._update_priorities(tree)

    def _update_priorities(self, tree: RadixTree) -> None:
        queues = tree.eviction_queues(self.number)
        if queues.num_waiting == 0:
            return
        events = queues.drain()
        try:
            if len(self._policies) == 1:
                self._place(queues, self._policies[0], events)
                return
            for tenant in np.unique(events["tenant"]):
                mine = events["tenant"] == tenant
                part = events[mine]
                self._place(queues, self._policies[tenant], part)
                events[mine] = part
        finally:
            queues.place(events)

    @staticmethod
    def _place(queues: EvictionQueues, policy: EvictionPolicy, events: NDArray[np.void]) -> None:
        if policy.ghosts is not None:
            policy.returned(events, queues.returned(events, policy.ghosts))
        policy.place(events)

    def evict(self, tree: RadixTree, want: int, now: float, tenant: int | None = None) -> int:
        """Free up to ``want`` slots: first slots of blocks that no match can reach, then by quota and policy.
        ``tenant``: tenant that needs the slots; None: none. Returns the number of slots freed."""
        freed = self.reclaim(tree, want)
        if freed >= want:
            return freed
        self._update_priorities(tree)
        if len(self._policies) == 1:
            return freed + self._evict_from(tree, 0, want - freed, now, self.removal_reason)
        used = tree.eviction_queues(self.number).blocks().sum(axis=1)
        for victim, most in self._quotas.victims(used, self.slots.capacity, tenant):
            freed += self._evict_from(tree, victim, min(want - freed, most), now, self.removal_reason)
            if freed >= want:
                break
        return freed

    def reclaim(self, tree: RadixTree, want: int, tenant: int = -1) -> int:
        """Free up to ``want`` slots of blocks that no match can reach, because they follow a block that is on no tier.
        ``tenant``: only of its blocks; -1: of all. Returns the number of slots freed."""
        if tree.num_holes == 0:
            return 0
        slots = tree.reclaim(self.number, want, tenant)
        self.slots.free(slots)
        self._evicted += len(slots)
        return len(slots)

    def _evict_from(self, tree: RadixTree, tenant: int, want: int, now: float, why: MissReason) -> int:
        policy, queues, freed = self._policies[tenant], tree.eviction_queues(self.number), 0
        gone, choice = Pieces() if policy.wants_pieces else None, _THE_ONLY_QUEUE
        while freed < want and queues.has_evictable(tenant):
            if policy.num_queues > 1:
                blocks, heads = queues.of_tenant(tenant)
                choice = policy.choose(blocks, heads)
            slots = tree.evict(
                self.number, tenant, choice.queue, want - freed, now, choice.leave, choice.spare_to, why,
                choice.below, gone,
            )
            self.slots.free(slots)
            freed += len(slots)
            if len(slots):
                continue
            if policy.num_queues == 1:
                break
            if all(map(np.array_equal, queues.of_tenant(tenant), (blocks, heads))):
                raise InvariantError(f"{type(policy).__name__} chooses {choice}, which has no evictable block")
        self._evicted += freed
        if gone is not None and freed:
            policy.evicted(gone.array())
        return freed

    def withdraw(self, tree: RadixTree, bound: int) -> None:
        """Evict a bounded number of blocks from slot ``bound`` on, except blocks that are in use."""
        freed = tree.withdraw(self.number, bound, _EXPIRE_NODES, _MOST_AT_ONCE)
        self.slots.free(freed)
        self._evicted += len(freed)

    def sweep(self, tree: RadixTree) -> None:
        """Free all slots of a retired tree, except slots that a plan still reads or writes."""
        self.slots.free(tree.discard(self.number))

    def stats(self, tree: RadixTree, prefix: str) -> dict[str, int]:
        """Current free slots and slots in limbo; evicted, expired and altered blocks and refused results since the
        start; if there are quotas, blocks by namespace. Each name begins with ``prefix``."""
        stats = {
            "free_slots": self.slots.num_free, "evicted_blocks": self._evicted, "expired_blocks": self._expired,
            "stale_results": self.stale.num_blocks, "limbo_slots": len(self.limbo),
            "altered_blocks": self.num_altered,
        }
        if len(self._quotas) > 1:
            used = tree.eviction_queues(self.number).blocks().sum(axis=1).tolist()
            names = [name or "default" for name in self._quotas.names()]
            stats |= {f"namespace_{name}_blocks": count for name, count in zip(names, used, strict=True)}
        return {f"{prefix}{name}": count for name, count in stats.items()}

    def check_integrity(self, held: NDArray[np.int32]) -> None:
        """Raise InvariantError unless every slot is free, or used by exactly one block (``held`` lists the slots of all
        blocks), or in limbo."""
        self.slots.check_integrity()
        held = np.concatenate([held, self.limbo.slots])
        if len(np.unique(held)) != len(held):
            raise InvariantError(f"tier {self.number}: two blocks hold one slot")
        if len(held) + self.slots.num_free != self.slots.capacity:
            raise InvariantError(
                f"tier {self.number}: {len(held)} slots indexed or in limbo + {self.slots.num_free} free != "
                f"{self.slots.capacity} in all"
            )
        if any(self.slots.is_free(int(slot)) for slot in held):
            raise InvariantError(f"tier {self.number}: a block holds a slot that is free")
