"""The HTTP server of the metrics. No client can block it, or exhaust the engine's threads and descriptors."""

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
"""Maximum number of connections at a time. A further connection closes the oldest, because a healthy client needs only
milliseconds."""

_TIMEOUT_S = 10.0
"""Seconds after which a connection is closed whose client neither sends nor receives."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors after which the listener stays readable, so that ``accept`` fails again at once."""

_PAUSE_S = 0.2
"""Pause of the server while the process is out of descriptors or memory."""


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests: Prometheus sends one every few seconds."""


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Serves a registry on a thread of its own, from the start until ``close``.

    Parameters
    ----------
    host, port : str, int
        Address to listen at; port 0: any free port.
    registry : CollectorRegistry

    Raises
    ------
    OSError, ValueError, OverflowError, RuntimeError
        The address cannot be used, or no thread can be started.
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
        """Accept a connection. Pauses if the process is out of descriptors, because the server's loop retries at once.
        """
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
        """Shut a connection down, which ends its thread. Under the lock."""
        del self._connections[request]
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError as error:                    # the client has closed it
            logger.debug("a connection ended before it was closed: %s", error)

    def _forget(self, request: socket.socket) -> None:
        with self._lock:
            self._connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that hung up or was too slow. Only its own scrape fails."""
        logger.debug("a request for metrics failed", exc_info=True)

    def close(self) -> None:
        """Stop serving, and close all connections."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._lock:
            for request in list(self._connections):
                self._hang_up(request)
