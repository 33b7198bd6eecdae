"""Rate limit for a log line whose cause may recur thousands of times a second."""

import logging
import time

_INTERVAL_S = 10.0


class RepeatedLog:
    """Writes a line at most once in ``interval_s`` seconds, with the number of lines suppressed since the last one.

    Parameters
    ----------
    logger : logging.Logger
    interval_s : float
    """

    def __init__(self, logger: logging.Logger, interval_s: float = _INTERVAL_S) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._next = 0.0
        self._left_out = 0

    def write(self, level: int, text: str, error: BaseException | None = None) -> None:
        """Log ``text`` at ``level``, with the traceback of ``error`` if there is one."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        more = f" ({self._left_out} more lines like this since the last one)" if self._left_out else ""
        self._next, self._left_out = now + self._interval_s, 0
        self._logger.log(level, "%s%s", text, more, exc_info=error)
