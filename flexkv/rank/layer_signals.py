"""Takes a rank's eventfds, by the protocol of SGLang 0.5.23 (``flexkv_connector.py``, ``_send_eventfds_to_worker``)."""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from flexkv.errors import RegistrationError
from flexkv.protocol.layer_signals import MAX_COUNTERS
from flexkv.protocol.sockets import listen_at

logger = logging.getLogger("flexkv.rank")

_HEADER = struct.Struct("iiii")             # tp rank, tp size, layers, counters
_COUNTER = struct.Struct("i")
_TIMEOUT_S = 5.0
_MAX_LAYERS = 253
"""SCM_MAX_FD of <net/scm.h>: descriptors of one message."""

_PAUSE_S = 0.1
"""After the process ran out of descriptors."""

_CLOSE_S = 10.0
"""Longest wait for the thread at the end. It takes a connection's messages within their own time limit."""

_live: set[Path] = set()


class LayerSignals:
    """Listens until ``close``; a rank connects once, and again if its first try failed.

    Parameters
    ----------
    path : Path
        Of the socket.
    num_layers : int
        What was registered; a rank with another number of layers is refused.
    on_signals : callable
        Called with the eventfds of each counter, one a layer, which become the callee's unless it raises ValueError
        or OSError.

    Raises
    ------
    RegistrationError
        The socket cannot be had, or another client of this process listens there.
    """

    def __init__(self, path: Path, num_layers: int, on_signals: Callable[[list[list[int]]], None]) -> None:
        self._path = path
        self._num_layers = num_layers
        self._on_signals = on_signals
        self._closing = threading.Event()
        if path in _live:
            raise RegistrationError(
                f"another client of this process takes eventfds at {path}: give each its dp_client_id or pp_rank"
            )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listen_at(self._listener, path, 4)
        except RegistrationError:
            self._listener.close()
            raise
        except OSError as error:
            self._listener.close()
            raise RegistrationError(
                f"cannot listen for eventfds at {path}: {error.strerror or error}; set XDG_RUNTIME_DIR to a private "
                "folder with a short path"
            ) from error
        _live.add(path)
        self._thread = threading.Thread(target=self._serve, name="flexkv-signals", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    logger.error("a rank cannot connect to give its eventfds: %s", error)
                    self._closing.wait(_PAUSE_S)
                continue
            with connection:
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        fds: list[list[int]] = []
        try:
            connection.settimeout(_TIMEOUT_S)
            self._receive(connection, fds)
            self._on_signals(fds)
        except (OSError, ValueError) as error:
            logger.error("a rank's eventfds are refused, its layers are not told of: %s", error)
            for fd in [fd for row in fds for fd in row]:
                os.close(fd)
            return
        try:
            connection.sendall(b"\x01")
        except OSError as error:
            logger.warning("a rank went away before it was told that its eventfds were taken: %s", error)

    def _receive(self, connection: socket.socket, fds: list[list[int]]) -> None:
        header = connection.recv(_HEADER.size, socket.MSG_WAITALL)
        if len(header) != _HEADER.size:
            raise RegistrationError("the rank hung up")
        _, _, num_layers, num_counters = _HEADER.unpack(header)
        if num_layers != self._num_layers or num_layers > _MAX_LAYERS or not 1 <= num_counters <= MAX_COUNTERS:
            raise RegistrationError(
                f"eventfds for {num_counters} counters of {num_layers} layers; {self._num_layers} layers are registered"
            )
        for counter in range(num_counters):
            message, row, _, _ = socket.recv_fds(connection, _COUNTER.size, num_layers, socket.MSG_CMSG_CLOEXEC)
            fds.append(list(row))
            if len(message) != _COUNTER.size or _COUNTER.unpack(message)[0] != counter or len(row) != num_layers:
                raise RegistrationError(f"{len(row)} eventfds where those of counter {counter} were expected")

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():             # the listener stays open: its number must not become another's
            logger.error("the thread that takes eventfds at %s has not ended within %g s", self._path, _CLOSE_S)
            return
        self._listener.close()
        self._path.unlink(missing_ok=True)
        _live.discard(self._path)
