"""Clients of the metrics' port that say nothing, too much, or nonsense."""

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import CollectorRegistry, Gauge

from flexkv.metrics.server import MAX_CONNECTIONS, MetricsServer
from tests.support.harness import until


@contextmanager
def serving() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Gauge("answer", "For tests", registry=registry).set(42)
    server = MetricsServer("127.0.0.1", 0, registry)
    yield server
    server.close()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), 5.0)


def scrape(server: MetricsServer) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5) as answer:
        return bytes(answer.read())


def test_idle_connections_do_not_pile_up() -> None:
    """Each took a thread and a descriptor of the engine, for ever."""
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with serving() as server, ExitStack() as clients:
        first = clients.enter_context(connect(server))
        for _ in range(3 * MAX_CONNECTIONS):
            clients.enter_context(connect(server))
        assert first.recv(1) == b""                      # the oldest is closed
        assert b"answer 42.0" in scrape(server)
        until(lambda: threading.active_count() <= threads + MAX_CONNECTIONS + 2)
    until(lambda: threading.active_count() == threads)
    until(lambda: len(os.listdir("/proc/self/fd")) == fds)


@pytest.mark.parametrize("text", [b"", b"\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET " + b"x" * 70_000, b"\0" * 1000])
def test_nonsense_harms_nobody(text: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        with connect(server) as client:
            client.sendall(text)
        with connect(server) as client:                  # closed by a reset, since the answer is not read
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"answer 42.0" in scrape(server)
    assert capfd.readouterr().err == ""


def test_two_servers_at_one_port() -> None:
    with serving() as server, pytest.raises(OSError, match="in use"):
        MetricsServer("127.0.0.1", server.server_port, CollectorRegistry())


def test_an_address_of_ipv6() -> None:
    try:
        server = MetricsServer("::1", 0, CollectorRegistry())
    except OSError as error:
        assert "assign" in str(error) or "support" in str(error)      # noqa: PT017  (a machine without IPv6)
        return
    assert server.server_port > 0
    server.close()
