"""Messages of GPUDirect Storage: the controller requests moves between files and a rank's pages.

Each rank has a separate socket for them. A message is one byte that names it, then its content.

1. The controller sends FILES, with the descriptors of the files.
2. The rank replies with STATUS: an empty text if it can move blocks, else the reason.
3. The controller sends MOVE (MOVE_DTYPE) and CANCEL (tags, uint64); the rank replies with RESULT (RESULT_DTYPE).
4. The rank sends REST when it neither reads nor writes any more.

Either side ends the session by closing its end of the socket.
"""

import numpy as np

FILES, MOVE, CANCEL, STATUS, RESULT, REST = (bytes([number]) for number in range(1, 7))

MOVE_DTYPE = np.dtype([
    ("tag", "<u8"), ("offset", "<u8"), ("fence", "<u8"), ("file", "<i4"), ("page", "<i4"), ("kind", "<u8"),
])
"""One move. ``offset``: in the file, in bytes; ``kind``: READ or WRITE of ``IoQueue``; ``fence``: as in
``TransferOp``."""

RESULT_DTYPE = np.dtype([("tag", "<u8"), ("checksum", "<u8"), ("result", "<i8")])
"""Result of one move. ``result``: 0 or a negative errno."""

MAX_BLOCKS = 256
"""Maximum number of moves that a rank has at a time: more than it executes at once, and few enough that its messages
always fit a socket's buffer."""

MAX_MESSAGE_BYTES = 1 + MAX_BLOCKS * MOVE_DTYPE.itemsize
MAX_FILES = 250
"""Maximum number of descriptors in one message."""
