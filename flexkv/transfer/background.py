"""A thread that survives the failures of its work."""

import logging
import threading
from collections.abc import Callable

from flexkv.transfer.repeated_log import RepeatedLog

logger = logging.getLogger("flexkv.transfer")

_MAX_FAILURES = 5
"""Number of consecutive failures after which the work is abandoned. With the pauses between them that takes 1.5 s."""

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 1.0
"""First and maximum pause after a failure, in seconds; the pause doubles with each consecutive failure."""


class BackgroundThread(threading.Thread):
    """Calls ``turn`` until ``stop``, whatever ``turn`` raises.

    Failures are logged at a bounded rate, and a pause follows each. After ``_MAX_FAILURES`` consecutive failures
    ``abandon`` is called; the thread continues to call ``turn``, because part of its work may still succeed.

    Parameters
    ----------
    name : str
    turn : callable
    is_over : callable
        Called between two turns; True ends the thread.
    abandon : callable
    """

    def __init__(
        self, name: str, turn: Callable[[], None], is_over: Callable[[], bool], abandon: Callable[[], None]
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._turn = turn
        self._is_over = is_over
        self._abandon = abandon
        self._halt = threading.Event()
        self._failures = 0
        self._log = RepeatedLog(logger)

    def run(self) -> None:
        while not self._halt.is_set() and not self._is_over():
            try:
                self._turn()
                self._failures = 0
            except BaseException as error:               # without the thread, deadlines and registration stop
                self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._failures += 1
        self._log.write(logging.ERROR, f"the data plane's thread has failed {self._failures} times in a row", error)
        if self._failures == _MAX_FAILURES:
            try:
                self._abandon()
            except BaseException as second:
                logger.critical("the data plane could not be taken out of service", exc_info=second)
        self._halt.wait(min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 5)))

    def stop(self) -> None:
        """End the thread after the current turn."""
        self._halt.set()
