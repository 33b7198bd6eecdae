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
    """Provisional puts from their launch until their blocks are ready or dropped. The caller locks.

    Parameters
    ----------
    hold_s : float
        A put that is at rest and has not been accepted for so long is dropped: the engine has
        forgotten it, and its slots would stay reserved.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._puts: dict[int, _Put] = {}
        self._resting: dict[int, None] = {}       # at rest and not decided, in the order of their deadlines

    def __len__(self) -> int:
        return len(self._puts)

    def begin(self, task_id: int) -> None:
        """A provisional put was launched."""
        self._puts[task_id] = _Put()

    def rest(self, task: KVTask, ok: NDArray[np.bool_], now: float) -> None:
        """The copies of a put are at rest; blocks that are ``ok`` ((m,) bool) are good."""
        put = self._puts.get(task.task_id)
        if put is None or not ok.any():
            self._end(task, np.zeros_like(ok))
        elif put.stop is not None:
            self._end(task, ok & (task.blocks < put.stop))
        else:
            put.task, put.ok, put.deadline = task, ok, now + self._hold_s
            self._resting[task.task_id] = None

    def accept(self, task_id: int, stop: float) -> None:
        """Keep blocks before position ``stop``. The first call for a put decides; unknown puts are ignored."""
        put = self._puts.get(task_id)
        if put is None or put.stop is not None:
            return
        put.stop = stop
        if put.task is not None and put.ok is not None:
            self._end(put.task, put.ok & (put.task.blocks < stop))

    def drop(self, task_id: int) -> None:
        """No block of a put becomes ready."""
        self.accept(task_id, 0)

    def drop_all(self) -> None:
        """No block of any put of before becomes ready."""
        for task_id in list(self._puts):
            self.drop(task_id)

    def expire(self, now: float) -> int:
        """Drop puts that were not accepted in time; returns how many."""
        count = 0
        while self._resting and self._puts[first := next(iter(self._resting))].deadline <= now:
            self.drop(first)
            count += 1
        return count

    def _end(self, task: KVTask, keep: NDArray[np.bool_]) -> None:
        self._puts.pop(task.task_id, None)
        self._resting.pop(task.task_id, None)
        task.release(keep)
