"""Records the times and block keys of requests, never their tokens, for ``flexkv replay``.

A file starts with a header, followed by one record for each request (little-endian):

=======  ==========================================================================================
header   ``<8sII d Q``: magic, version, tokens of a block, start (Unix time, s), check
record   ``<IIII d Q``: number of blocks shared with an earlier record, number of that record (from
         0), number of new blocks, 0, seconds since the start, check; then 64 bits of the key of each
         new block
=======  ==========================================================================================

Keys are chained over the prefix, so a request that begins like an earlier one consists of that request's first blocks
and of new blocks. If the recorder does not remember the earlier one, all blocks are stored as new, which only costs
space. ``check`` is XXH3-64 of all other bytes of the header or record. A record torn by a crash ends the trace.
"""

import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.checksum import xxh3_64
from flexkv.config import CacheConfig
from flexkv.errors import TraceError

logger = logging.getLogger("flexkv.metrics")

MAGIC = b"FlexKVtr"
VERSION = 1
_HEADER = struct.Struct("<8sIId")
_RECORD = struct.Struct("<IIIId")
_CHECK = struct.Struct("<Q")
_PREAMBLE = _RECORD.size + _CHECK.size

_CLOSE_S = 10.0
"""Longest wait of ``close`` for a disk that hangs."""

_FLUSH_S = 0.5
"""Interval between two writes. A request only copies its keys to the queue; it wakes up no thread."""

_QUEUED_KEYS = 4 << 20
"""Maximum number of keys that wait to be written (32 MiB). Requests beyond are dropped and counted."""

_MAX_SECONDS = 1e12
"""Largest time of a valid record, in seconds. No recorder runs for 30,000 years."""

_REMEMBERED_BITS = 20
"""Binary logarithm of the number of keys that are remembered to find blocks shared with earlier requests (12 MiB)."""


class Recorder(Protocol):
    """Records the requests of a controller. Thread safe; never raises, and waits for a disk only in ``close``."""

    def record(self, keys: NDArray[np.uint64]) -> None:
        """Record a request by the keys of its whole blocks ((n, 2) uint64, chained)."""

    def close(self) -> None:
        """Write all queued requests. May be called again."""


class NullRecorder:
    """Does not record requests."""

    def record(self, keys: NDArray[np.uint64]) -> None:
        """See ``Recorder``."""

    def close(self) -> None:
        """See ``Recorder``."""


def make_recorder(config: CacheConfig) -> Recorder:
    """Make the recorder that ``trace_path`` requires.

    Raises
    ------
    TraceError
        The file cannot be created.
    """
    if not config.trace_path:
        return NullRecorder()
    return TraceRecorder(Path(config.trace_path), config.tokens_per_block, config.trace_max_mb << 20)


class TraceRecorder:
    """Writes a trace in the background.

    Parameters
    ----------
    path : Path
        Path of the file. If it exists, ``.1`` is appended, and so on: no file is overwritten.
    block_tokens : int
    max_bytes : int
        Maximum size of the file; recording ends there.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self, path: Path, block_tokens: int, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self.path = _new_file(path)
        self._max_bytes = max_bytes
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._queue: deque[tuple[float, NDArray[np.uint64]]] = deque()
        self._queued_keys = 0
        self.dropped_requests = 0
        self._keys = np.zeros(1 << _REMEMBERED_BITS, dtype=np.uint64)
        self._records = np.zeros(1 << _REMEMBERED_BITS, dtype=np.uint32)
        self._num_records = self._written_bytes = 0
        self._is_over = False
        self._stop = threading.Event()
        self._write(_checked(_HEADER.pack(MAGIC, VERSION, block_tokens, time.time())))
        self._thread = threading.Thread(target=self._run, name="flexkv.metrics", daemon=True)
        self._thread.start()
        logger.info("recording requests in %s", self.path)

    def record(self, keys: NDArray[np.uint64]) -> None:
        """See ``Recorder``."""
        if self._is_over:
            return
        halves = np.array(keys[:, 0])
        with self._lock:
            if self._queued_keys + len(halves) > _QUEUED_KEYS:
                self.dropped_requests += 1
                return
            self._queued_keys += len(halves)
            self._queue.append((self._clock() - self._start, halves))

    def close(self) -> None:
        """See ``Recorder``."""
        self._stop.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():                  # it writes to the file, which stays open
            logger.error("%s is not complete: its disk has not answered within %g s", self.path, _CLOSE_S)
            return
        self._file.close()
        if self.dropped_requests:
            logger.warning("%s lacks %d requests, because the disk was too slow", self.path, self.dropped_requests)
            self.dropped_requests = 0

    def _run(self) -> None:
        while not self._stop.wait(_FLUSH_S):
            self._write_queued()
        self._write_queued()
        self._is_over = True

    def _write_queued(self) -> None:
        while self._queue and not self._is_over:
            with self._lock:
                seconds, keys = self._queue.popleft()
                self._queued_keys -= len(keys)
            self._write(self._pack(seconds, keys))

    def _pack(self, seconds: float, keys: NDArray[np.uint64]) -> bytes:
        """Make a record. If a key is remembered, all blocks before it are shared, too, because keys are chained."""
        places = (keys & np.uint64(len(self._keys) - 1)).astype(np.intp)
        known = np.flatnonzero(self._keys[places] == keys)
        shared = int(known[-1]) + 1 if len(known) else 0
        base = int(self._records[places[shared - 1]]) if shared else 0
        self._keys[places[shared:]] = keys[shared:]
        self._records[places[shared:]] = self._num_records
        self._num_records += 1
        new = keys[shared:].astype("<u8")
        return _checked(_RECORD.pack(shared, base, len(new), 0, seconds), new.tobytes())

    def _write(self, record: bytes) -> None:
        if self._written_bytes + len(record) > self._max_bytes:
            self._end(f"it has reached trace_max_mb ({self._max_bytes >> 20} MiB)")
            return
        try:
            if self._file.write(record) < len(record):
                self._end("the disk is full")
            self._written_bytes += len(record)
        except OSError as error:
            self._end(f"it cannot be written: {error.strerror}")

    def _end(self, why: str) -> None:
        self._is_over = True
        with self._lock:
            self._queue.clear()
        logger.warning("recording in %s has ended: %s", self.path, why)


def _new_file(path: Path) -> tuple[BinaryIO, Path]:
    """Create a new file that only its owner can read, because keys reveal which requests are equal."""
    number = 0
    while True:
        chosen = path if number == 0 else path.with_name(f"{path.name}.{number}")
        try:
            fd = os.open(chosen, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            number += 1
        except OSError as error:
            why = f"cannot be created: {error.strerror}; set trace_path to another file"
            raise TraceError(str(chosen), 0, why) from error
        else:
            return open(fd, "wb", buffering=0), chosen


def _checked(fields: bytes, payload: bytes = b"") -> bytes:
    return fields + _CHECK.pack(xxh3_64(fields + payload)) + payload


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """Contents of a file.

    Attributes
    ----------
    block_tokens : int
    seconds : list of float
        Time of each request, in seconds since the start of the recording.
    sequences : list of (k,) uint64
        For each request, 64 bits of the key of each of its blocks.
    """

    block_tokens: int
    seconds: list[float]
    sequences: list[NDArray[np.uint64]]


def read_recorded(content: bytes) -> Recorded | None:
    """Read all records up to the first invalid one; None: the file does not start with a header of this version."""
    view = memoryview(content)
    start = _HEADER.size + _CHECK.size
    if len(view) < start or _checked(content[: _HEADER.size]) != content[:start]:
        return None
    magic, version, block_tokens, _ = _HEADER.unpack_from(view)
    if magic != MAGIC or version != VERSION:
        return None
    seconds: list[float] = []
    sequences: list[NDArray[np.uint64]] = []
    while start + _PREAMBLE <= len(view):
        shared, base, count, _, second = _RECORD.unpack_from(view, start)
        stop = start + _PREAMBLE + 8 * count
        if stop > len(view) or _checked(view[start : start + _RECORD.size].tobytes(),
                                        view[start + _PREAMBLE : stop].tobytes()) != view[start:stop]:
            break
        if shared and (base >= len(sequences) or shared > len(sequences[base])):
            break
        if not abs(second) <= _MAX_SECONDS:                 # NaN too
            break
        new = np.frombuffer(view, dtype="<u8", count=count, offset=start + _PREAMBLE).astype(np.uint64)
        sequences.append(np.concatenate([sequences[base][:shared], new]) if shared else new)
        seconds.append(second)
        start = stop
    return Recorded(block_tokens, seconds, sequences)
