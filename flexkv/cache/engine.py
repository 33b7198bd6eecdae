"""The control plane: one index over the slots of the host tier; decides, moves no bytes."""

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv._core.radix import RadixTree
from flexkv._core.slots import SlotAllocator
from flexkv.cache.eviction import EvictionPolicy
from flexkv.cache.plan import GetPlan, MatchResult, PutPlan
from flexkv.cache.reasons import StopReason
from flexkv.errors import InvariantError

logger = logging.getLogger("flexkv.cache")

HOST = 0
"""Tier number of CPU memory in the index."""


class GlobalCacheEngine:
    """Index, slots and eviction of the host tier.

    Thread safe: one lock around every method, held for microseconds; none of them waits for a transfer.

    A block is *absent*, *writing* (between ``begin_put`` and ``end_put``) or *ready*; only ready blocks are offered.
    A pinned block (between ``begin_get`` and ``end_get``) keeps its slot.

    Parameters
    ----------
    num_slots : int
        Slots that the host tier will have when the pool is fully grown.
    policy : EvictionPolicy
    evict_start_threshold : float
        Share of the usable slots in use, above which ``evict_ahead`` frees slots.
    evict_ratio : float
        Share of the usable slots that one such batch frees.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        evict_start_threshold: float = 1.0,
        evict_ratio: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.RLock()
        self._num_slots = num_slots
        self._policy = policy
        self._start_threshold = evict_start_threshold
        self._ratio = evict_ratio
        self._clock = clock
        self._slots = SlotAllocator(0, num_slots)
        self._tree = self._new_tree()
        self._retired: list[RadixTree] = []
        self._evicted_blocks = 0

    def _new_tree(self) -> RadixTree:
        # Twice the slots: a block that lost its slot stays in the index while a block below it is in use.
        return RadixTree(2 * self._num_slots)

    def grow(self, num_slots: int) -> None:
        """Make ``num_slots`` slots usable in all (the pool grows while it is in service)."""
        with self._lock:
            self._slots.grow(num_slots)

    def match(self, keys: NDArray[np.uint64]) -> MatchResult:
        """How many leading blocks of ``keys`` ((n, 2) uint64) are ready, and why no more. Changes nothing."""
        with self._lock:
            match = self._tree.match(keys)
        return MatchResult(match.num_ready, StopReason(match.reason))

    def begin_get(self, keys: NDArray[np.uint64], start: int, stop: int) -> GetPlan:
        """Pin the ready blocks of ``[start, stop)`` that follow on a ready prefix; the plan may be shorter, or empty.

        Every plan must be given back to ``end_get`` once.
        """
        with self._lock:
            match = self._tree.match(keys[:stop])
            stop = match.num_ready
            start = min(start, stop)
            keys = keys[:stop]
            self._tree.pin(keys, start, stop)
            self._tree.touch(keys, self._clock())
            return GetPlan(keys, start, stop, match.slots[start:], StopReason(match.reason), self._tree)

    def end_get(self, plan: GetPlan) -> None:
        """Release the pins of ``plan``: nothing reads its slots any more."""
        with self._lock:
            plan.tree.unpin(plan.keys, plan.start, plan.stop)
            self._sweep_retired()

    def begin_put(self, keys: NDArray[np.uint64], start: int, stop: int) -> PutPlan:
        """Give slots to the blocks of ``[start, stop)`` that are absent; evicts where none is free.

        Blocks that are ready, or that another request is writing, are left out. Where slots run out, or a block
        before ``start`` is absent, the plan is shorter, or empty. Every plan must be given back to ``end_put`` once.
        """
        with self._lock:
            keys = keys[:stop]
            absent = self._tree.absent(keys)
            if len(absent) > self._slots.num_free and len(absent):
                self._make_room(keys, int(absent[0]), len(absent) - self._slots.num_free)
                absent = self._tree.absent(keys)
            if len(absent) and absent[0] < start:
                absent = absent[:0]
            blocks = absent[: self._slots.num_free]
            slots = self._slots.allocate(len(blocks))
            if slots is None:
                raise InvariantError(f"{self._slots.num_free} slots are free, but {len(blocks)} cannot be had")
            last = int(blocks[-1]) + 1 if len(blocks) else 0
            plan = PutPlan(keys[:last], blocks, slots, self._tree)
            if len(plan):
                now = self._clock()
                self._tree.insert(plan.keys, plan.slots_by_position(), HOST, now)
                self._tree.touch(plan.keys, now, hit=False)
            return plan

    def end_put(self, plan: PutPlan, written: NDArray[np.bool_]) -> None:
        """Blocks that are ``written`` ((m,) bool) become ready, the others absent; nothing writes their slots now."""
        with self._lock:
            if plan.tree is not self._tree:      # reset while it was being written: must not be seen
                written = np.zeros_like(written)
            failed = ~written
            if written.any():
                plan.tree.set_ready(plan.keys, plan.slots_by_position(written), HOST)
            if failed.any():
                plan.tree.drop(plan.keys, plan.slots_by_position(failed), HOST, failed=True)
                self._slots.free(plan.slots[failed])
            self._sweep_retired()

    def evict_ahead(self) -> int:
        """Free a batch of slots if fewer than the watermark are free; returns how many. Not for the request path."""
        with self._lock:
            used = self._slots.capacity - self._slots.num_free
            if used <= self._start_threshold * self._slots.capacity:
                return 0
            return self._evict(self._batch())

    def reset(self) -> None:
        """Forget every block. Plans in flight stay valid, but nothing they write or read will be offered again."""
        with self._lock:
            self._retired.append(self._tree)
            self._tree = self._new_tree()
            self._sweep_retired()

    def _batch(self) -> int:
        return max(1, int(self._ratio * self._slots.capacity))

    def _make_room(self, keys: NDArray[np.uint64], num_present: int, want: int) -> None:
        self._tree.pin(keys, 0, num_present)     # not the prefix that the new blocks are to follow
        try:
            self._evict(max(want, self._batch()))
        finally:
            self._tree.unpin(keys, 0, num_present)

    def _evict(self, want: int) -> int:
        freed = 0
        while freed < want:
            candidates = self._tree.evictable(HOST)
            score = self._policy.score(self._tree.nodes_view()[candidates], self._clock())
            if len(candidates) > want - freed:   # each gives at least one slot
                lowest = np.argpartition(score, want - freed - 1)[: want - freed]
                candidates, score = candidates[lowest], score[lowest]
            slots = self._tree.evict(HOST, candidates[np.argsort(score, kind="stable")], want - freed)
            if len(slots) == 0:
                break
            self._slots.free(slots)
            freed += len(slots)
        self._evicted_blocks += freed
        return freed

    def _sweep_retired(self) -> None:
        for tree in self._retired[:]:
            while len(slots := tree.evict(HOST, tree.evictable(HOST), tree.num_blocks)):
                self._slots.free(slots)
            if tree.num_blocks == 0:
                self._retired.remove(tree)

    def stats(self) -> dict[str, int]:
        """Blocks, slots and bytes of the index, now; ``evicted_blocks`` since the start."""
        with self._lock:
            return {
                "num_slots": self._slots.capacity,
                "free_slots": self._slots.num_free,
                "indexed_blocks": self._tree.num_blocks,
                "index_bytes": self._tree.memory_bytes,
                "evicted_blocks": self._evicted_blocks,
            }

    def check_integrity(self) -> None:
        """Every slot is free or held by exactly one block: free + indexed = total.

        Raises
        ------
        InvariantError
        """
        with self._lock:
            held = np.concatenate([tree.check_integrity()[HOST] for tree in [self._tree, *self._retired]])
            self._slots.check_integrity()
            if len(np.unique(held)) != len(held):
                raise InvariantError("two blocks hold one slot")
            if len(held) + self._slots.num_free != self._slots.capacity:
                raise InvariantError(
                    f"{len(held)} slots indexed + {self._slots.num_free} free != {self._slots.capacity} in all"
                )
            if any(self._slots.is_free(int(slot)) for slot in held):
                raise InvariantError("a block holds a slot that is free")
