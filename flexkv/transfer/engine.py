"""TransferEngine: runs transfer graphs over executors, and makes sure that each of them ends."""

import itertools
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from flexkv.config import TransferConfig
from flexkv.errors import TransferError
from flexkv.protocol.registration import Hello
from flexkv.transfer.background import BackgroundThread
from flexkv.transfer.executor import Executor
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.executors.node_link import NodeLink
from flexkv.transfer.membership import Membership
from flexkv.transfer.pool_growth import PoolGrowth
from flexkv.transfer.runner import GraphRunner
from flexkv.transfer.scheduler import Observe
from flexkv.transfer.watch import Watch

logger = logging.getLogger("flexkv.transfer")

_END_S = 10.0
"""How long a shutdown waits for the data plane's thread. A turn of its loop takes milliseconds, and seconds only on a
machine without a free processor."""

_FIRST_RESEND_S, _MAX_RESEND_S = 0.001, 0.05
"""Pause between two attempts to send messages that found a ring full; it doubles with each attempt."""


class AgentListener(Protocol):
    """Accepts the connections of device agents, and owns the memory that they copy to and from. The engine calls it."""

    def lost(self, hello: Hello) -> None:
        """Record that an agent takes no more ops, so that its rank may join again. Called on the background thread
        under the lock."""

    def close(self) -> None:
        """Accept no more agents. Called one or more times, when the background thread does not run."""

    def free(self) -> None:
        """Free the memory, which is not accessed any more. Called one or more times, after ``close``."""


Listen = Callable[[Watch, Callable[[AgentLink], None]], AgentListener]
"""``listen(watch, join) -> AgentListener``. The listener may watch descriptors with ``watch``. It must call ``join`` on
the background thread with each agent that is ready for ops."""


class TransferEngine(GraphRunner):
    """The data plane: runs graphs, and connects the agents of the ranks.

    ``submit``, ``cancel``, ``poll`` and ``wait`` may be called from any thread. Callbacks and ``on_done`` run on
    whichever thread finds the result, without the engine's lock. One background thread lets agents join, notices those
    that die, enforces deadlines, and finds results when no thread waits. It survives every exception; if it fails again
    and again, the engine takes itself out of service: see ``in_service``.

    Parameters
    ----------
    config : TransferConfig
    on_capacity : callable
        Called with the number of usable slots as it grows, on the background thread.
    executors : sequence of Executor
        Executors of the ops that device agents do not move; the engine closes them.
    housekeeping : callable, optional
        Called on the background thread after each turn; returns the seconds until its next call is due.
    observe : Observe, optional
        As in ``Scheduler``.

    Attributes
    ----------
    task_ids : iterator of int
        ``next(task_ids)`` is an unused id for a graph.
    """

    def __init__(
        self,
        config: TransferConfig,
        *,
        on_capacity: Callable[[int], None],
        executors: tuple[Executor, ...] = (),
        housekeeping: Callable[[], float] | None = None,
        observe: Observe | None = None,
    ) -> None:
        super().__init__(config, executors, observe)
        self._growth = PoolGrowth(on_capacity, self.wake, self.notify)
        self._housekeeping = housekeeping
        self.task_ids = itertools.count(1)
        self._listener: AgentListener | None = None
        self._thread: BackgroundThread | None = None
        self._is_shut_down = False
        self._ended_at_rest = False
        self._ending = threading.Lock()             # one shutdown at a time, each of them bounded
        self._watch: Watch | None = None
        self._membership: Membership | None = None
        self._pause_s = 0.0                         # of the next turn
        self._resend_s = _FIRST_RESEND_S
        self._closed: set[Executor] = set()

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self, listen: Listen) -> None:
        """Start the background thread, and return.

        Raises
        ------
        TransferError
            This engine was started before. An exception of ``listen`` is passed on; nothing was started then.
        """
        with self._lock:
            if self._watch is not None or self._closing:
                done = "shut down" if self._closing else "started"
                raise TransferError(f"this manager was {done} already: make a new one to start again")
            with ExitStack() as undo:
                watch = Watch()
                undo.callback(watch.close)
                self._membership = Membership(
                    watch, self._device, self._scheduler, self._locked, self._joined, self._left
                )
                self._membership.waits_for_idle = self._growth.may_shrink
                listener = listen(watch, self._membership.add)
                undo.callback(listener.close)
                for executor in self._watched:
                    self._watch_executor(watch, executor)
                thread = BackgroundThread("flexkv-transfer", self._turn, self._is_over, self._take_out_of_service)
                self._watch, self._listener, self._thread = watch, listener, thread
                self._unwatch = watch.remove
                undo.callback(self._forget_start)
                thread.start()
                undo.pop_all()

    def _forget_start(self) -> None:
        self._watch = self._listener = self._thread = None

    def _watch_executor(self, watch: Watch, executor: Executor) -> None:
        """Wake up when the executor has results; ``_take_results`` takes them in at every turn."""
        watch.add(executor.event_fd, lambda: None, lambda error: None)

    @property
    def is_running(self) -> bool:
        """Whether the engine was started and not shut down."""
        return self._listener is not None and not self._closing

    def expect_ranks(self, client: int, num_ranks: int, num_nodes: int = 1) -> None:
        """Record the number of ranks on this node, and of nodes, of a data-parallel client. They may join from now
        on."""
        with self._lock:
            self._device.expect(client, num_ranks, num_nodes)

    def dismiss_ranks(self, client: int, reason: str) -> None:
        """Disconnect the ranks of a client, which may not join any more; ``reason`` is for the log."""
        with self._lock:
            self._device.dismiss(client, reason)

    def has_ranks(self, client: int) -> bool:
        """Whether all ranks and nodes of a client have joined, and can copy from and to the usable slots."""
        return self._device.caught_up(client)

    def exchange_of(self, client: int, num_blocks: int) -> int:
        """Number of the exchange with which a client loads ``num_blocks`` blocks; 0: each rank reads all of its
        segments."""
        return self._device.exchange_of(client, num_blocks)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call ``function`` on the background thread; not at all, if that does not run."""
        with self._lock:
            if not self._closing and self._watch is not None:
                self._watch.call_soon(function)

    def hellos(self, client: int) -> list[Hello]:
        """Descriptions of the connected ranks of a client."""
        return [link.hello for link in self._device.links_of(client)]

    @property
    def usable_slots(self) -> int:
        """Slots that have become usable so far."""
        return self._growth.usable

    @property
    def at_rest(self) -> bool | None:
        """After ``shutdown``: whether no graph ran any more when the agents were disconnected, so that no slot and no
        page is accessed. None: before."""
        return self._ended_at_rest if self._is_shut_down else None

    def num_pages(self, client: int) -> int | None:
        """Pages of the first layer group of the client's rank that has the fewest; None: none is connected."""
        return min((link.hello.num_pages[0] for link in self._device.links_of(client)), default=None)

    def shutdown(self) -> None:
        """Cancel all graphs, disconnect the agents, and free the memory. Waits for a bounded time.

        Every part is closed, also if another cannot be closed; the first error is raised at the end. A second call
        closes the parts that the first could not close.
        """
        with self._ending:
            self._shut_down()

    def _shut_down(self) -> None:
        self._cancel_all()
        if self._thread is not None:
            self._thread.stop()
            if self._watch is not None and not self._is_shut_down:
                self._watch.wake()
            self._thread.join(max(_END_S, self._config.handshake_timeout_s))
            if self._thread.is_alive():
                raise TransferError(
                    "the data plane's thread does not end: its memory and its descriptors stay as they are. See the "
                    "log for a disk or a GPU that hangs, and end this process"
                )
        with ExitStack() as steps:               # last in, first out; each is called, whatever the others raise
            if self._listener is not None:
                steps.callback(self._listener.free)
            for executor in set(self._executors.values()):
                steps.callback(self._close_executor, executor)
            steps.callback(self._fire)
            steps.callback(self._disconnect)

    def _cancel_all(self) -> None:
        if not self._lock.acquire(timeout=self._config.handshake_timeout_s):
            raise TransferError("the data plane is held up by a call that does not end: it cannot be shut down")
        try:
            was_closing, self._closing = self._closing, True
            if self._membership is not None:
                self._membership.is_closing = True
            unfinished = self._scheduler.running()
            self._news.notify_all()
        finally:
            self._lock.release()
        if not was_closing:
            for task_id in unfinished:
                self.cancel(task_id)
            if self._thread is not None:
                self.wait(lambda: self._scheduler.idle, self._config.handshake_timeout_s)

    def _disconnect(self) -> None:
        with self._lock:
            if self._is_shut_down:
                return
            self._is_shut_down, self._ended_at_rest = True, self._scheduler.idle
            if self._membership is not None:
                self._membership.close()
            if self._listener is not None:
                self._listener.close()
            if self._watch is not None:
                self._watch.close()

    def _close_executor(self, executor: Executor) -> None:
        if executor not in self._closed:
            executor.close()
            self._closed.add(executor)

    def add_executor(self, executor: Executor) -> bool:
        """Add an executor, whose ops can be submitted from now on; the engine closes it. False if the engine is
        shutting down: the caller then owns the executor."""
        with self._lock:
            if self._closing:
                return False
            self._executors.update(dict.fromkeys(executor.routes, executor))
            if executor.event_fd >= 0:
                self._watched.append(executor)
                if self._watch is not None:
                    self._watch_executor(self._watch, executor)
        return True

    def wake(self) -> None:
        """Make the background thread begin its next turn now, which also calls ``housekeeping``. Any thread may call
        it."""
        with self._lock:
            if not self._closing and self._watch is not None:
                self._watch.wake()

    def populated(self, num_slots: int, last: bool) -> None:
        """Record that the first ``num_slots`` slots are populated; ``last``: the pool does not grow further. Any thread
        may call it."""
        self._growth.populated(num_slots, last)

    @property
    def growth(self) -> PoolGrowth:
        """Growth of the host pool, whose ``limit``, ``lower`` and ``raise_limit`` shrink it."""
        return self._growth

    def keep_slots(self, num_slots: int) -> None:
        """Record that ``num_slots`` slots were usable when the pool served another data plane. On the background
        thread."""
        self._growth.keep(num_slots)

    def _joined(self, link: AgentLink) -> None:
        self._growth.joined()

    def _left(self, link: AgentLink) -> None:
        if self._listener is not None and not isinstance(link, NodeLink):
            self._listener.lost(link.hello)

    # ---- the background thread --------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self._closing and self._scheduler.idle

    def _turn(self) -> None:
        """Do what is due. Every step is tried, also after one has failed; the first error is raised at the end."""
        first_error: Exception | None = None
        for step in (
            self._handle_events, self._take_results, self._resend, self._enforce_deadlines, self._fire, self._grow,
            self._run_background_work,
        ):
            try:
                step()
            except Exception as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    def _handle_events(self) -> None:
        assert self._watch is not None  # narrowing: start() has made it
        pause, self._pause_s = self._pause_s, self._scheduler.tick_s
        self._watch.turn(min(pause, self._scheduler.tick_s))

    def _resend(self) -> None:
        """Send messages that found a ring full, soon and again until they are sent."""
        with self._lock:
            late = [link for link in self._device.links if link.backlog]
            for link in late:
                link.flush()
            if not late:
                self._resend_s = _FIRST_RESEND_S
                return
        self._pause_s, self._resend_s = self._resend_s, min(_MAX_RESEND_S, 2 * self._resend_s)

    def _grow(self) -> None:
        self._growth.update(self._device.links, self._device.nodes_are_present)

    def _run_background_work(self) -> None:
        if self._housekeeping is None:
            return
        try:
            self._pause_s = min(self._pause_s, self._housekeeping())
        except Exception as error:
            self._log.write(logging.ERROR, "housekeeping failed", error)
