"""Why a match stopped where it did."""

import enum

from flexkv._core import radix


class StopReason(enum.IntEnum):
    """The first block that a match could not offer, and why."""

    FULL_HIT = radix.REASON_FULL_HIT
    NEVER_SEEN = radix.REASON_NEVER_SEEN
    EVICTED = radix.REASON_EVICTED
    NOT_READY = radix.REASON_NOT_READY
    """Another request is still writing it."""
    FAILED = radix.REASON_FAILED
    """It was written or read back with an error, and dropped."""
    NO_ROOM = 5
    """It is on SSD, and no slot of host memory can be had to load it through: all are in use."""
    TOO_SLOW = 6
    """It is on SSD, and computing it is sooner done than loading it, or loading is switched off."""
    OUT_OF_SERVICE = 7
    """It is on SSD, and that disk takes no reads or writes for now."""
