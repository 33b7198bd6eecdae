"""Kinds of ops and their flags, as the records of a ring encode them (csrc/agent.h)."""

import enum

IN_PLACE = -2
"""Number in place of a host slot for a block that another op moves between a lower tier and the pages: the agent
reports it without a copy (FLEXKV_IN_PLACE of csrc/agent.h)."""


class OpKind(enum.IntEnum):
    """Source and destination of an op. The numbers of the first three are part of the device agent's protocol
    (csrc/agent.h); the others are not sent to agents."""

    D2H = 1
    """A save: from pages to host slots."""
    H2D = 2
    """A load: from host slots to pages."""
    P2D = 3
    """From the pages of the other ranks of an engine to the same pages of each rank: the second step of a load whose
    first step has filled a part of each copy on each rank."""
    STORE2H = 4
    """From the store of a lower tier to host slots: a promotion."""
    H2STORE = 5
    """From host slots to the store of a lower tier: a write-back."""
    ARRIVAL = 6
    """Copies nothing: a block completes when the blocks that it depends on have completed."""
    STORE2D = 7
    """From the store of a lower tier straight to the pages, without host memory (GPUDirect Storage)."""
    D2STORE = 8
    """From the pages straight to the store of a lower tier."""
    ERASE = 9
    """Copies nothing: clears the slots of a lower tier in ``dst``, so that they are empty also after a restart."""


class OpFlag(enum.IntFlag):
    """``enum flexkv_op_flag``."""

    CANCELLED = 1
    """The agent reports the blocks without copying them."""
    LAYERWISE = 2
    """The agent copies one span of layers after another."""
    MORE = 4
    """The op has further parts after this record."""
    SHARE = 8
    """The agent copies its part of each copy; a P2D of the same blocks follows, whose result is that of the load."""
