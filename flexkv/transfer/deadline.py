"""Deadlines of transfers. Time counts from the moment when blocks may be moved, not from submission."""

import math
from collections.abc import Callable, Iterable

from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import TransferGraph, TransferOp

LONGEST_WAIT = 10
"""Maximum total time of a transfer, as a multiple of its limit. It bounds the wait for a step that the engine never
finishes. It is longer than any real step: 200 s at the default limit."""

LONGEST_TICK_S = 1.0
"""Maximum interval between two checks of deadlines, in seconds: the maximum delay of a transfer's end."""

_SUBJECT = {
    OpKind.D2H: "saving", OpKind.H2D: "loading", OpKind.P2D: "loading from other ranks",
    OpKind.STORE2H: "reading from a lower tier", OpKind.H2STORE: "writing to a lower tier",
    OpKind.STORE2D: "loading from a lower tier", OpKind.D2STORE: "saving to a lower tier",
    OpKind.ERASE: "erasing on a lower tier", OpKind.ARRIVAL: "waiting for",
}


def waits(graph: TransferGraph, reached: Callable[[TransferOp], bool], bounded: Callable[[int], bool]) -> bool:
    """Whether no block of a graph can move now: all wait for steps of the engine or for other transfers.

    Parameters
    ----------
    graph : TransferGraph
    reached : callable
        ``reached(op)``: whether the engine has finished the step of the op's fence.
    bounded : callable
        ``bounded(task_id)``: whether that graph has a deadline. A wait for a graph without a deadline counts as
        running.
    """
    for op in graph.ops:
        if op.done:
            continue
        if (op.started & ~op.resolved).any():
            if reached(op):
                return False
        elif any(not other.done and not bounded(other.task_id) for other in _others(op)):
            return False
    return True


def _others(op: TransferOp) -> Iterable[TransferOp]:
    """Ops of other graphs that this op waits for."""
    needed = (*op.after, *(dependency.op for dependency in op.depends_on))
    return (other for other in needed if other.task_id != op.task_id)


class Deadline:
    """Decides when a graph has taken too long: ``limit_s`` seconds after its blocks could be moved, or ``LONGEST_WAIT``
    times that long after its submission, whichever is first.

    Parameters
    ----------
    limit_s : float
        Limit in seconds; infinite: the graph has no deadline.
    now : float
        Time of the submission (``time.monotonic``).
    """

    __slots__ = ("_began", "_last", "_limit_s")

    def __init__(self, limit_s: float, now: float) -> None:
        self._limit_s = limit_s
        self._began: float | None = None     # when the graph was first seen to run; None: it waits
        self._last = now + LONGEST_WAIT * limit_s

    @property
    def is_finite(self) -> bool:
        """Whether the graph has a deadline."""
        return math.isfinite(self._limit_s)

    def look(self, now: float, waiting: bool) -> bool:
        """Whether the deadline has passed. Must be called regularly; ``waiting``: the result of ``waits``."""
        if waiting:
            self._began = None
        elif self._began is None:
            self._began = now
        return now >= self._last or (self._began is not None and now >= self._began + self._limit_s)

    def reason(self, graph: TransferGraph) -> str:
        """The reason why the graph is late, for a user."""
        left = [op for op in graph.ops if not op.done]
        op = next((op for op in left if op.fence), left[0])
        subject = f"{_SUBJECT[op.kind]} {len(op)} blocks"
        if self._began is None:
            wait_s = LONGEST_WAIT * self._limit_s
            cause = f"the engine's step {op.fence}, which did not end" if op.fence else "other transfers"
            return f"{subject} has waited {wait_s:g} s ({LONGEST_WAIT} x op_timeout_s) for {cause}"
        after = " after the engine's step was done" if op.fence else ""
        return (
            f"{subject} has taken longer than {self._limit_s:g} s (op_timeout_s){after}: {op.num_resolved} were moved; "
            "raise op_timeout_s if the bus or the disk is that slow"
        )
