"""Record of the puts and gets that end before a lower tier is open, for its write-back."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.admission.write_back import WriteBack
from flexkv.cache.plan import PutPlan

_MAX_KEYS = 1 << 22
"""Maximum total length of the recorded sequences: 64 MiB of keys. Beyond it the oldest are dropped, as their blocks are
the likeliest to be evicted before the tier is open."""

Event = PutPlan | NDArray[np.uint64]
"""A put that has ended, or the keys ((n, 2) uint64) of a sequence that was loaded."""


class EarlyTraffic:
    """A bounded record of events, oldest first. The caller must serialize calls.

    Attributes
    ----------
    num_blocks : int
        Blocks that were put or loaded by the events.
    """

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._events: deque[Event] = deque()
        self._num_keys = self.num_blocks = 0

    def add(self, event: Event) -> None:
        """Record an event for ``replay``; drops the oldest events beyond the maximum."""
        self._events.append(event)
        self._num_keys += _num_keys(event)
        self.num_blocks += len(event)
        while self._num_keys > self._max_keys:
            self._take()

    def _take(self) -> Event:
        event = self._events.popleft()
        self._num_keys -= _num_keys(event)
        self.num_blocks -= len(event)
        return event

    def clear(self) -> None:
        """Drop all events, as after a reset of the index."""
        self._events.clear()
        self._num_keys = self.num_blocks = 0

    def replay(self, writer: WriteBack) -> None:
        """Report the oldest events to the writer, as long as its queue has room, and remove them. The writer applies
        its own admission rules."""
        while self._events and writer.has_room(len(self._events[0])):
            event = self._take()
            if isinstance(event, PutPlan):
                writer.put(event)
            else:
                writer.hit(event)


def _num_keys(event: Event) -> int:
    return len(event.keys) if isinstance(event, PutPlan) else len(event)
