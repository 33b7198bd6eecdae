"""Scheduler of graphs: starts each block when its dependencies have arrived, and ends a graph after its last block."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import InvariantError
from flexkv.transfer.deadline import LONGEST_TICK_S, Deadline, waits
from flexkv.transfer.executor import Executor
from flexkv.transfer.graph import OpStatus, Route, TransferGraph, TransferOp
from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.transfer")

OnDone = Callable[[TransferGraph], None]
Observe = Callable[[str, str, int, float], None]
"""Called for each op that has ended, under the lock: ``observe(kind, status, num_moved, seconds)`` with the name of its
kind, its status, the number of blocks moved, and the time since its graph was submitted."""


@dataclass(eq=False, slots=True)
class _Active:
    graph: TransferGraph
    on_done: OnDone
    submitted: float
    deadline: Deadline
    ops_left: int


class Scheduler:
    """Runs graphs over executors. Every method must be called under the engine's lock.

    Parameters
    ----------
    executors : mapping from Route to Executor
        The caller may add executors later.
    observe : Observe, optional
    reached : callable
        ``reached(op)``: whether the engine has finished the step of the op's fence.

    Attributes
    ----------
    ended : deque of callables
        The ``on_done`` of each graph that has ended. They must be called in order and without the lock.
    tick_s : float
        Interval at which deadlines are checked, in seconds.
    """

    def __init__(
        self, executors: Mapping[Route, Executor], observe: Observe | None = None,
        reached: Callable[[TransferOp], bool] = lambda op: True,
    ) -> None:
        self._executors = executors
        self._observe = observe
        self._log = RepeatedLog(logger)
        self._reached = reached
        self._active: dict[int, _Active] = {}
        self._next_look = 0.0
        self.tick_s = LONGEST_TICK_S
        self.ended: deque[Callable[[], None]] = deque()

    @property
    def idle(self) -> bool:
        """Whether no graph runs."""
        return not self._active

    def running(self) -> list[int]:
        """Task ids of the graphs that run."""
        return list(self._active)

    def late(self, now: float) -> list[tuple[int, str]]:
        """Task ids of the graphs whose deadline has passed and that were not stopped, each with the reason.

        Must be called every ``tick_s`` seconds, because it records when a graph begins to run; calls before that return
        an empty list."""
        late: list[tuple[int, str]] = []
        if now < self._next_look:
            return late
        self._next_look = now + self.tick_s
        for task_id, active in self._active.items():
            graph, deadline = active.graph, active.deadline
            if graph.verdict is None and deadline.is_finite and deadline.look(now, self._waits(graph)):
                graph.reason = deadline.reason(graph)
                late.append((task_id, graph.reason))
        return late

    def _waits(self, graph: TransferGraph) -> bool:
        def bounded(task_id: int) -> bool:
            other = self._active.get(task_id)
            return other is None or other.deadline.is_finite

        return waits(graph, self._reached, bounded)

    def submit(
        self, graph: TransferGraph, on_done: OnDone, limit_s: float, verdict: OpStatus | None = None
    ) -> None:
        """Run a graph. Its deadline is ``limit_s`` seconds after its blocks can be moved (``Deadline``). With a
        ``verdict``, from the caller or already set on the graph, no block starts.

        Raises
        ------
        InvariantError
            A graph with the same task id runs.
        """
        if graph.task_id in self._active:
            raise InvariantError(f"task {graph.task_id} is submitted twice")
        graph.verdict = graph.verdict or verdict
        now, self.tick_s = time.monotonic(), min(self.tick_s, limit_s / 4)
        active = _Active(graph, on_done, now, Deadline(limit_s, now), len(graph.ops))
        self._active[graph.task_id] = active
        graph.status = OpStatus.RUNNING
        for op in graph.ops:
            op.status = OpStatus.RUNNING
            op.begin()
        for op in graph.ops:
            self._start_blocks(active, op, *op.startable())

    def stop(self, task_id: int, verdict: OpStatus) -> None:
        """Start no further block of a graph; blocks in progress are finished. Unknown or ended graphs are ignored."""
        active = self._active.get(task_id)
        if active is not None:
            self.stop_graph(active.graph, verdict)

    def stop_graph(self, graph: TransferGraph, verdict: OpStatus) -> None:
        """Like ``stop``, for a graph object. If the graph is submitted later, none of its blocks start."""
        if graph.verdict is not None or graph.quiesced:
            return
        graph.verdict = verdict
        active = self._active.get(graph.task_id)
        if active is None or active.graph is not graph:
            return
        graph.status = verdict
        if graph.on_stop is not None:
            self.ended.append(partial(graph.on_stop, graph))
        for op in graph.ops:
            if not op.done:
                self._executors[op.route].cancel(op)
                self._start_blocks(active, op, *op.startable())

    def _start_blocks(
        self, active: _Active, op: TransferOp, startable: NDArray[np.intp], failed: NDArray[np.intp]
    ) -> None:
        if active.graph.verdict is not None:
            startable, failed = startable[:0], op.waiting
        for indices, is_failed in ((startable, False), (failed, True)):
            if len(indices):
                op.started[indices] = True
                self._executors[op.route].submit(op, indices, self._progress, is_failed)

    def _progress(self, op: TransferOp, indices: NDArray[np.intp] | slice, ok: NDArray[np.bool_]) -> None:
        op.resolve(indices, ok)
        if op.dependents:
            which = np.arange(len(op))[indices] if isinstance(indices, slice) else indices
            for later, dependency in op.dependents:
                if not later.done:
                    self._start_blocks(self._active[later.task_id], later, *later.on_progress(dependency, which))
        if op.done:
            self._end_op(self._active[op.task_id], op)

    def _end_op(self, active: _Active, op: TransferOp) -> None:
        op.status = active.graph.verdict or (OpStatus.DONE if np.count_nonzero(op.ok) == len(op) else OpStatus.FAILED)
        self._executors[op.route].forget(op)
        if self._observe is not None:
            try:
                self._observe(op.kind.name, op.status.value, int(op.ok.sum()), time.monotonic() - active.submitted)
            except Exception as error:
                self._log.write(logging.ERROR, "a transfer could not be counted in the metrics", error)
        op.dependents.clear()
        followers, op.followers = op.followers, []
        for later in followers:
            if not later.done:
                later.ended(op)
                self._start_blocks(self._active[later.task_id], later, *later.startable())
        active.ops_left -= 1
        if active.ops_left == 0:
            graph = active.graph
            del self._active[graph.task_id]
            succeeded = all(op.status is OpStatus.DONE for op in graph.ops)
            graph.status = graph.verdict or (OpStatus.DONE if succeeded else OpStatus.FAILED)
            graph.quiesced = True
            self.ended.append(partial(active.on_done, graph))
