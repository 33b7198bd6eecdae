"""Cost model of a source: how long reads of blocks from it take, as measured."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_KEEP = 0.8
"""Weight of earlier measurements when a read ends (exponential decay)."""

_STALE_S = 60.0
"""Seconds without a read after which the measured speed is discarded. Otherwise one slow measurement would prevent all
later reads, and so never be corrected."""


class CostModel:
    """Measures the speed of the reads from one source. The caller must serialize calls.

    Parameters
    ----------
    slot_bytes : int
        Bytes of a block.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(self, slot_bytes: int, clock: Callable[[], float]) -> None:
        self._slot_bytes = slot_bytes
        self._clock = clock
        self._bytes = self._seconds = self._busy_since = 0.0
        self._reads = 0

    @property
    def bytes_per_s(self) -> float:
        """Measured speed of reads: bytes per second of time in which a read was under way; 0: unknown."""
        return self._bytes / self._seconds if self._seconds > 0 and not self._is_stale() else 0.0

    def _is_stale(self) -> bool:
        return self._reads == 0 and self._clock() - self._busy_since > _STALE_S

    def read_began(self) -> None:
        """Record that a read has begun."""
        if self._is_stale():
            self._bytes = self._seconds = 0.0
        if self._reads == 0:
            self._busy_since = self._clock()
        self._reads += 1

    def read_ended(self, num_blocks: int) -> None:
        """Record that a read has ended, in which ``num_blocks`` blocks were read."""
        now = self._clock()
        self._bytes = _KEEP * self._bytes + num_blocks * self._slot_bytes
        self._seconds = _KEEP * self._seconds + now - self._busy_since
        self._busy_since = now
        self._reads -= 1

    def seconds(self, num_blocks: NDArray[np.integer]) -> NDArray[np.float64] | None:
        """(n,) float64: estimated time in seconds of reads of ``num_blocks`` ((n,) integers) blocks each; None:
        unknown."""
        speed = self.bytes_per_s
        return np.asarray(num_blocks, dtype=np.float64) * (self._slot_bytes / speed) if speed else None
