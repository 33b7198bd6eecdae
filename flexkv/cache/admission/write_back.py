"""What is copied to SSD, and when: admission (docs/design/0010-admission.md), a rate limit. Moves no bytes."""

import math
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.admission.write_queue import WriteQueue
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import PutPlan, WritePlan

_EVIDENCE_SHARE = 0.25
"""Of a sequence has to be there already for the rest to be thought part of a conversation: a system prompt that all
share tells nothing (docs/design/0009-eviction-by-rank.md)."""


class SsdWriter:
    """Sequences that are worth writing to SSD, and whose turn it is.

    Thread safe; its lock is taken before the index's. Nothing here waits, and no request waits for it: where too much
    is queued, sequences are left out and counted.

    Parameters
    ----------
    cache : GlobalCacheEngine
    write_all : bool
        False: where something would have to go for it, a block is written only once there is evidence that it is used
        again: it was loaded, or was put again, also after it had gone, or follows on blocks that were and are a good
        part of its sequence. While slots are free everything is.
    batch_blocks : int
        Written at a time: large enough for long runs of slots.
    max_in_flight_blocks, max_queued_blocks : int
    blocks_per_s : float
        Limit of the rate; 0: none.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        cache: GlobalCacheEngine,
        *,
        write_all: bool,
        batch_blocks: int,
        max_in_flight_blocks: int,
        max_queued_blocks: int,
        blocks_per_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
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
        """A sequence ((n, 2) uint64) was loaded; True if some of it is to be written."""
        wanted = ~self._cache.on_ssd(keys)
        if not wanted.any():
            return False
        group, _ = self._cache.ssd_room(keys)
        with self._lock:
            return self._add(group, keys, np.flatnonzero(wanted))

    def put(self, plan: PutPlan) -> bool:
        """A put has ended; True if some of its sequence is to be written."""
        keys = plan.keys
        if len(keys) == 0:
            return False
        on_ssd = self._cache.on_ssd(keys)
        wanted = np.flatnonzero(~on_ssd)
        group, room = self._cache.ssd_room(keys)
        before = int(plan.blocks[0]) - 1 if len(plan) else -1
        with self._lock:
            follows = before + 1 > _EVIDENCE_SHARE * len(keys) and (
                bool(on_ssd[before]) or self._queue.remove(group, keys[before])
            )
            if not (self._write_all or follows or plan.num_known or plan.came_back):
                wanted = wanted[: max(0, room - self._queue.num_blocks)]
            return self._add(group, keys, wanted)

    def _add(self, group: int, keys: NDArray[np.uint64], wanted: NDArray[np.intp]) -> bool:
        """Queue a sequence for its blocks at the positions ``wanted``, as many as there is room for."""
        return len(wanted) > 0 and self._queue.add(group, keys, wanted) > 0

    # ---- writing ----------------------------------------------------------------------------------------------

    def next(self, hurry: bool = False) -> WritePlan | None:
        """What to write now; None: nothing is queued, or enough is under way, or (unless ``hurry``) it is too soon.

        Every plan must be given back to ``ended`` once.
        """
        with self._lock:
            while (first := self._queue.first()) and self._room() > 0 and (hurry or self._clock() >= self._not_before):
                group, keys = first
                plan = self._cache.begin_write(keys, self._room())
                if plan is None or len(plan) < self._room():
                    self._queue.remove(group, keys[-1])
                    self._dropped += int((~self._cache.on_ssd(keys)).sum())    # evicted, or no slot was to be had
                if plan is not None:
                    self._queue.end_turn(group)
                    self._in_flight += len(plan)
                    if self._rate:
                        self._not_before = max(self._clock(), self._not_before) + len(plan) / self._rate
                    return plan
        return None

    def _room(self) -> int:
        return min(self._batch, self._max_in_flight - self._in_flight)

    def ended(self, plan: WritePlan, written: NDArray[np.bool_]) -> None:
        """A write has ended; ``written`` : (m,) bool."""
        self._cache.end_write(plan, written)
        with self._lock:
            self._in_flight -= len(plan)
            self._written += int(written.sum())

    def pause(self) -> float:
        """Seconds until ``next`` may have something; infinite if that takes more news."""
        with self._lock:
            if self._queue.num_blocks == 0 or self._room() <= 0:
                return math.inf
            return max(0.0, self._not_before - self._clock())

    def has_room(self, num_blocks: int) -> bool:
        """Whether the queue has room for the blocks. An empty queue accepts any number, and keeps as many as fit."""
        with self._lock:
            return self._queue.num_blocks == 0 or self._queue.num_blocks + num_blocks <= self._max_queued

    def num_unwritten(self) -> int:
        """Blocks that are queued or under way."""
        with self._lock:
            queued = sum(int((~self._cache.on_ssd(keys)[blocks]).sum()) for keys, blocks in self._queue.sequences())
            return queued + self._in_flight

    @property
    def idle(self) -> bool:
        """Nothing is queued or under way."""
        return self._queue.num_blocks == 0 and self._in_flight == 0

    def clear(self) -> None:
        """Forget what is queued."""
        with self._lock:
            self._queue.clear()

    def stats(self) -> dict[str, int]:
        """Blocks, now and since the start."""
        with self._lock:
            return {
                "ssd_written_blocks": self._written,
                "ssd_dropped_writes": self._dropped + self._queue.left_out,
                "ssd_queued_blocks": self._queue.num_blocks,
                "ssd_blocks_being_written": self._in_flight,
            }
