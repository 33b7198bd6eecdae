"""Why a match stopped where it did."""

import enum

from flexkv._core.index import radix


class Fate(enum.IntEnum):
    """Why a block that was once here is not; as the index keeps it: the reason, counted from what was never here."""

    EVICTED = radix.REASON_EVICTED - radix.REASON_NEVER_SEEN
    FAILED = radix.REASON_FAILED - radix.REASON_NEVER_SEEN
    EXPIRED = radix.REASON_EXPIRED - radix.REASON_NEVER_SEEN
    OVER_QUOTA = radix.REASON_OVER_QUOTA - radix.REASON_NEVER_SEEN
    NOT_ADMITTED = radix.REASON_NOT_ADMITTED - radix.REASON_NEVER_SEEN


CAME_BACK = frozenset(fate for fate in Fate if fate is not Fate.FAILED)
"""Of what is asked for again although it had gone."""


class StopReason(enum.IntEnum):
    """The first block that a match could not offer, and why."""

    FULL_HIT = radix.REASON_FULL_HIT
    NOT_READY = radix.REASON_NOT_READY
    """Another request is still writing it."""
    NEVER_SEEN = radix.REASON_NEVER_SEEN
    """Or so long ago that it is forgotten."""
    EVICTED = radix.REASON_EVICTED
    """It had to make room."""
    FAILED = radix.REASON_FAILED
    """It was written or read back with an error, and dropped."""
    EXPIRED = radix.REASON_EXPIRED
    """It was not used for longer than its namespace keeps blocks (``ttl_s``)."""
    OVER_QUOTA = radix.REASON_OVER_QUOTA
    """Its namespace had as much as it may have (``limit``)."""
    NOT_ADMITTED = radix.REASON_NOT_ADMITTED
    """It had to leave host memory, and was not on SSD: too unlikely to be used again, or too much was to be written."""
    NO_ROOM = 8
    """It is on SSD, and no slot of host memory can be had to load it through: all are in use."""
    TOO_SLOW = 9
    """It is on SSD, and computing it is sooner done than loading it, or loading is switched off."""
    OUT_OF_SERVICE = 10
    """It is on SSD, and that disk takes no reads or writes for now."""


STOP_REASONS = tuple(StopReason)
"""By number; sooner than ``StopReason(number)``."""
