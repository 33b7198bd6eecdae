"""GPUDirect Storage: what a rank is told to move between files and its pages, over a socket of their own.

The rank does it (``flexkv.server.gds``), the controller decides and verifies. A message is one byte that names it, and
an array: FILES (descriptors come with it), MOVE and CANCEL go to the rank; STATUS (a text: why it cannot; empty: it
can) and RESULT come back. Either side hangs up when it is over.
"""

import errno
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("flexkv.transfer")

FILES, MOVE, CANCEL, STATUS, RESULT = (bytes([number]) for number in range(1, 6))

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


class GdsQueue:
    """Reads and writes between files and pages of a rank's GPU, with the interface of ``IoQueue``. The caller locks.

    Parameters
    ----------
    connection : socket
        To the rank; owned by the queue.
    files : sequence of int
        Descriptors; ``submit`` names them by their index.

    Attributes
    ----------
    event_fd : int
        Readable when ``take`` has news.
    ready : bool
        The rank has said that it can.
    closed : bool
        The rank is gone, or cannot; ``take`` has told what became of everything.
    """

    def __init__(self, connection: socket.socket, files: Sequence[int]) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.event_fd = connection.fileno()
        self.ready = self.closed = False
        self._waiting = np.empty(0, dtype=MOVE_DTYPE)
        self._sent = np.empty(0, dtype=np.uint64)
        self._cancelled = np.empty(0, dtype=np.uint64)      # before they were sent, and not told yet
        with suppress(OSError):                             # it is gone: ``take`` finds that
            socket.send_fds(connection, [FILES], list(files))

    def submit(
        self, kind: int, tags: NDArray[np.uint64], files: NDArray[np.int32], file_offsets: NDArray[np.int64],
        memory_offsets: NDArray[np.int64], size: int, fence: int,
    ) -> None:
        """As ``IoQueue.submit``; page i is at ``memory_offsets`` ``i * size``. Starts when the rank is at ``fence``."""
        moves = np.empty(len(tags), dtype=MOVE_DTYPE)
        moves["kind"], moves["fence"], moves["tag"], moves["file"] = kind, fence, tags, files
        moves["offset"], moves["page"] = file_offsets, memory_offsets // size
        self._waiting = np.concatenate([self._waiting, moves])
        self._send_more()

    def _send_more(self) -> None:
        moves = self._waiting[: MAX_BLOCKS - len(self._sent)]
        if len(moves) and self._send(MOVE, moves):
            self._waiting = self._waiting[len(moves) :]
            self._sent = np.append(self._sent, moves["tag"])

    def _send(self, name: bytes, content: NDArray[np.generic]) -> bool:
        try:
            self._connection.send(name + content.tobytes())
        except OSError:                                     # full: later; broken: ``take`` finds that
            return False
        return True

    def cancel(self, tags: NDArray[np.uint64]) -> None:
        """What has not begun ends with ECANCELED."""
        mine = np.isin(self._waiting["tag"], tags)
        self._cancelled = np.append(self._cancelled, self._waiting["tag"][mine])
        self._waiting = self._waiting[~mine]
        sent = self._sent[np.isin(self._sent, tags)]
        if len(sent):
            self._send(CANCEL, sent)

    def take(self) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint64]]:
        """As ``IoQueue.take``: tags, results (0 or a negative errno) and XXH3-64 of slots."""
        parts = []
        while not self.closed and (message := self._receive()) is not None:
            if message[:1] == RESULT:
                parts.append(np.frombuffer(message, RESULT_DTYPE, offset=1))
            elif message == STATUS:
                logger.info("GPUDirect Storage is in service")
                self.ready = True
            else:
                if message:
                    logger.error("GPUDirect Storage is not in service: %s", message[1:].decode(errors="replace"))
                self.close()
        found = np.concatenate([np.empty(0, RESULT_DTYPE), *parts])
        found = found[np.isin(found["tag"], self._sent)]
        self._sent = np.setdiff1d(self._sent, found["tag"], assume_unique=True)
        ended = np.zeros(len(self._cancelled), dtype=RESULT_DTYPE)
        ended["tag"], ended["result"] = self._cancelled, -errno.ECANCELED
        self._cancelled = self._cancelled[:0]
        if not self.closed:
            self._send_more()
        every = np.concatenate([found, ended])
        return every["tag"].copy(), every["result"].astype(np.int32), every["checksum"].copy()

    def _receive(self) -> bytes | None:
        try:
            return self._connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def busy(self) -> NDArray[np.uint64]:
        """Tags of what the rank may be at."""
        return self._sent

    def close(self) -> None:
        """Hang up; what is under way ends with ECANCELED. Can be called again."""
        self._cancelled = np.concatenate([self._cancelled, self._waiting["tag"], self._sent])
        self._waiting, self._sent = self._waiting[:0], self._sent[:0]
        self.ready, self.closed = False, True
        self._connection.close()
