"""Reasons for which a match ends."""

import enum

from flexkv._core.index import radix


class MissReason(enum.IntEnum):
    """Reason for which the first missing block of a match is not available."""

    FULL_HIT = radix.REASON_FULL_HIT
    """No block is missing."""
    NOT_READY = radix.REASON_NOT_READY
    """Another request is still writing it."""
    NEVER_SEEN = radix.REASON_NEVER_SEEN
    """It was never seen, or its record has been overwritten since."""
    EVICTED = radix.REASON_EVICTED
    """It was evicted to make room."""
    FAILED = radix.REASON_FAILED
    """It was written or read back with an error, and dropped."""
    EXPIRED = radix.REASON_EXPIRED
    """It was not used for longer than its namespace keeps blocks (``ttl_s``)."""
    OVER_QUOTA = radix.REASON_OVER_QUOTA
    """Its namespace had reached its limit (``limit``)."""
    NOT_ADMITTED = radix.REASON_NOT_ADMITTED
    """It was evicted from host memory and was not on SSD: its reuse was too unlikely, or the write queue was full."""
    NO_ROOM = 8
    """It is on SSD, and no host slot is available to load it into: all are in use."""
    TOO_SLOW = 9
    """It is on SSD, and computing it is faster than loading it, or loading is switched off."""
    OUT_OF_SERVICE = 10
    """It is on SSD, in a directory that is offline."""


CAME_BACK = frozenset((MissReason.EVICTED, MissReason.EXPIRED, MissReason.OVER_QUOTA, MissReason.NOT_ADMITTED))
"""A second put of a block that was removed for one of these reasons is evidence of reuse."""

MISS_REASONS = tuple(MissReason)
"""All reasons by number. Indexing it is faster than ``MissReason(number)``."""
