"""Registration of a rank: connect to the controller, send a HELLO, receive the descriptors for the agent."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flexkv._core.sealed_memory import check_sealed
from flexkv.errors import RegistrationError
from flexkv.protocol.registration import FAREWELL, MAX_WELCOME_BYTES, NUM_FDS, Hello, SegmentKind, Welcome
from flexkv.protocol.sockets import connect


def join_controller(
    path: Path, hello: Hello, deadline: float, closing: threading.Event
) -> tuple[socket.socket, Welcome, list[int]]:
    """Connect to the controller and register, until ``deadline`` (``time.monotonic``) or until ``closing`` is set.

    Returns
    -------
    connection : socket
    welcome : Welcome
    fds : list of int
        Descriptors of the Welcome; sizes and seals of the memory have been checked.

    Raises
    ------
    RegistrationError
        No controller listens, it refuses this rank, it does not answer in time, or other ranks do not register in time.
    """
    connection = connect(path, deadline, closing, wait_for_it=True)
    fds: list[int] = []
    try:
        message = _introduce(connection, hello, deadline, closing, fds)
        welcome = Welcome.unpack(message)
        if len(fds) not in (NUM_FDS, NUM_FDS + 1):
            raise RegistrationError(
                f"{len(fds)} of {NUM_FDS} descriptors arrived from the controller: raise this process's limit of open "
                "files (ulimit -n)"
            )
        _check_placements(welcome, hello)
        if len(fds) > NUM_FDS and (len(hello.segments) > 1 or len(hello.num_pages) > 1):
            raise RegistrationError(
                "the controller offers GPUDirect Storage to a rank with several segments or layer groups: its moves "
                "have one page a block"
            )
        check_sealed(fds[0], welcome.pool_bytes, "the host pool")
        check_sealed(fds[1], 2 * welcome.ring_bytes, "the memory of the rings")
    except BaseException:
        abandon(connection, fds)
        raise
    return connection, welcome, fds


def _check_placements(welcome: Welcome, hello: Hello) -> None:
    """Raise RegistrationError unless the placements are those of the segments of the HELLO."""
    expected = [place.segment_bytes for place in welcome.placements]
    declared = [claim.segment_bytes for claim in hello.segments]
    if expected != declared:
        raise RegistrationError(
            f"the controller expects segments of {expected} bytes a block; {declared} were registered"
        )
    for place, claim in zip(welcome.placements, hello.segments, strict=True):
        if claim.kind is SegmentKind.SHARD and (place.write_start, place.write_stop) != (0, claim.segment_bytes):
            raise RegistrationError("the controller lets this rank write only a part of a segment that it has alone")


def abandon(connection: socket.socket | None, fds: Sequence[int]) -> None:
    """Close the connection and descriptors of a controller. This process must not access any slot. Without the
    farewell, the controller would wait until this process ends."""
    for fd in fds:
        os.close(fd)
    if connection is not None:
        with suppress(OSError):
            connection.send(FAREWELL)
        connection.close()


def _introduce(
    connection: socket.socket, hello: Hello, deadline: float, closing: threading.Event, fds: list[int]
) -> bytes:
    connection.settimeout(0.2)
    connection.send(hello.pack())
    while not closing.is_set():
        connection.settimeout(min(0.2, max(0.01, deadline - time.monotonic())))
        try:
            message, received, _, _ = socket.recv_fds(
                connection, MAX_WELCOME_BYTES, NUM_FDS + 1, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise RegistrationError(
                    "the controller has not answered in time: a rank did not register, or the controller is stopped"
                ) from None
            continue
        except ConnectionError as error:
            raise RegistrationError(f"the controller closed the connection ({error.strerror}): see its log") from error
        fds += received
        if not message:
            raise RegistrationError("the controller closed the connection: see its log")
        return message
    raise RegistrationError("closed while connecting")
