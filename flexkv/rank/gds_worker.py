"""GPUDirect Storage on a rank: moves blocks between files and pages, as the controller requests."""

import errno
import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.device.cuda_driver import Device
from flexkv._core.device.staging import DeviceStaging
from flexkv._core.io.io_queue import READ, WRITE
from flexkv.errors import FlexKVError, GdsUnavailableError
from flexkv.protocol.gds import (
    CANCEL,
    FILES,
    MAX_FILES,
    MAX_MESSAGE_BYTES,
    MOVE,
    MOVE_DTYPE,
    REST,
    RESULT,
    RESULT_DTYPE,
    STATUS,
)
from flexkv.rank.cufile import MAX_BATCH, NUM_BATCHES, CuFile
from flexkv.rank.kernels import checksum_function, move_function

logger = logging.getLogger("flexkv.rank")

_STAGING_BYTES = 64 << 20
"""Maximum size of the staging buffer, in bytes of device memory. cuFile reads whole slots into it, and a kernel
scatters them to the pages."""

_CLOSE_S = 5.0
"""Maximum time that ``close`` waits for the GPU's copies, and for reads and writes of files, in seconds."""


class _Over(Exception):
    """The controller has closed the connection, or ``close`` was called."""


@dataclass
class _Flight:
    """Moves of one kind that were submitted to cuFile."""

    batch: int
    moves: NDArray[np.void]
    slots: NDArray[np.int32]                         # consecutive slots of the staging buffer
    checksums: NDArray[np.uint64] | None             # of the blocks written; None for reads


class GdsWorker:
    """A thread that moves blocks between files and the pages of this rank, until the controller closes the connection.

    A load reads a block into a staging buffer on the device and computes its checksum; a kernel then copies the block
    to its page. A save takes the same steps in reverse. The controller verifies the checksums. Two batches alternate,
    so that the disk is busy while the GPU processes the other batch.

    Parameters
    ----------
    connection : socket
        Connection to the controller's ``GdsQueue``; owned by this object.
    device : Device or None
        None: the pages are in host memory. The thread then reports to the controller that it cannot move blocks.
    regions : ndarray of REGION_DTYPE
        Regions of the pages, which must stay valid until ``close``.
    num_pages, slot_bytes : int
    num_ctas : int
        Number of thread blocks of the kernel.
    """

    def __init__(
        self, connection: socket.socket, device: Device | None, regions: NDArray[np.void], num_pages: int,
        slot_bytes: int, num_ctas: int,
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._device = device
        self._regions = regions
        self._num_pages = num_pages
        self._slot_bytes = slot_bytes
        self._num_ctas = num_ctas
        self._lock = threading.Lock()
        self._staging: DeviceStaging | None = None
        self._streams: list[int] = []                # the staging buffer's stream must wait for these
        self._fences = np.zeros(2, dtype=np.uint64)  # of loads, of saves
        self._pending = np.empty(0, dtype=MOVE_DTYPE)
        self._closing = False
        self._pages = threading.Lock()               # held while the thread accesses pages
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="flexkv-gds", daemon=True)
        self._thread.start()

    def advance(self, load: int, save: int, stream: int | None) -> None:
        """Let moves start whose fence is at most ``load`` or ``save``, after the work submitted to ``stream`` so far.

        Raises
        ------
        CudaError
        """
        with self._lock:
            if stream is not None:
                if self._staging is not None:
                    self._staging.follow(stream)
                else:
                    self._streams.append(stream)
            self._fences[:] = load, save
        if len(self._pending):                       # else no move waits for a fence
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> bool:
        """Stop the thread. Waits at most ``_CLOSE_S`` for the GPU and again for cuFile. Must be called once only.

        Returns
        -------
        bool
            True: the pages are not accessed any more. False: the GPU hangs, and the pages must stay valid until the
            process ends.
        """
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if not self._pages.acquire(timeout=_CLOSE_S):
            logger.error("the GPU has not finished its copies within %g s", _CLOSE_S)
            return False
        self._pages.release()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.warning("cuFile has not returned within %g s: a disk hangs", _CLOSE_S)
        else:
            os.close(self._wake_fd)
        return True

    # ---- on its thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        files: list[int] = []
        try:
            files = self._receive_files()
            self._serve(files)
        except _Over:
            pass
        except (FlexKVError, OSError) as error:
            logger.error("GPUDirect Storage is not in service: %s", error)
            self._say(STATUS + str(error).encode()[: MAX_MESSAGE_BYTES - 1])
        except Exception:
            logger.exception("GPUDirect Storage is not in service")
        finally:
            self._connection.close()
            for fd in files:
                os.close(fd)

    def _receive_files(self) -> list[int]:
        while True:
            self._wait_for(self._connection.fileno(), self._wake_fd)
            with suppress(BlockingIOError):          # woken by a fence, not by a message
                message, files, _, _ = socket.recv_fds(self._connection, 1, MAX_FILES, socket.MSG_CMSG_CLOEXEC)
                if message != FILES:
                    raise _Over
                return list(files)

    def _serve(self, files: list[int]) -> None:
        if self._device is None:
            raise GdsUnavailableError("the rank's tensors are not on a GPU")
        num_slots = NUM_BATCHES * max(1, min(MAX_BATCH, _STAGING_BYTES // (NUM_BATCHES * self._slot_bytes)))
        staging = DeviceStaging(
            self._device, self._regions, self._num_pages, self._slot_bytes, num_slots, move_function(self._device),
            checksum_function(self._device), self._num_ctas,
        )
        try:
            with self._device:
                cufile = CuFile(files, staging.address, num_slots * self._slot_bytes)
                try:
                    self._work(staging, cufile)
                finally:
                    if cufile.close():
                        self._say(REST)
        finally:
            with self._lock:
                self._staging = None
            staging.close()

    def _work(self, staging: DeviceStaging, cufile: CuFile) -> None:
        with self._lock:
            for stream in self._streams:
                staging.follow(stream)
            self._streams.clear()
            self._staging = staging
        self._say(STATUS)
        free = list(range(NUM_BATCHES))
        flights: deque[_Flight] = deque()
        while True:
            self._receive()
            while free and len(moves := self._next_batch(staging.num_slots // NUM_BATCHES)):
                flights.append(self._start(staging, cufile, free.pop(), moves))
            if flights:
                flight = flights.popleft()
                self._report(flight.moves["tag"], *self._finish(staging, cufile, flight))
                free.append(flight.batch)
            else:
                self._wait_for(self._connection.fileno(), self._wake_fd)

    def _wait_for(self, *fds: int) -> None:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        poll.poll()
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        if self._closing:
            raise _Over

    def _receive(self) -> None:
        """Receive all messages of the controller that have arrived."""
        while not self._closing:
            try:
                message = self._connection.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            if message[:1] == MOVE:
                self._pending = np.concatenate([self._pending, np.frombuffer(message, MOVE_DTYPE, offset=1)])
                self._refuse((self._pending["page"] < 0) | (self._pending["page"] >= self._num_pages))
            elif message[:1] == CANCEL:
                self._refuse(np.isin(self._pending["tag"], np.frombuffer(message, np.uint64, offset=1)))
            else:
                break                                # closed by the controller
        raise _Over

    def _refuse(self, which: NDArray[np.bool_]) -> None:
        """Drop pending moves and report ECANCELED for them: the disk has no fault."""
        tags, self._pending = self._pending["tag"][which], self._pending[~which]
        self._report(tags, np.full(len(tags), -errno.ECANCELED), np.zeros(len(tags), dtype=np.uint64))

    def _next_batch(self, limit: int) -> NDArray[np.void]:
        """Take the next moves of one kind that may start. Reads come first, because a request waits for them."""
        able = self._pending["fence"] <= self._fences[self._pending["kind"]]
        reads = able & (self._pending["kind"] == READ)
        chosen = np.flatnonzero(reads if reads.any() else able)[:limit]
        moves: NDArray[np.void] = self._pending[chosen]
        self._pending = np.delete(self._pending, chosen)
        return moves

    def _start(self, staging: DeviceStaging, cufile: CuFile, batch: int, moves: NDArray[np.void]) -> _Flight:
        write = bool(moves["kind"][0] == WRITE)
        first = batch * (staging.num_slots // NUM_BATCHES)
        slots = np.arange(first, first + len(moves), dtype=np.int32)
        checksums = None
        if write:
            with self._use_of_pages():
                staging.gather(slots, np.ascontiguousarray(moves["page"]))
            checksums = staging.checksums(first, len(moves))
        cufile.submit(
            batch, write, moves["file"], moves["offset"], slots.astype(np.uint64) * np.uint64(self._slot_bytes),
            self._slot_bytes,
        )
        return _Flight(batch, moves, slots, checksums)

    def _finish(
        self, staging: DeviceStaging, cufile: CuFile, flight: _Flight
    ) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        """Wait for a batch, and copy the blocks read to their pages; returns results and checksums."""
        results = cufile.wait(flight.batch)
        if flight.checksums is not None:
            return results, flight.checksums
        checksums = staging.checksums(int(flight.slots[0]), len(flight.slots))
        good = results == 0
        with self._use_of_pages():
            staging.scatter(flight.slots[good], flight.moves["page"][good])
        return results, checksums

    @contextmanager
    def _use_of_pages(self) -> Iterator[None]:
        with self._pages:
            if self._closing:
                raise _Over
            yield

    def _report(self, tags: NDArray[np.uint64], results: NDArray[np.integer], checksums: NDArray[np.uint64]) -> None:
        found = np.empty(len(tags), dtype=RESULT_DTYPE)
        found["tag"], found["result"], found["checksum"] = tags, results, checksums
        if len(found):
            self._say(RESULT + found.tobytes())

    def _say(self, message: bytes) -> None:
        """Send a message. The socket has room for it, because at most ``MAX_BLOCKS`` moves are in progress."""
        try:
            self._connection.send(message)
        except OSError as error:
            logger.debug("a message cannot be sent to the controller: %s", error)
