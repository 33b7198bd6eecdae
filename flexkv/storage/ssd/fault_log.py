"""Fault counters of a store, by kind, with log lines at a bounded rate."""

import logging
import threading
import time

logger = logging.getLogger("flexkv.storage")

_INTERVAL_S = 10.0
"""Minimum interval between two log lines of one kind. A line gives the number of faults since the line before."""


class FaultLog:
    """Counters by kind. All ``kinds`` are counted from the start, so that a metric exists before its first fault."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self.counts = dict.fromkeys(kinds, 0)
        self._logged = dict.fromkeys(kinds, (float("-inf"), 0))     # when, and the count then

    def add(self, kind: str, count: int, where: object, detail: str = "") -> None:
        """Count ``count`` faults, and log them unless the last line of this kind is too recent."""
        if count == 0:
            return
        with self._lock:
            self.counts[kind] += count
            when, before = self._logged[kind]
            now = time.monotonic()
            if now - when < _INTERVAL_S:
                return
            self._logged[kind] = (now, self.counts[kind])
            new = self.counts[kind] - before
        logger.warning("%s: %s %d times%s", where, kind.replace("_", " "), new, f"; {detail}" if detail else "")
