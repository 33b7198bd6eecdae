"""A rank finds its controller, introduces itself, and gets what its agent needs."""

import socket
import threading
import time
from pathlib import Path

from flexkv.errors import RegistrationError
from flexkv.transfer.protocol import MAX_MESSAGE_BYTES, NUM_FDS, Hello, Welcome

_RETRY_S = 0.05
"""Between two tries to connect, while the controller is not there yet: nothing tells when its socket appears."""


def join_controller(
    path: Path, hello: Hello, deadline: float, closing: threading.Event
) -> tuple[socket.socket, Welcome, list[int]]:
    """Connect and be welcomed, by ``deadline`` (``time.monotonic``), or until ``closing`` is set.

    Returns
    -------
    connection : socket
    welcome : Welcome
    fds : list of int
        As they come with a Welcome.

    Raises
    ------
    RegistrationError
        No controller is there, it refuses, or other ranks do not come.
    """
    connection = _reach(path, deadline, closing)
    try:
        message, fds = _introduce(connection, hello, deadline, closing)
        welcome = Welcome.unpack(message)
        if len(fds) not in (NUM_FDS, NUM_FDS + 1) or welcome.segment_bytes != hello.segment_bytes:
            raise RegistrationError("the controller's welcome does not fit what was registered")
    except BaseException:
        connection.close()
        raise
    return connection, welcome, fds


def _reach(path: Path, deadline: float, closing: threading.Event) -> socket.socket:
    while not closing.is_set():
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        except BaseException:
            connection.close()
            raise
        if time.monotonic() >= deadline:
            raise RegistrationError(f"no controller listens at {path}; start KVManager, or check the path")
        closing.wait(_RETRY_S)
    raise RegistrationError("closed while connecting")


def _introduce(
    connection: socket.socket, hello: Hello, deadline: float, closing: threading.Event
) -> tuple[bytes, list[int]]:
    connection.send(hello.pack())
    while not closing.is_set():
        connection.settimeout(min(0.2, max(0.01, deadline - time.monotonic())))
        try:
            message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, NUM_FDS + 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise RegistrationError("the other ranks did not register in time") from None
            continue
        if not message:
            raise RegistrationError("the controller hung up")
        return message, list(fds)
    raise RegistrationError("closed while connecting")
