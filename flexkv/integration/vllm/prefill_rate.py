"""How fast the engine computes prompts, from the times of its steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable

_MIN_TOKENS = 256
"""Steps with fewer tokens of prompts say little about how fast a long one is."""

_MAX_DECODED = 16
"""A request that computes so few tokens in a step is decoding, with speculation or without."""

_SAMPLES = 32
"""Steps whose median is the rate: one that was held up, or ran on cold code, changes little."""

_MAX_IN_FLIGHT = 16
"""More steps are not under way, even with pipeline parallelism: if they seem to be, some are not reported."""


class PrefillRate:
    """Tokens of prompts a second, while the engine computes. For one thread.

    A step lasts from when it was sent out, or from when the one before it ended if that was later (asynchronous
    scheduling), until it is reported; so idle time does not count.

    Parameters
    ----------
    clock : callable
        Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight: deque[tuple[float, int]] = deque()     # sent out at, tokens of prompts
        self._last_end = 0.0
        self._rates: deque[float] = deque(maxlen=_SAMPLES)

    def began(self, scheduled: Iterable[int]) -> None:
        """A step with compute is sent out; ``scheduled``: how many tokens of each request. None of them if it does
        more than compute, such as to wait for a load."""
        if len(self._in_flight) == _MAX_IN_FLIGHT:
            self._in_flight.clear()
        self._in_flight.append((self._clock(), sum(tokens for tokens in scheduled if tokens > _MAX_DECODED)))

    def forget_steps(self) -> None:
        """A step without compute is sent out. It is reported only if a transfer ended in it: the next report may be
        its own, so what is under way is not measured."""
        self._in_flight.clear()

    def ended(self) -> float:
        """The oldest step under way is reported; returns tokens a second, 0: not known yet, or nothing new."""
        now = self._clock()
        if not self._in_flight:
            self._last_end = now
            return 0.0
        sent, tokens = self._in_flight.popleft()
        seconds = now - max(sent, self._last_end)
        self._last_end = now
        if tokens < _MIN_TOKENS or seconds <= 0:
            return 0.0
        self._rates.append(tokens / seconds)
        return statistics.median(self._rates)
