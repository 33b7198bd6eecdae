"""Membership of agents. An agent's memory accesses end with its farewell, or with the end of its process."""

import logging
from collections.abc import Callable
from functools import partial

from flexkv.errors import RingCorruptedError
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.executors.device import DeviceExecutor
from flexkv.transfer.graph import OpStatus
from flexkv.transfer.scheduler import Scheduler
from flexkv.transfer.watch import Watch

logger = logging.getLogger("flexkv.transfer")

_UNKNOWN_PROCESS_S = 10.0
"""Time from the hang-up of a process that cannot be watched (no pidfd) until its slots are freed, in seconds. Teardown
of a GPU process takes 50 ms to a few seconds."""

_PAUSE_S = 0.5
"""Pause after an event that could not be handled, in seconds."""


class Membership:
    """The agents of an engine, from registration until they can no longer access a slot.

    1. *Connected*: the agent takes ops.
    2. *Hung up without a farewell*: its process is dead or dying, and its GPU may still write. Graphs with blocks in
       progress there fail at once, so that waiting threads continue; their slots stay reserved.
    3. *At rest*: the agent has sent a farewell, or its process has ended. Its blocks have failed; their slots are free.

    Every method is called by the background thread, which holds the engine's lock or acquires it.

    Parameters
    ----------
    watch : Watch
    device : DeviceExecutor
    scheduler : Scheduler
    locked : callable
        ``locked(function)`` calls ``function`` under the engine's lock, and runs the callbacks that are due after that.
    on_join, on_leave : callable
        Called under the lock with each link that takes ops from now on, and with each link that takes none any more.
    """

    def __init__(
        self, watch: Watch, device: DeviceExecutor, scheduler: Scheduler, locked: Callable[[Callable[[], None]], None],
        on_join: Callable[[AgentLink], None], on_leave: Callable[[AgentLink], None],
    ) -> None:
        self._watch = watch
        self._device = device
        self._scheduler = scheduler
        self._locked = locked
        self._on_join = on_join
        self._on_leave = on_leave
        self._dying: list[AgentLink] = []
        self.is_closing = False
        """Whether the engine stops, so that agents are expected to leave."""

    def add(self, link: AgentLink) -> None:
        """Add an agent that has registered, and watch its connection, its results and its process."""
        handlers: dict[int, Callable[[], None]] = {
            link.connection.fileno(): partial(self._hear, link), link.rings.receiving_event_fd: link.clear_news,
            link.process.fd: partial(self._check, link),     # no hang-up if a child inherited the socket
        }
        try:
            for fd, handler in handlers.items():
                if fd >= 0:
                    self._watch.add(fd, handler, partial(self._failed, fd, link))
        except BaseException:
            for fd in handlers:
                self._watch.remove(fd)
            raise
        link.on_backlog = self._watch.wake
        self._locked(partial(self._join, link))

    def _join(self, link: AgentLink) -> None:
        self._device.add(link)
        self._on_join(link)

    def _failed(self, fd: int, link: AgentLink, error: Exception) -> None:
        """Disconnect the agent of a link whose event could not be handled; other agents are not affected."""
        ours = not isinstance(error, RingCorruptedError)
        link.disconnect(f"{type(error).__name__} in the controller" if ours else str(error))
        self._watch.pause(fd, _PAUSE_S)

    def _hear(self, link: AgentLink) -> None:
        """Handle a message or the hang-up of an agent."""
        if link.drain_event():
            self._locked(partial(self._leave, link))

    def _leave(self, link: AgentLink) -> None:
        link.drain()
        self._watch.remove(link.connection.fileno())
        self._watch.remove(link.rings.receiving_event_fd)
        self._device.detach(link)
        for op in self._device.exchanging(link.hello.dp_client_id):      # peers may read its pages
            op.is_lost = True
            self._scheduler.stop(op.task_id, OpStatus.FAILED)
        self._on_leave(link)
        if link.said_farewell or self.is_closing:
            logger.info("%s has left", link.name)
        else:
            logger.warning(
                "%s ended without a farewell: %d transfers have failed%s", link.name, len(link.ops),
                "; slots that it may still write stay reserved until it is gone" if link.busy else "",
            )
        if link.said_farewell or not link.busy:
            self._bury(link)
            return
        for op in link.ops:                          # at once, also where other ranks have not moved their blocks yet
            op.is_lost = True
            self._scheduler.stop(op.task_id, OpStatus.FAILED)
        if link.process.is_gone:
            self._bury(link)
            return
        self._dying.append(link)
        if link.process.fd < 0:
            self._watch.after(_UNKNOWN_PROCESS_S, lambda: self._locked(partial(self._bury, link)))

    def _check(self, link: AgentLink) -> None:
        """Handle the end of the link's process; the call may be spurious."""
        if not link.process.is_gone:
            return
        if link in self._dying:
            logger.info("%s is gone; its slots are free", link.name)
            self._locked(partial(self._bury, link))
        else:
            self._locked(partial(self._leave, link))

    def _bury(self, link: AgentLink) -> None:
        """Fail the blocks of an agent that can no longer access a slot, and free their slots."""
        if link in self._dying:
            self._dying.remove(link)
        self._watch.remove(link.process.fd)
        link.lose()
        link.close()

    def close(self) -> None:
        """Disconnect all agents; blocks that they have not reported fail. Must be called under the engine's lock, after
        its thread has ended."""
        for link in [*self._device.links, *self._dying]:
            self._device.detach(link)
            link.lose()
            link.close()
        self._dying.clear()
