"""Kinds of ops and their flags, as the records of a ring encode them (csrc/agent.h)."""

import enum

IN_PLACE = -2
"""Number in place of a host slot for a block that another op moves between a lower tier and the pages: the agent
reports it without a copy (FLEXKV_IN_PLACE of csrc/agent.h)."""


class OpKind(enum.IntEnum):
    """Source and destination of an op. The numbers of the first two are part of the device agent's protocol
    (csrc/agent.h); the others are not sent to agents."""

    D2H = 1
    """A save: from pages to host slots."""
    H2D = 2
    """A load: from host slots to pages."""
    STORE2H = 3
    """From the store of a lower tier to host slots: a promotion."""
    H2STORE = 4
    """From host slots to the store of a lower tier: a write-back."""
    ARRIVAL = 5
    """Copies nothing: a block completes when the blocks that it depends on have completed."""
    STORE2D = 6
    """From the store of a lower tier straight to the pages, without host memory (GPUDirect Storage)."""
    D2STORE = 7
    """From the pages straight to the store of a lower tier."""
    ERASE = 8
    """Copies nothing: clears the slots of a lower tier in ``dst``, so that they are empty also after a restart."""


class OpFlag(enum.IntFlag):
    """``enum flexkv_op_flag``."""

    CANCELLED = 1
    """The agent reports the blocks without copying them."""
    LAYERWISE = 2
    """The agent copies one span of layers after another."""
    MORE = 4
    """The op has further parts after this record."""
