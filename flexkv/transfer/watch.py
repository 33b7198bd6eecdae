"""Descriptors and timers that one thread waits for; each has a handler."""

import heapq
import itertools
import logging
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable

from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.transfer")

Handler = Callable[[], None]
OnError = Callable[[Exception], None]


class Watch:
    """Calls handlers when their descriptors are readable or their time has come.

    An exception of a handler affects its own descriptor only. It is logged, and ``on_error`` of the descriptor is
    called, which must stop watching it or change its state. All other handlers are called nevertheless.

    ``turn`` must be called by one thread; ``add``, ``remove``, ``wake`` and ``call_soon`` may be called by any.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        try:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._epoll.close()
            raise
        self._handlers: dict[int, tuple[Handler, OnError]] = {}
        self._timers: list[tuple[float, int, Handler]] = []
        self._calls: deque[Handler] = deque()
        self.spin_s = 0.0
        """Time for which ``turn`` polls, after the last event, before it sleeps, in seconds: a wake-up takes longer
        than most of the work that it is for."""
        self._last_event = -math.inf
        self._order = itertools.count()
        self._log = RepeatedLog(logger)
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def add(self, fd: int, handler: Handler, on_error: OnError) -> None:
        """Call ``handler`` whenever ``fd`` is readable or its peer has closed it, until ``remove``.

        A handler must check that its descriptor has an event: after a descriptor number is reused, a spurious call is
        possible.
        """
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler, on_error

    def remove(self, fd: int) -> None:
        """Stop watching ``fd``, which must be open still. Unknown ones are ignored, and all after ``close``."""
        if self._handlers.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def pause(self, fd: int, seconds: float) -> None:
        """Ignore ``fd`` for ``seconds``."""
        if fd in self._handlers:
            self._epoll.modify(fd, 0)
            self.after(seconds, lambda: self._resume(fd))

    def _resume(self, fd: int) -> None:
        if fd in self._handlers:
            self._epoll.modify(fd, select.EPOLLIN)

    def after(self, seconds: float, handler: Handler) -> None:
        """Call ``handler`` once, after ``seconds``. Must be called by the thread of ``turn``."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), handler))

    def wake(self) -> None:
        """End the wait of the current ``turn``, or of the next ``turn`` if none waits. Does nothing after ``close``."""
        if (fd := self._wake_fd) >= 0:
            os.eventfd_write(fd, 1)

    def call_soon(self, handler: Handler) -> None:
        """Call ``handler`` once, in the current ``turn`` or the next."""
        self._calls.append(handler)
        self.wake()

    def turn(self, timeout_s: float) -> None:
        """Wait for events, at most ``timeout_s`` seconds, and call their handlers."""
        if self._timers:
            timeout_s = min(timeout_s, self._timers[0][0] - time.monotonic())
        for fd, _ in self._poll(max(0.0, timeout_s)):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif fd in self._handlers:
                handler, on_error = self._handlers[fd]
                try:
                    handler()
                except Exception as error:
                    self._log.write(logging.ERROR, "an event could not be handled", error)
                    on_error(error)
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception as error:
                self._log.write(logging.ERROR, "a call could not be made", error)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def _poll(self, timeout_s: float) -> list[tuple[int, int]]:
        spin_until = self._last_event + self.spin_s
        while self.spin_s and timeout_s and time.monotonic() < spin_until:
            if events := self._epoll.poll(0):
                self._last_event = time.monotonic()
                return events
            os.sched_yield()
        events = self._epoll.poll(timeout_s)
        if events and self.spin_s:
            self._last_event = time.monotonic()
        return events

    def close(self) -> None:
        """Close the descriptors of this object. Watched descriptors stay open; their owners close them."""
        self._epoll.close()
        fd, self._wake_fd = self._wake_fd, -1
        os.close(fd)
