"""Runs transfer graphs over executors, for many threads that wait for results."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from flexkv.config import TransferConfig
from flexkv.transfer.executor import ArrivalExecutor, Executor
from flexkv.transfer.executors.device import DeviceExecutor
from flexkv.transfer.graph import OpStatus, Route, TransferGraph
from flexkv.transfer.repeated_log import RepeatedLog
from flexkv.transfer.scheduler import Observe, OnDone, Scheduler

logger = logging.getLogger("flexkv.transfer")

_SPIN_NS = 50_000
"""Time that a waiting thread polls the rings before it sleeps, in nanoseconds: about the time that a 64 KiB block
takes."""


class GraphRunner:
    """Runs graphs, and wakes the threads that wait for them.

    Every method may be called from any thread. No method raises an exception of a callback, an executor or an
    agent: such a failure ends the affected graph or executor, and other graphs continue.

    Parameters
    ----------
    config : TransferConfig
    executors : sequence of Executor
        Executors for the kinds of ops that device agents do not move.
    observe : Observe, optional
        See ``Scheduler``.
    """

    def __init__(
        self, config: TransferConfig, executors: Sequence[Executor], observe: Observe | None
    ) -> None:
        self._config = config
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._device = DeviceExecutor()
        self._executors: dict[Route, Executor] = {
            route: executor for executor in (*executors, ArrivalExecutor(), self._device) for route in executor.routes
        }
        self._watched = [executor for executor in executors if executor.event_fd >= 0]
        self._scheduler = Scheduler(self._executors, observe, self._device.reached)
        self._closing = self._out_of_service = False
        self._log = RepeatedLog(logger)
        self._unwatch: Callable[[int], None] = lambda fd: None
        """Called with the ``event_fd`` of an executor that has failed."""

    @property
    def in_service(self) -> bool:
        """False after repeated failures of the background thread: no block is moved any more, every graph fails at
        once, and the agents are disconnected."""
        return not self._out_of_service

    def submit(self, graph: TransferGraph, on_done: OnDone, background: bool = False) -> None:
        """Run a graph. ``on_done(graph)`` is called once, when the graph is quiesced: every block has its result, and
        its slots and pages are not accessed any more. ``graph.status`` may be final before that.

        A ``background`` graph has no deadline: no caller waits for it, and its executor limits the time of each
        block."""
        with self._lock:
            limit_s = math.inf if background else self._config.op_timeout_s
            verdict = OpStatus.CANCELLED if self._closing else OpStatus.FAILED if self._out_of_service else None
            self._scheduler.submit(graph, on_done, limit_s, verdict)
        self._fire()

    def cancel(self, task: int | TransferGraph) -> None:
        """Start no further block of a graph, which is given as task id or object; blocks in progress are finished.

        Unknown or ended graphs are ignored. If a graph object is submitted later, by another thread, none of its blocks
        start."""
        with self._lock:
            if isinstance(task, TransferGraph):
                self._scheduler.stop_graph(task, OpStatus.CANCELLED)
            else:
                self._scheduler.stop(task, OpStatus.CANCELLED)
            self._news.notify_all()
        self._fire()

    def notify(self) -> None:
        """Let ``wait`` evaluate its predicate again."""
        with self._lock:
            self._news.notify_all()

    def _fire(self) -> None:
        """Run callbacks that are due, and notify waiting threads."""
        fired = False
        while True:
            try:
                callback = self._scheduler.ended.popleft()
            except IndexError:
                break
            fired = True
            try:
                callback()
            except Exception:
                logger.exception("a callback of a transfer failed")
        if fired:
            with self._lock:
                self._news.notify_all()

    # ---- results ----------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Collect the results that are available, and run their callbacks; does not wait."""
        with self._lock:
            for link in list(self._device.links):
                link.drain()
            self._drain_executors()
        self._fire()

    def _drain_executors(self) -> None:
        """Collect the results of executors, under the lock. An executor that raises is not used again, and its ops
        fail."""
        for executor in list(self._watched):
            try:
                executor.drain()
            except Exception:
                logger.exception("%s has failed and is not used any more", type(executor).__name__)
                self._watched.remove(executor)
                self._unwatch(executor.event_fd)
                try:
                    executor.abandon()
                except Exception:
                    logger.exception("%s could not fail its ops", type(executor).__name__)

    def wait(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``predicate()``, which callbacks make true; False after ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        self.poll()
        if predicate():
            return True
        if timeout_s > 0 and self._spin(predicate):
            return True
        with self._news:
            while not predicate():
                left = deadline - time.monotonic()
                if left <= 0 or not self._news.wait(left):
                    return predicate()
        return True

    def _spin(self, predicate: Callable[[], bool]) -> bool:
        """Poll the rings for a short time: for a small block that is faster than a sleep and a wake-up."""
        links = [link for link in list(self._device.links) if link.busy]
        for link in links:
            link.rings.set_waiting(False)
        until = time.monotonic_ns() + _SPIN_NS
        while links and time.monotonic_ns() < until and not predicate():
            if any([link.rings.spin(_SPIN_NS // len(links)) for link in links]):
                self.poll()
        if any([link.rings.set_waiting(True) for link in links]):
            self.poll()
        return predicate()

    def _locked(self, function: Callable[[], None]) -> None:
        with self._lock:
            function()
            self._news.notify_all()
        self._fire()

    def _take_results(self) -> None:
        with self._lock:
            for link in list(self._device.links):
                while link.drain() or link.rings.set_waiting(True):
                    if not link.healthy:
                        break
            self._drain_executors()

    def _enforce_deadlines(self) -> None:
        """Stop graphs that took too long."""
        with self._lock:
            for task_id, reason in self._scheduler.late(time.monotonic()):
                logger.error("task %d: %s", task_id, reason)
                self._stop(task_id, OpStatus.TIMEOUT)
                self._news.notify_all()

    def _stop(self, task_id: int, verdict: OpStatus) -> None:
        """Stop a graph, under the lock. Even if an executor fails meanwhile, the graph has its verdict, so that waiting
        threads return; other graphs continue."""
        try:
            self._scheduler.stop(task_id, verdict)
        except Exception as error:
            self._log.write(logging.ERROR, f"task {task_id} could not be stopped", error)

    def _take_out_of_service(self) -> None:
        """Fail all graphs, running and future, and disconnect the agents."""
        with self._lock:
            self._out_of_service = True
            logger.critical(
                "FlexKV is out of service: its data plane failed repeatedly, see the errors above. The engine "
                "continues without loading or saving KV; restart it to use FlexKV again"
            )
            for link in list(self._device.links):
                link.disconnect("the data plane is out of service")
                for op in link.ops:
                    op.is_lost = True
            for task_id in self._scheduler.running():
                self._stop(task_id, OpStatus.FAILED)
            self._news.notify_all()
        self._fire()
