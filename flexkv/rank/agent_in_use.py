"""An agent that is used by several threads, and released when none of them uses it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flexkv._core.device.agent import DeviceAgent

_WATCH_S = 0.1
"""Time between two looks at an agent whose end is waited for, in seconds."""


class AgentInUse:
    """The agent of a rank, or None. Thread safe.

    Attributes
    ----------
    agent : DeviceAgent or None
    must_leave : Event
        The agent must be released, though it runs.
    is_ending : bool
        An agent was released, and may still access pages.
    num_ended : int
        Agents that were released and access no page any more.
    """

    def __init__(self) -> None:
        self.agent: DeviceAgent | None = None
        self.must_leave = threading.Event()
        self.is_ending, self.num_ended = False, 0
        self._idle = threading.Condition()
        self._uses = 0

    @contextmanager
    def using(self) -> Iterator[DeviceAgent | None]:
        """The agent, which is not released meanwhile."""
        with self._idle:
            agent = self.agent
            self._uses += 1
        try:
            yield agent
        finally:
            with self._idle:
                self._uses -= 1
                if not self._uses:
                    self._idle.notify_all()

    def watch_peers(self, closing: threading.Event) -> None:
        """Release the memory of the agent's peers when the exchange is over. Returns then, or when the agent must end,
        or when ``closing`` is set."""
        agent = self.agent
        while agent is not None and agent.has_peers and agent.status == 0 and not self.must_leave.is_set():
            if closing.wait(_WATCH_S):
                return
            agent.release_peers()

    def wait_end(self, closing: threading.Event) -> bool:
        """Wait until the agent has ended or ``must_leave`` is set; False: ``closing`` was set before."""
        agent = self.agent
        while agent is not None and agent.status == 0 and not self.must_leave.is_set():
            if closing.wait(_WATCH_S):
                return False
        self.must_leave.clear()
        return True

    def release(self) -> DeviceAgent | None:
        """Take the agent away, and wait until no thread uses it. The caller closes it, and calls ``ended`` then."""
        with self._idle:
            self.is_ending = True
            agent, self.agent = self.agent, None
            while self._uses:
                self._idle.wait()
        return agent

    def ended(self) -> None:
        """Record that the agent that was released accesses no page any more."""
        with self._idle:
            self.num_ended += 1
            self.is_ending = False
