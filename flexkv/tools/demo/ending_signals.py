"""Signals that end a command raise a single exception, so that they do not interrupt its clean-up."""

import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndingSignals:
    """Within its context, the first of SIGINT, SIGTERM and SIGHUP raises; the others are ignored.

    SIGINT raises KeyboardInterrupt, the others raise SystemExit with 128 + the signal. The clean-up that follows must
    have bounded waits, because further signals do not interrupt it. A signal that the process ignores stays ignored.
    Must be used in the main thread.
    """

    def __init__(self) -> None:
        self._first = 0
        self._raised = False
        self._held = 0
        self._before: dict[int, signal._HANDLER] = {}
        self._arrivals, self._waker = socket.socketpair()
        self._arrivals.setblocking(False)
        self._waker.setblocking(False)

    def __enter__(self) -> "EndingSignals":
        self._woken_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if (handler := signal.getsignal(number)) != signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first:
            return                               # the process ends: further signals stay ignored
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        self._arrivals.close()
        self._waker.close()

    def wait_readable(self, fd: int, timeout_s: float) -> bool:
        """Wait until a descriptor is readable; False after ``timeout_s`` seconds.

        A signal ends the wait even if it arrives just before the wait starts. Other waits of Python miss such a signal.
        """
        deadline, arrivals = time.monotonic() + timeout_s, self._arrivals.fileno()
        while True:
            readable = select.select([fd, arrivals], [], [], max(0.0, deadline - time.monotonic()))[0]
            if arrivals in readable:
                with suppress(BlockingIOError):
                    self._arrivals.recv(4096)    # the handler runs now; it raises unless signals are held
            elif not readable or fd in readable:
                return fd in readable

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals within the context: a signal that arrives raises at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._raise()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or number
        self._raise()

    def _raise(self) -> None:
        if self._first and not self._held and not self._raised:
            self._raised = True
            raise KeyboardInterrupt if self._first == signal.SIGINT else SystemExit(128 + self._first)
