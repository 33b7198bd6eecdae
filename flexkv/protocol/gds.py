"""GPUDirect Storage: what a rank is told to move between files and its pages, over a socket of its own.

A message is one byte that names it, and an array: FILES (descriptors come with it), MOVE and CANCEL go to the rank;
STATUS (a text: why it cannot; empty: it can) and RESULT come back, and REST at the end: nothing more is read or
written. Either side hangs up when it is over.
"""

import numpy as np

FILES, MOVE, CANCEL, STATUS, RESULT, REST = (bytes([number]) for number in range(1, 7))

MOVE_DTYPE = np.dtype([
    ("tag", "<u8"), ("offset", "<u8"), ("fence", "<u8"), ("file", "<i4"), ("page", "<i4"), ("kind", "<u8"),
])
"""``offset`` in bytes; ``kind`` as ``IoQueue`` names them; ``fence`` as in ``TransferOp``."""

RESULT_DTYPE = np.dtype([("tag", "<u8"), ("checksum", "<u8"), ("result", "<i8")])
"""``result``: 0 or a negative errno."""

MAX_BLOCKS = 256
"""That a rank has at a time: few enough that messages always fit a socket's buffer, and more than it does at once."""

MAX_MESSAGE_BYTES = 1 + MAX_BLOCKS * MOVE_DTYPE.itemsize
MAX_FILES = 250
"""Descriptors that one message can carry."""
