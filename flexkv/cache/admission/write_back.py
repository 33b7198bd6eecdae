"""Write-back: selects the blocks that are written to a lower tier (admission, docs/design/0010-admission.md) and limits
the rate of writes. Moves no bytes."""

import math
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.admission.write_queue import WriteQueue
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import Move, PutPlan
from flexkv.cache.tier import HOST

_EVIDENCE_SHARE = 0.25
"""Minimum cached share of a sequence before its new blocks count as a continued conversation. A shorter prefix may be a
system prompt that all requests share, and is no evidence of reuse (docs/design/0009-eviction-by-priority.md)."""


class WriteBack:
    """Queue of the sequences to write to a lower tier.

    Thread safe; its lock is taken before the index's. No method waits, and no request waits for write-back: sequences
    that do not fit into the queue are dropped and counted.

    Parameters
    ----------
    cache : GlobalCacheEngine
    tier : int
        Number of the lower tier.
    write_all : bool
        False: when the tier is full, write a block only after evidence of reuse: its sequence was loaded; was put
        again, also after its eviction; or continues blocks that are on the tier or queued for it and make up more than
        ``_EVIDENCE_SHARE`` of the sequence. While slots are free, every block is written.
    batch_blocks : int
        Maximum number of blocks of one write: enough for long runs of adjacent slots.
    max_in_flight_blocks, max_queued_blocks : int
    blocks_per_s : float
        Maximum rate of writes; 0: no limit.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self,
        cache: GlobalCacheEngine,
        tier: int,
        *,
        write_all: bool,
        batch_blocks: int,
        max_in_flight_blocks: int,
        max_queued_blocks: int,
        blocks_per_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._tier = tier
        self._write_all = write_all
        self._batch = batch_blocks
        self._max_in_flight = max_in_flight_blocks
        self._rate = blocks_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._max_queued = max_queued_blocks
        self._queue = WriteQueue(max_queued_blocks)
        self._in_flight = self._dropped = self._written = 0
        self._not_before = 0.0

    # ---- evidence ---------------------------------------------------------------------------------------------

    def hit(self, keys: NDArray[np.uint64]) -> bool:
        """Report that a sequence ((n, 2) uint64) was loaded; returns whether blocks of it were queued."""
        wanted = self._lacks(keys)
        if not wanted.any():
            return False
        tenant, _ = self._cache.room(self._tier, keys)
        with self._lock:
            return self._add(tenant, keys, np.flatnonzero(wanted))

    def put(self, plan: PutPlan) -> bool:
        """Report that a put has ended; returns whether blocks of its sequence were queued."""
        move = plan.to(HOST)
        keys = plan.keys if move is None else move.keys
        if len(keys) == 0:
            return False
        there = self._cache.has_slot(self._tier, keys)
        wanted = np.flatnonzero(~there)
        tenant, room = self._cache.room(self._tier, keys)
        before = int(move.blocks[0]) - 1 if move is not None else -1
        with self._lock:
            follows = before + 1 > _EVIDENCE_SHARE * len(keys) and (
                bool(there[before]) or self._queue.remove(tenant, keys[before])
            )
            if not (self._write_all or follows or plan.num_known or plan.came_back):
                wanted = wanted[: max(0, room - self._queue.num_blocks)]
            return self._add(tenant, keys, wanted)

    def _lacks(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) bool: blocks without a slot on the tier."""
        return ~self._cache.has_slot(self._tier, keys)

    def _add(self, tenant: int, keys: NDArray[np.uint64], wanted: NDArray[np.intp]) -> bool:
        """Queue a sequence for its blocks at the positions ``wanted``, as many as fit."""
        return len(wanted) > 0 and self._queue.add(tenant, keys, wanted) > 0

    # ---- writing ----------------------------------------------------------------------------------------------

    def next(self, flush: bool = False) -> Move | None:
        """Plan the next write, of one sequence. None: no block is queued, ``max_in_flight_blocks`` are under way, or
        (unless ``flush``) the rate limit requires a pause.

        Every plan must be passed to ``ended`` once.
        """
        with self._lock:
            while (first := self._queue.first()) and self._room() > 0 and (flush or self._clock() >= self._not_before):
                tenant, keys = first
                plan = self._cache.begin_write_back(self._tier, keys, self._room())
                if plan is None or len(plan) < self._room():
                    self._queue.remove(tenant, keys[-1])
                    self._dropped += int(self._lacks(keys).sum())              # evicted, or there was no slot
                if plan is not None:
                    self._queue.end_turn(tenant)
                    self._in_flight += len(plan)
                    if self._rate:
                        self._not_before = max(self._clock(), self._not_before) + len(plan) / self._rate
                    return plan
        return None

    def limit(self, max_in_flight_blocks: int) -> None:
        """Replace ``max_in_flight_blocks``: the size of the host tier has changed."""
        with self._lock:
            self._max_in_flight = max_in_flight_blocks

    def _room(self) -> int:
        return min(self._batch, self._max_in_flight - self._in_flight)

    def ended(self, plan: Move, written: NDArray[np.bool_]) -> None:
        """End a write that ``next`` planned; ``written``: (m,) bool, the blocks that were written to the tier."""
        self._cache.end_move(plan, written)
        with self._lock:
            self._in_flight -= len(plan)
            self._written += int(written.sum())

    def pause(self) -> float:
        """Seconds until ``next`` may return a plan; infinite if a block must be queued or a write must end first."""
        with self._lock:
            if self._queue.num_blocks == 0 or self._room() <= 0:
                return math.inf
            return max(0.0, self._not_before - self._clock())

    def has_room(self, num_blocks: int) -> bool:
        """Whether the queue has room for the blocks. An empty queue accepts any number, and keeps as many as fit."""
        with self._lock:
            return self._queue.num_blocks == 0 or self._queue.num_blocks + num_blocks <= self._max_queued

    def num_unwritten(self) -> int:
        """Number of blocks that are queued or under way."""
        with self._lock:
            queued = sum(int(self._lacks(keys)[blocks].sum()) for keys, blocks in self._queue.sequences())
            return queued + self._in_flight

    @property
    def idle(self) -> bool:
        """Whether no block is queued or under way. ``next`` moves blocks from one to the other under the lock."""
        with self._lock:
            return self._queue.num_blocks == 0 and self._in_flight == 0

    def clear(self) -> None:
        """Drop all queued sequences."""
        with self._lock:
            self._queue.clear()

    def stats(self) -> dict[str, int]:
        """Blocks queued and under way now; blocks written and dropped since the start."""
        with self._lock:
            return {
                "written_blocks": self._written,
                "dropped_writes": self._dropped + self._queue.left_out,
                "queued_blocks": self._queue.num_blocks,
                "blocks_being_written": self._in_flight,
            }
