"""Receives a rank's eventfds over SGLang's protocol (0.5.23, ``flexkv_connector.py``, ``_send_eventfds_to_worker``)."""

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
"""Maximum number of layers: a message passes one descriptor for each, and at most SCM_MAX_FD (<net/scm.h>)."""

_PAUSE_S = 0.1
"""Pause after a failed ``accept``, in seconds, for example when the process has no descriptor left."""

_CLOSE_S = 10.0
"""Maximum time that ``close`` waits for the thread, in seconds: more than the time limit of a connection's messages."""

_live: set[Path] = set()


class LayerSignals:
    """Listens for eventfds until ``close``. A rank connects once, and again if its first attempt failed.

    Parameters
    ----------
    path : Path
        Path of the socket.
    num_layers : int
        Number of registered layers; a rank with another number is refused.
    on_signals : callable
        Called with a list for each counter, which has one eventfd for each layer. The callee takes ownership of the
        eventfds unless it raises ValueError or OSError.

    Raises
    ------
    RegistrationError
        The socket cannot be created, or another client of this process listens at the path.
    """

    def __init__(self, path: Path, num_layers: int, on_signals: Callable[[list[list[int]]], None]) -> None:
        self._path = path
        self._num_layers = num_layers
        self._on_signals = on_signals
        self._closing = threading.Event()
        if path in _live:
            raise RegistrationError(
                f"another client of this process takes eventfds at {path}: give each client its own dp_client_id or "
                "pp_rank"
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
            logger.error("a rank's eventfds are refused, so its loads do not signal layers: %s", error)
            for fd in [fd for row in fds for fd in row]:
                os.close(fd)
            return
        try:
            connection.sendall(b"\x01")
        except OSError as error:
            logger.warning("a rank closed the connection before its eventfds were acknowledged: %s", error)

    def _receive(self, connection: socket.socket, fds: list[list[int]]) -> None:
        header = connection.recv(_HEADER.size, socket.MSG_WAITALL)
        if len(header) != _HEADER.size:
            raise RegistrationError("the rank closed the connection")
        _, _, num_layers, num_counters = _HEADER.unpack(header)
        if num_layers != self._num_layers or num_layers > _MAX_LAYERS or not 1 <= num_counters <= MAX_COUNTERS:
            raise RegistrationError(
                f"eventfds for {num_counters} counters of {num_layers} layers; {self._num_layers} layers are "
                f"registered, and 1 to {MAX_COUNTERS} counters are supported"
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
        if self._thread.is_alive():             # keep the listener open: the thread may still use its number
            logger.error("the thread that takes eventfds at %s has not ended within %g s", self._path, _CLOSE_S)
            return
        self._listener.close()
        self._path.unlink(missing_ok=True)
        _live.discard(self._path)
