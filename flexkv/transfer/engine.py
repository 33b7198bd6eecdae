"""TransferEngine: runs transfer graphs over executors, and makes sure that each of them ends."""

import itertools
import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from flexkv.config import TransferConfig
from flexkv.errors import CapacityError, TransferError
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout
from flexkv.transfer.device import AgentLink, DeviceExecutor
from flexkv.transfer.executor import ArrivalExecutor, Executor
from flexkv.transfer.graph import OpKind, OpStatus, TransferGraph
from flexkv.transfer.pool_growth import PoolGrowth
from flexkv.transfer.registry import Registry
from flexkv.transfer.scheduler import Observe, OnDone, Scheduler

logger = logging.getLogger("flexkv.transfer")

_SPIN_NS = 50_000
"""A waiter watches the rings so long before it sleeps: about the time that a 64 KiB block takes."""

_TICK_S = 1.0
"""Deadlines are looked at at least this often."""


class TransferEngine:
    """The data plane.

    ``submit``, ``cancel``, ``poll`` and ``wait`` may be called from any thread. Callbacks and ``on_done`` run on
    whichever thread finds the result, without the engine's lock. One background thread admits ranks, notices those
    that die, enforces deadlines, and finds results when nobody waits.

    Parameters
    ----------
    config : TransferConfig
    host_bytes : int
        Size of the host tier.
    num_slots : int, optional
        Slots of the host tier; default: as many as fit ``host_bytes``.
    ranks : int
        Device agents of each data-parallel client.
    dp_client_ids : tuple of int
    hugepage_bytes : int
        0: ordinary pages.
    on_capacity : callable
        Called with the number of usable slots as the pool grows, on a background thread.
    executors : sequence of Executor
        More executors, for other kinds of ops.
    housekeeping : callable, optional
        Called on the background thread whenever something has happened; returns in how many seconds it wants to be
        called next.
    on_control : callable
        ``on_control(message, descriptors) -> reply`` to a user who asks something of the controller, on the background
        thread.
    on_gds : callable, optional
        As in ``Registry``.
    observe : Observe, optional
        As in ``Scheduler``.

    Attributes
    ----------
    task_ids : iterator of int
        Where graphs get their ids from.
    """

    def __init__(
        self,
        config: TransferConfig,
        *,
        host_bytes: int,
        num_slots: int | None = None,
        ranks: int = 1,
        dp_client_ids: tuple[int, ...] = (0,),
        hugepage_bytes: int = 0,
        on_capacity: Callable[[int], None],
        executors: tuple[Executor, ...] = (),
        housekeeping: Callable[[], float] | None = None,
        on_control: Callable[[bytes, Sequence[int]], bytes] = lambda message, fds: b"{}",
        on_gds: Callable[[socket.socket], None] | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._config = config
        self._host_bytes = host_bytes
        self._num_slots = num_slots
        self._ranks = ranks
        self._clients = dp_client_ids
        self._hugepage_bytes = hugepage_bytes
        self._growth = PoolGrowth(on_capacity, self.wake, self.notify)
        self._housekeeping = housekeeping
        self._on_control = on_control
        self._on_gds = on_gds
        self.task_ids = itertools.count(1)
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._device = DeviceExecutor(ranks)
        self._executors: dict[OpKind, Executor] = {
            kind: executor for executor in (*executors, ArrivalExecutor(), self._device) for kind in executor.kinds
        }
        self._watched = [executor for executor in executors if executor.event_fd >= 0]
        self._scheduler = Scheduler(self._executors, observe, self._device.reached)
        self._pool: HostPool | None = None
        self.content = b""
        """What the bytes of the pool's slots mean (``SlotLayout.content``); empty before it is made."""
        self._registry: Registry | None = None
        self._thread: threading.Thread | None = None
        self._closing = self._stopped = False
        self._epoll: select.epoll | None = None
        self._wake_fd = -1
        self._links: dict[int, AgentLink] = {}      # by socket and by eventfd descriptor

    # ---- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen for ranks, and return.

        Raises
        ------
        RegistrationError
            The socket cannot be had.
        """
        self._registry = Registry(
            self._config.gpu_register_port,
            self._clients,
            self._ranks,
            self._make_pool,
            self._config.handshake_timeout_s,
            self._config.ring_bytes,
            self._add_link,
            self._on_control,
            self._on_gds,
        )
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll.register(self._registry.listener.fileno(), select.EPOLLIN)
        for executor in self._watched:
            self._epoll.register(executor.event_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="flexkv-transfer", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Every rank is registered and has pinned the usable slots, and the host pool exists."""
        registry = self._registry
        return registry is not None and not self._closing and registry.complete and self._growth.complete

    def describe_ranks(self) -> str:
        """How many ranks are connected, in words; empty before ``start`` and after ``shutdown``."""
        return "" if self._registry is None or self._closing else self._registry.describe()

    @property
    def num_pages(self) -> int | None:
        """Pages of the rank that has the fewest; None: no rank is connected."""
        return min((link.hello.num_pages for link in list(self._device.links)), default=None)

    @property
    def host_pool(self) -> HostPool:
        """The host tier, once the first client's ranks have registered."""
        if self._pool is None:
            raise TransferError("no rank has registered yet, so there is no host pool")
        return self._pool

    def shutdown(self) -> None:
        """Cancel everything, hang up on the agents, give the memory back. Can be called again."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            unfinished = self._scheduler.running()
        for task_id in unfinished:
            self.cancel(task_id)
        if self._thread is not None:
            self.wait(lambda: self._scheduler.idle, self._config.handshake_timeout_s)
            self._stopped = True
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
        with self._lock:
            for link in list(self._device.links):
                self._device.remove(link)
                link.close()
            if self._registry is not None and self._epoll is not None:
                self._registry.close()
                self._epoll.close()
                os.close(self._wake_fd)
        self._fire()
        for executor in set(self._executors.values()):
            executor.close()
        if self._pool is not None:
            self._pool.close()

    def add_executor(self, executor: Executor) -> bool:
        """Take ops of more kinds; False, and nothing is done, if the engine is shutting down."""
        with self._lock:
            if self._closing:
                return False
            self._executors.update(dict.fromkeys(executor.kinds, executor))
            if executor.event_fd >= 0:
                self._watched.append(executor)
                if self._epoll is not None:
                    self._epoll.register(executor.event_fd, select.EPOLLIN)
        return True

    def wake(self) -> None:
        """Let the background thread look around, and call ``housekeeping``."""
        with self._lock:
            if not self._closing and self._epoll is not None:
                os.eventfd_write(self._wake_fd, 1)

    def notify(self) -> None:
        """Let ``wait`` look at its predicate again."""
        with self._lock:
            self._news.notify_all()

    def _make_pool(self, layout: SlotLayout) -> HostPool:
        slot_bytes, self.content = layout.slot_bytes, layout.content
        num_slots = self._num_slots if self._num_slots is not None else self._host_bytes // slot_bytes
        pool = HostPool(slot_bytes, num_slots, self._hugepage_bytes)
        self._pool = pool
        pool.populate(self._growth.populated)
        return pool

    def _add_link(self, link: AgentLink) -> None:
        assert self._epoll is not None  # narrowing: only the background thread comes here
        with self._lock:
            self._device.add(link)
            self._growth.joined()
            for fd in (link.connection.fileno(), link.rings.completion_event_fd):
                self._links[fd] = link
            self._news.notify_all()
        self._epoll.modify(link.connection.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        self._epoll.register(link.rings.completion_event_fd, select.EPOLLIN)

    # ---- graphs -----------------------------------------------------------------------------------------------

    def submit(self, graph: TransferGraph, on_done: OnDone, background: bool = False) -> None:
        """Run a graph. ``on_done(graph)`` is called once, when it is quiesced: every block has its result, and
        nothing touches its slots or pages any more. ``graph.status`` may be final before.

        A ``background`` graph has no deadline: nobody waits for it, and its executor bounds each block."""
        with self._lock:
            limit_s = math.inf if background else self._config.op_timeout_s
            self._scheduler.submit(graph, on_done, limit_s, OpStatus.CANCELLED if self._closing else None)
        self._fire()

    def cancel(self, task: int | TransferGraph) -> None:
        """Start nothing more of a graph, given by its id or itself; blocks that are being copied are finished. Unknown
        or ended graphs are left alone. A graph that is submitted later, by another thread, starts nothing."""
        with self._lock:
            if isinstance(task, TransferGraph):
                self._scheduler.stop_graph(task, OpStatus.CANCELLED)
            else:
                self._scheduler.stop(task, OpStatus.CANCELLED)
            self._news.notify_all()
        self._fire()

    def _fire(self) -> None:
        """Run callbacks that are due, and tell those who wait."""
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
        """Take in results that are there, and run their callbacks; does not wait."""
        with self._lock:
            for link in list(self._device.links):
                link.drain()
            self._drain_executors()
        self._fire()

    def _drain_executors(self) -> None:
        """Take in their results, under the lock. One that fails in it takes nothing more, and what it had fails."""
        for executor in list(self._watched):
            try:
                executor.drain()
            except Exception:
                logger.exception("results could not be taken in: %s is given up", type(executor).__name__)
                self._watched.remove(executor)
                executor.give_up()

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
        """Watch the rings for a short while: for a small block that is sooner than being woken."""
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

    # ---- the background thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._epoll is not None  # narrowing: start() has made it
        pause = 0.0
        while not self._closing or not self._scheduler.idle:
            events = self._epoll.poll(min(pause, self._time_to_next_deadline()))
            for fd, _ in events:
                self._handle(fd)
            with self._lock:
                links = list(self._device.links)
                for link in links:
                    while link.drain() or link.rings.set_waiting(True):
                        if not link.healthy:
                            break
                self._drain_executors()
                self._enforce_deadlines()
            self._fire()
            self._growth.update(links)
            pause = self._keep_house()
            if self._stopped:
                return

    def _keep_house(self) -> float:
        try:
            return self._housekeeping() if self._housekeeping is not None else _TICK_S
        except Exception:
            logger.exception("housekeeping failed")
            return _TICK_S

    def _time_to_next_deadline(self) -> float:
        assert self._registry is not None  # narrowing
        deadline = self._registry.next_deadline()
        return min(self._scheduler.tick_s, math.inf if deadline is None else max(0.0, deadline - time.monotonic()))

    def _handle(self, fd: int) -> None:
        assert self._registry is not None and self._epoll is not None  # narrowing
        if fd == self._registry.listener.fileno():
            self._registry.accept(self._epoll)
        elif self._registry.owns(fd):
            try:
                self._registry.readable(fd, self._epoll)
            except CapacityError as error:
                logger.error("%s", error)
        elif fd == self._wake_fd:
            os.eventfd_read(fd)
        elif fd in self._links:
            link = self._links[fd]
            if fd == link.connection.fileno():
                self._lose(link)
            else:
                os.eventfd_read(fd)

    def _lose(self, link: AgentLink) -> None:
        """An agent hung up: its process has ended, or it has stopped for good."""
        assert self._registry is not None and self._epoll is not None  # narrowing
        logger.warning("agent of %s is gone; what it was moving has failed", link.hello)
        with self._lock:
            link.drain()
            for fd in (link.connection.fileno(), link.rings.completion_event_fd):
                self._epoll.unregister(fd)
                del self._links[fd]
            self._device.remove(link)
            self._registry.lost(link.hello)
            link.close()

    def _enforce_deadlines(self) -> None:
        assert self._registry is not None and self._epoll is not None  # narrowing
        self._registry.drop_silent(self._epoll)
        for task_id, reason in self._scheduler.late(time.monotonic()):
            logger.error("task %d: %s", task_id, reason)
            self._scheduler.stop(task_id, OpStatus.TIMEOUT)
            self._news.notify_all()
