"""What the records of a ring mean: kinds of ops and their flags (csrc/agent.h)."""

import enum


class OpKind(enum.IntEnum):
    """From where to where. The first two are numbers of the device agent's protocol (csrc/agent.h); the others are not
    sent to agents."""

    D2H = 1
    H2D = 2
    DISK2H = 3
    H2DISK = 4
    ARRIVAL = 5
    """Moves nothing: a block arrives when those have that it depends on."""
    DISK2D = 6
    """Straight from SSD to the GPU, by its rank."""
    D2DISK = 7
    ERASE = 8
    """Moves nothing: SSD slots (``dst``) hold nothing afterwards, also after a restart."""


class OpFlag(enum.IntFlag):
    """``enum flexkv_op_flag``: do not copy, only report; span after span; not the last part of the op."""

    CANCELLED = 1
    LAYERWISE = 2
    MORE = 4
