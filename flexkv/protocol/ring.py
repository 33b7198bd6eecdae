"""Kinds of ops and their flags, as the records of a ring encode them (csrc/agent.h)."""

import enum


class OpKind(enum.IntEnum):
    """Source and destination of an op. The numbers of the first two are part of the device agent's protocol
    (csrc/agent.h); the others are not sent to agents."""

    D2H = 1
    H2D = 2
    DISK2H = 3
    H2DISK = 4
    ARRIVAL = 5
    """Copies nothing: a block completes when the blocks that it depends on have completed."""
    DISK2D = 6
    """GPUDirect Storage: from SSD to the GPU by the rank, without the host tier."""
    D2DISK = 7
    ERASE = 8
    """Copies nothing: clears the SSD slots in ``dst``, so that they are empty also after a restart."""


class OpFlag(enum.IntFlag):
    """``enum flexkv_op_flag``."""

    CANCELLED = 1
    """The agent reports the blocks without copying them."""
    LAYERWISE = 2
    """The agent copies one span of layers after another."""
    MORE = 4
    """The op has further parts after this record."""
