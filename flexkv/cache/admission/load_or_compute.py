"""Load or compute: the number of blocks on SSD that load faster than the engine computes them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_KEEP = 0.8
"""Weight of earlier measurements when a read ends (exponential decay)."""

_STALE_S = 60.0
"""Seconds without a read after which the measured speed is discarded. Otherwise one slow measurement would prevent all
later reads, and so never be corrected."""


class LoadOrCompute:
    """Decides how many blocks to load from SSD, and measures the speed of reads. The caller must serialize calls.

    Parameters
    ----------
    policy : str
        ``auto``, ``always`` or ``never``.
    slot_bytes : int
        Bytes of a block.
    tokens_per_block : int
    prefill_tokens_per_s : float
        Speed of the engine's prefill; 0: unknown, so that ``auto`` loads all blocks. May be set at any time.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self,
        policy: str,
        slot_bytes: int,
        tokens_per_block: int,
        prefill_tokens_per_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._slot_bytes = slot_bytes
        self._tokens_per_block = tokens_per_block
        self.prefill_tokens_per_s = prefill_tokens_per_s
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
        """Note that a read has begun."""
        if self._is_stale():
            self._bytes = self._seconds = 0.0
        if self._reads == 0:
            self._busy_since = self._clock()
        self._reads += 1

    def read_ended(self, num_blocks: int) -> None:
        """Note that a read has ended, and that ``num_blocks`` blocks were read."""
        now = self._clock()
        self._bytes = _KEEP * self._bytes + num_blocks * self._slot_bytes
        self._seconds = _KEEP * self._seconds + now - self._busy_since
        self._busy_since = now
        self._reads -= 1

    def worth(self, slow: NDArray[np.bool_], queued_blocks: int) -> int:
        """Number of leading blocks to load, of n consecutive blocks.

        Parameters
        ----------
        slow : (n,) bool
            Blocks that must be read from SSD.
        queued_blocks : int
            Blocks of other requests that are read from SSD first.
        """
        first = int(slow.argmax()) if slow.any() else len(slow)
        if self._policy == "never":
            return first
        speed, rate = self.bytes_per_s, self.prefill_tokens_per_s
        if first == len(slow) or self._policy == "always" or speed == 0 or rate == 0:
            return len(slow)
        load_s = (queued_blocks + np.cumsum(slow[first:])) * (self._slot_bytes / speed)
        compute_s = np.arange(1, len(slow) - first + 1) * (self._tokens_per_block / rate)
        sooner = np.flatnonzero(load_s <= compute_s)
        return first + (int(sooner[-1]) + 1 if len(sooner) else 0)
