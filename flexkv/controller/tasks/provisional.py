"""Provisional puts: blocks that become ready once their copies are at rest and the engine has accepted them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.controller.tasks.task import KVTask


@dataclass(slots=True, eq=False)
class _Put:
    """A provisional put.

    Attributes
    ----------
    stop : float or None
        Blocks from this position on are dropped; None: the engine has not decided.
    task : KVTask or None
        Once its copies are at rest.
    ok : (m,) bool or None
        Blocks that were copied.
    deadline : float
        When it is dropped, counted from rest.
    """

    stop: float | None = None
    task: KVTask | None = None
    ok: NDArray[np.bool_] | None = None
    deadline: float = math.inf


class ProvisionalPuts:
    """Provisional puts from their launch until their blocks are ready or dropped. The caller must serialize
    calls.

    Parameters
    ----------
    hold_s : float
        Seconds after the copies of a put are at rest, after which the put is dropped unless it was accepted. The engine
        has forgotten such a put, and its slots would stay reserved.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._puts: dict[int, _Put] = {}
        self._resting: dict[int, None] = {}       # at rest and not decided, in the order of their deadlines

    def __len__(self) -> int:
        return len(self._puts)

    def begin(self, task_id: int) -> None:
        """Record that a provisional put was launched."""
        self._puts[task_id] = _Put()

    def rest(self, task: KVTask, ok: NDArray[np.bool_], now: float) -> None:
        """Record that the copies of a put are at rest.

        If the put was accepted or dropped already, its blocks become ready or absent now; otherwise it waits for
        ``accept`` until its deadline.

        Parameters
        ----------
        task : KVTask
        ok : (m,) bool
            Blocks of the task that were copied. If none was, the put ends now.
        now : float
            Monotonic time in seconds.
        """
        put = self._puts.get(task.task_id)
        if put is None or not ok.any():
            self._end(task, np.zeros_like(ok))
        elif put.stop is not None:
            self._end(task, ok & (task.blocks < put.stop))
        else:
            put.task, put.ok, put.deadline = task, ok, now + self._hold_s
            self._resting[task.task_id] = None

    def accept(self, task_id: int, stop: float) -> None:
        """Accept the blocks of a put at positions before ``stop`` (infinite: all), and drop the others. The first call
        for a put decides; unknown puts are ignored."""
        put = self._puts.get(task_id)
        if put is None or put.stop is not None:
            return
        put.stop = stop
        if put.task is not None and put.ok is not None:
            self._end(put.task, put.ok & (put.task.blocks < stop))

    def drop(self, task_id: int) -> None:
        """Drop all blocks of a put, unless it was accepted already. Unknown puts are ignored."""
        self.accept(task_id, 0)

    def drop_all(self) -> None:
        """Drop all blocks of all puts that were not accepted yet."""
        for task_id in list(self._puts):
            self.drop(task_id)

    def expire(self, now: float) -> int:
        """Drop the puts whose deadline has passed at ``now`` (monotonic time in seconds); returns their number."""
        count = 0
        while self._resting and self._puts[first := next(iter(self._resting))].deadline <= now:
            self.drop(first)
            count += 1
        return count

    def _end(self, task: KVTask, keep: NDArray[np.bool_]) -> None:
        self._puts.pop(task.task_id, None)
        self._resting.pop(task.task_id, None)
        task.release(keep)
