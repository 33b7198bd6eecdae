"""A child process and its descendants. Its output is read line by line, and all of them can be ended at any time."""

import atexit
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from flexkv.errors import FlexKVError
from flexkv.tools.demo.ending_signals import EndingSignals
from flexkv.tools.demo.process_group import GRACE_S, signal_group, wait_for_group

_TERMINATE_S = 10.0
"""Time that the child has to end after SIGTERM, in seconds; then it gets SIGKILL."""

_KILL_S = 5.0
"""Maximum wait after SIGKILL, in seconds. Only a process in an uninterruptible system call takes longer."""

_SILENCE_S = 1800.0
"""Maximum time between two lines of the child, in seconds. An engine takes minutes to start on a busy machine."""


class ChildError(FlexKVError, RuntimeError):
    """The child process cannot be started, or hangs."""


class Child:
    """A child process in a separate session. A context manager, which must be used in the main thread.

    1. The child must first call ``flexkv.tools.demo.process_group.end_with_parent``. Its process group then ends with
       this process, however this process ends.
    2. A few seconds after the child has ended, the remaining processes of its group are killed, so that none keeps the
       pipe of ``lines`` open.
    3. At the end of the context, and at the latest when this process exits, the group gets SIGTERM, and SIGKILL if it
       does not end. All waits are bounded.

    Parameters
    ----------
    command : sequence of str
    log : Path
        File to which the child's standard error is appended.
    environment : mapping
    signals : EndingSignals
        Signals that are held while the child is started or ended.

    Raises
    ------
    ChildError
        On entry: the child cannot be started.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], signals: EndingSignals
    ) -> None:
        self._command = list(command)
        self._log = log
        self._environment = dict(environment)
        self._signals = signals
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._waiter = threading.Thread(target=self._wait_for_end, daemon=True)

    def __enter__(self) -> "Child":
        try:
            with self._signals.held():
                atexit.register(self.end)
                self._start()
        except BaseException:               # also a signal; __exit__ is not called then
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def lines(self) -> Iterator[str]:
        """Iterate over the lines of the child's standard output until it is closed.

        Raises
        ------
        ChildError
            The child has written no line for ``_SILENCE_S`` seconds.
        """
        output = self._running().stdout
        if output is None:
            return
        rest = b""
        while self._signals.wait_readable(output.fileno(), _SILENCE_S):
            if not (chunk := os.read(output.fileno(), 1 << 16)):
                if rest:
                    yield rest.decode(errors="replace")
                return
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") + "\n" for line in whole)
        raise ChildError(f"the engine has written nothing for {_SILENCE_S / 60:.0f} minutes")

    def status(self) -> int:
        """Exit status of the child, after ``lines`` has ended; negative: number of the signal that ended it.

        Raises
        ------
        ChildError
            The child has closed its output but does not end.
        """
        if not self._ended.wait(_TERMINATE_S):
            raise ChildError("the engine does not end")
        return self._running().wait(_KILL_S)

    def end(self) -> None:
        """End the child and its group. Can be called again."""
        with self._signals.held():
            if self._process is not None:
                self._stop(self._process)
            atexit.unregister(self.end)

    def _start(self) -> None:
        try:
            with self._log.open("ab") as errors:
                self._process = subprocess.Popen(
                    self._command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    env=self._environment, start_new_session=True,
                )
        except OSError as error:
            raise ChildError(f"{self._command[0]} cannot be started: {error.strerror}") from error
        self._waiter.start()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise ChildError("the engine has not been started")
        return self._process

    def _wait_for_end(self) -> None:
        """Wait for the child, then end its group. The child is not reaped, so that its number still names the group."""
        group = self._running().pid
        os.waitid(os.P_PID, group, os.WEXITED | os.WNOWAIT)
        wait_for_group(group, GRACE_S + 1.0)                           # a second longer than the watcher waits
        signal_group(group, signal.SIGKILL)
        self._ended.set()

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        if not self._ended.is_set():
            signal_group(process.pid, signal.SIGTERM)
        if not self._ended.wait(_TERMINATE_S):
            signal_group(process.pid, signal.SIGKILL)
            self._ended.wait(_KILL_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)
        self._waiter.join(_KILL_S)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
