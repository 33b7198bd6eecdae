"""The engine's prefill rate, measured from the durations of its steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable

_MIN_TOKENS = 256
"""Minimum number of prompt tokens of a measured step: shorter steps do not represent a long prompt."""

_MAX_DECODED = 16
"""Maximum number of tokens in a step of a request that decodes, with or without speculation."""

_SAMPLES = 32
"""Number of steps whose median is the rate. A single slow step, for example on cold code, changes it little."""

_MAX_IN_FLIGHT = 16
"""Maximum number of steps in flight, even with pipeline parallelism. If there seem to be more, steps are not
reported."""


class PrefillRate:
    """Measures prompt tokens per second while the engine computes. Must be used by one thread only.

    A step begins when it is sent to the workers, or when the previous step has ended, whichever is later (asynchronous
    scheduling). It ends with its report. So idle time does not count.

    Parameters
    ----------
    clock : callable
        Returns monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight: deque[tuple[float, int]] = deque()     # time of sending, prompt tokens
        self._last_end = 0.0
        self._rates: deque[float] = deque(maxlen=_SAMPLES)

    def began(self, scheduled: Iterable[int]) -> None:
        """Record that a step with compute is sent to the workers. ``scheduled``: number of tokens of each request;
        empty if the step does not only compute, for example if it waits for a load."""
        if len(self._in_flight) == _MAX_IN_FLIGHT:
            self._in_flight.clear()
        self._in_flight.append((self._clock(), sum(tokens for tokens in scheduled if tokens > _MAX_DECODED)))

    def forget_steps(self) -> None:
        """Drop the steps in flight, because a step without compute is sent to the workers. It is reported only if a
        transfer ended in it, so the next report may be of either step."""
        self._in_flight.clear()

    def ended(self) -> float:
        """Record the report of the oldest step in flight; returns tokens per second, or 0 if the rate is unknown or has
        not changed."""
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
