"""Pinning of the host pool by a rank, without delaying the engine."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from flexkv.errors import CudaError

logger = logging.getLogger("flexkv.rank")

PAUSE_FACTOR = 4.0
"""Pause after a part, as a multiple of the time that the part took. While a part is pinned, the driver holds a lock
that kernel launches need; with this pause the lock is free four fifths of the time
(docs/design/0016-pool-start.md)."""

MAX_PAUSE_S = 0.25
"""Maximum pause, in seconds: a slow part on a busy machine must not delay the others by minutes."""

_FAST_PARTS = 4
"""Number of parts at the start that are pinned without a pause, so that the first blocks can be saved at once."""

_POLL_S = 0.02
"""Interval at which the extent of populated memory is read, in seconds: a tenth of the time that 1 GiB takes."""

_IDLE_FACTOR = 1.2
"""Factor by which this interval grows while nothing happens: the pool of a daemon may shrink at any time."""


class PinningAgent(Protocol):
    """The part of ``DeviceAgent`` that pinning uses."""

    @property
    def pinning(self) -> bool:
        """Whether ``pin_next`` has more to do, now or when the controller has populated more of the pool, or takes some
        back."""

    @property
    def pinned_slots(self) -> int:
        """Number of pinned slots, counted from the first slot of the pool."""

    def pin_next(self) -> bool:
        """Pin the next part of the populated memory, or unpin a part; False if there is none now. Raises CudaError."""


class PoolPinner:
    """Pins the pool part by part, behind the controller that populates it, with a pause after each part.

    Parameters
    ----------
    agent : PinningAgent
    pause : callable
        ``pause(seconds) -> bool``: waits at most ``seconds``; True: stop for good (``threading.Event.wait``).
    clock : callable
        Returns the time in seconds.
    """

    def __init__(
        self, agent: PinningAgent, pause: Callable[[float], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._agent = agent
        self._pause = pause
        self._clock = clock

    def run(self) -> None:
        """Pin until the pool is pinned, pinning fails, or the agent or ``pause`` ends it."""
        agent, began, num_parts, busy_s, idle_s = self._agent, self._clock(), 0, 0.0, _POLL_S
        while agent.pinning:
            start = self._clock()
            pinned = self._pin_next()
            took = self._clock() - start
            num_parts, busy_s = num_parts + pinned, busy_s + took * pinned
            idle_s = _POLL_S if pinned else min(_IDLE_FACTOR * idle_s, MAX_PAUSE_S)
            if pinned and num_parts <= _FAST_PARTS:
                took = 0.0
            if self._pause(min(PAUSE_FACTOR * took, MAX_PAUSE_S) if pinned else idle_s):
                return
        if num_parts:
            logger.info(
                "%d slots of the host pool pinned in %.1f s, in %d parts (%.1f s without pauses)",
                agent.pinned_slots, self._clock() - began, num_parts, busy_s,
            )

    def _pin_next(self) -> bool:
        try:
            return self._agent.pin_next()
        except CudaError as error:
            logger.warning(
                "the host pool cannot be pinned beyond slot %d, so copies from and to the rest are slow: %s; raise the "
                "limit of locked memory (ulimit -l) or set cpu_cache_gb lower", self._agent.pinned_slots, error,
            )
            return False
