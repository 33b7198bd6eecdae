"""The controller's side of GPUDirect Storage: a rank (``flexkv.rank.gds_worker``) moves blocks, the controller decides
and verifies."""

import errno
import logging
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.gds import (
    CANCEL,
    FILES,
    MAX_BLOCKS,
    MAX_MESSAGE_BYTES,
    MOVE,
    MOVE_DTYPE,
    REST,
    RESULT,
    RESULT_DTYPE,
    STATUS,
)
from flexkv.protocol.peer_process import PeerProcess

logger = logging.getLogger("flexkv.storage")

_WRITE = 1
"""Number of a write, as in ``IoQueue``."""

_UNKNOWN_PROCESS_S = 10.0
"""Seconds from the hang-up of a rank whose end cannot be observed (no pidfd) until its writes count as ended."""


@dataclass(slots=True, eq=False)
class GdsEnd:
    """The controller's end of a rank's socket of GPUDirect Storage, and the rank's process; owns both."""

    connection: socket.socket
    process: PeerProcess

    def close(self) -> None:
        """Close the connection. May be called again."""
        self.connection.close()
        self.process.close()


class GdsQueue:
    """Reads and writes between files and pages of a rank's GPU, with the interface of ``IoQueue``. The caller must hold
    the store's lock.

    A rank that hung up may still write to the files, because cuFile's writes continue until its process has ended.
    Until then its writes are late (ESHUTDOWN) and ``busy``, so that their slots are not used for other blocks.

    Parameters
    ----------
    end : GdsEnd
        Connection to the rank; owned by the queue.
    files : sequence of int
        Descriptors; ``submit`` names them by their index.

    Attributes
    ----------
    event_fd : int
        Readable when ``take`` has results to report.
    ready : bool
        The rank has reported that GPUDirect Storage works.
    closed : bool
        The connection is closed, or the rank cannot use GPUDirect Storage. ``take`` reports the results of all blocks.
    """

    def __init__(self, end: GdsEnd, files: Sequence[int]) -> None:
        connection = end.connection
        connection.setblocking(False)
        self._process = end.process
        self._dying = np.empty(0, dtype=np.uint64)          # writes that the process may still do after it hung up
        self._hung_up_at = 0.0
        self._connection = connection
        self.event_fd = connection.fileno()
        self.ready = self.closed = False
        self._waiting = np.empty(0, dtype=MOVE_DTYPE)
        self._sent = np.empty(0, dtype=np.uint64)
        self._writes = np.empty(0, dtype=np.uint64)         # tags of the writes that were sent
        self._cancelled = np.empty(0, dtype=np.uint64)      # tags of cancelled blocks that are not reported yet
        with suppress(OSError):                             # the rank has ended: ``take`` reports that
            socket.send_fds(connection, [FILES], list(files))

    def submit(
        self, kind: int, tags: NDArray[np.uint64], files: NDArray[np.int32], file_offsets: NDArray[np.int64],
        memory_offsets: NDArray[np.int64], size: int, fence: int,
    ) -> None:
        """Submit as ``IoQueue.submit`` does; page i is at ``memory_offsets`` ``i * size``. The moves start when the
        rank has reached ``fence``."""
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
            self._writes = np.append(self._writes, moves["tag"][moves["kind"] == _WRITE])

    def _send(self, name: bytes, content: NDArray[np.generic]) -> bool:
        try:
            self._connection.send(name + content.tobytes())
        except OSError:                                     # full: sent later; broken: ``take`` reports that
            return False
        return True

    def cancel(self, tags: NDArray[np.uint64]) -> None:
        """End the blocks that have not begun with ECANCELED."""
        mine = np.isin(self._waiting["tag"], tags)
        self._cancelled = np.append(self._cancelled, self._waiting["tag"][mine])
        self._waiting = self._waiting[~mine]
        sent = self._sent[np.isin(self._sent, tags)]
        if len(sent):
            self._send(CANCEL, sent)

    def take(self) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint64]]:
        """Blocks that have ended, as ``IoQueue.take``: tags, results (0 or a negative errno) and XXH3-64 of slots."""
        parts = []
        while not self.closed and (message := self._receive()) is not None:
            if message[:1] == RESULT:
                parts.append(self._ended(np.frombuffer(message, RESULT_DTYPE, offset=1)))
            elif message == REST:
                self._writes = self._writes[:0]
            elif message == STATUS:
                logger.info("GPUDirect Storage is in service")
                self.ready = True
            else:
                if message:
                    logger.error("GPUDirect Storage is not in service: %s", message[1:].decode(errors="replace"))
                self.close()
        found = np.concatenate([np.empty(0, RESULT_DTYPE), *parts])
        ended = np.zeros(len(self._cancelled), dtype=RESULT_DTYPE)
        ended["tag"], ended["result"] = self._cancelled, -errno.ECANCELED
        ended["result"][np.isin(self._cancelled, self._dying)] = -errno.ESHUTDOWN
        self._cancelled = self._cancelled[:0]
        if not self.closed:
            self._send_more()
        every = np.concatenate([found, ended])
        return every["tag"].copy(), every["result"].astype(np.int32), every["checksum"].copy()

    def _ended(self, found: NDArray[np.void]) -> NDArray[np.void]:
        """Select the results of blocks that were sent to the rank, and remove these from the lists."""
        found = found[np.isin(found["tag"], self._sent)]
        self._sent = np.setdiff1d(self._sent, found["tag"], assume_unique=True)
        self._writes = np.setdiff1d(self._writes, found["tag"], assume_unique=True)
        return found

    def _receive(self) -> bytes | None:
        try:
            return self._connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def busy(self) -> NDArray[np.uint64]:
        """Tags of the blocks that the rank may still move."""
        if len(self._dying):
            over = time.monotonic() - self._hung_up_at > _UNKNOWN_PROCESS_S if self._process.fd < 0 else False
            if over or self._process.is_gone:
                self._dying = self._dying[:0]
                self._process.close()
        return np.concatenate([self._sent, self._dying])

    @property
    def at_rest(self) -> bool:
        """Whether the queue is closed and none of its blocks is ``busy``."""
        return self.closed and len(self.busy()) == 0

    def close(self) -> None:
        """Close the connection. Blocks under way end with ECANCELED, or ESHUTDOWN if the rank may still write them. May
        be called again."""
        if not self.closed:
            self._dying, self._hung_up_at = self._writes, time.monotonic()
        self._cancelled = np.concatenate([self._cancelled, self._waiting["tag"], self._sent])
        self._waiting, self._sent = self._waiting[:0], self._sent[:0]
        self.ready, self.closed = False, True
        self._connection.close()
        if len(self.busy()) == 0:
            self._process.close()
