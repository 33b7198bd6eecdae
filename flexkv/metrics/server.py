"""The HTTP server of the metrics: no client can hold it up, or use up the engine's threads and descriptors."""

import errno
import logging
import socket
import threading
import time
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from flexkv.at_fork import close_in_children

logger = logging.getLogger("flexkv.metrics")

MAX_CONNECTIONS = 16
"""Served at a time. Beyond it the oldest is closed, since a client that is served needs milliseconds."""

_TIMEOUT_S = 10.0
"""A connection that says nothing for so long, or takes nothing of the answer, is closed."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""``accept`` fails, and the listener stays readable."""

_PAUSE_S = 0.2
"""Pause of the server while the process is out of descriptors or memory."""


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a request every few seconds is no news."""


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Serves a registry on a thread of its own, from the start until ``close``.

    Parameters
    ----------
    host, port : str, int
        Where to listen; 0: any port that is free.
    registry : CollectorRegistry

    Raises
    ------
    OSError, ValueError, OverflowError, RuntimeError
        The address, or a thread, cannot be had.
    """

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        self._connections: dict[socket.socket, None] = {}        # oldest first
        self._lock = threading.Lock()
        super().__init__((str(address[0]), port), _Handler)
        close_in_children(self.socket)
        self.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self.serve_forever, name="flexkv-metrics", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.server_close()
            raise

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; out of descriptors after a pause, for the server's loop tries again at once."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                time.sleep(_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection on a thread of its own."""
        close_in_children(request)
        with self._lock:
            self._connections[request] = None
            if len(self._connections) > MAX_CONNECTIONS:
                self._hang_up(next(iter(self._connections)))
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _hang_up(self, request: socket.socket) -> None:
        """End the thread that serves a connection. Under the lock."""
        del self._connections[request]
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError as error:                    # the client has left
            logger.debug("a connection ended before it was closed: %s", error)

    def _forget(self, request: socket.socket) -> None:
        with self._lock:
            self._connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client hung up, or was too slow; its scrape fails, and nothing else."""
        logger.debug("a request for metrics failed", exc_info=True)

    def close(self) -> None:
        """Serve nothing more, and hang up on all."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._lock:
            for request in list(self._connections):
                self._hang_up(request)
