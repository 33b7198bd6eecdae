"""Requests of a user to a running controller, over the socket where ranks register: pin, unpin and list prefixes.

A connection carries one request and one reply. A request is ``FLEXKVC1``, followed by one of these JSON objects:

* ``{"command": "pin", "name": NAME, "namespace": [NAME, ...], "num_tokens": N}``, with the descriptor of a sealed memfd
  that holds the tokens (uint32). An entry of the namespace is a tenant's NAME or ``KIND:NAME``
  (``NamespaceEntry.parse``).
* ``{"command": "unpin", "name": NAME}``
* ``{"command": "pins"}``; with ``"after": NAME`` the list begins after that name.

The reply is ``{"pins": [[NAME, BLOCKS], ...], "more": BOOL}`` or ``{"error": TEXT}``. It lists the prefixes that the
request pinned or unpinned, or all pinned prefixes. ``more`` is true if the list is cut; another request returns the
prefixes after its last name. A refused request has changed nothing.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.errors import FlexKVError, PinError
from flexkv.protocol.registration import MAX_MESSAGE_BYTES
from flexkv.protocol.sockets import connect, socket_path

_MAGIC = b"FLEXKVC1"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MAX_REPLY_BYTES = 1 << 17

PINS_PER_REPLY = 64
"""Maximum number of pins in one reply. A name has at most 128 bytes, or 256 in JSON, so the reply fits a socket's
buffer."""

MAX_TOKENS = 1 << 22
"""Maximum number of tokens of one prefix: the controller hashes them in a few milliseconds."""

_TIMEOUT_S = 10.0
"""Maximum time that a user waits for the connection, and for the reply, in seconds."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned prefix: its name and its number of blocks."""

    name: str
    num_blocks: int


def is_request(message: bytes) -> bool:
    """Whether a connection's first message is a user's request, not a rank's HELLO."""
    return message[:7] == _MAGIC[:7]


def parse_request(message: bytes) -> dict[str, Any]:
    """Parse the JSON object of a request; PinError if the message has none, or is of another version. The fields are
    not checked."""
    if message[:8] != _MAGIC:
        raise PinError("the request is of another version of FlexKV: use the flexkv command of the controller's "
                       "version")
    try:
        request = json.loads(message[8:])
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise PinError(f"the request is no JSON object of at most {MAX_MESSAGE_BYTES} bytes")
    return request


def read_tokens(fds: Sequence[int], count: int) -> NDArray[np.uint32]:
    """(count,) uint32: read the tokens of a request from its descriptor. PinError unless there is one descriptor, of a
    sealed memfd of 4 * ``count`` bytes."""
    if not 1 <= count <= MAX_TOKENS:
        raise PinError(f"the prefix has {count} tokens: give 1 to {MAX_TOKENS}")
    try:
        sealed = len(fds) == 1 and fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or os.fstat(fds[0]).st_size != 4 * count:     # sealed memory cannot change, so no read can hang
        raise PinError(f"{count} tokens must come in a sealed memfd of {4 * count} bytes")
    return np.frombuffer(os.pread(fds[0], 4 * count, 0), dtype=np.uint32)


def ask(port: str, request: dict[str, Any], tokens: NDArray[np.uint32] | None = None) -> list[Pin]:
    """Send a request to the controller that listens at ``port``; returns the pins of its reply.

    Parameters
    ----------
    port : str
        Path of the controller's socket, or an ``ipc://`` address.
    request : dict
        A JSON object of this module's description.
    tokens : (num_tokens,) uint32, optional
        Tokens of a request to pin.

    Raises
    ------
    PinError
        The controller refuses the request, and the error has its reason; no controller answers at ``port``; or the
        request is too long.
    """
    message = _MAGIC + json.dumps(request, ensure_ascii=False).encode()
    if len(message) > MAX_MESSAGE_BYTES:
        raise PinError(f"name and namespace are too long: the request has {len(message)} bytes, the limit is "
                       f"{MAX_MESSAGE_BYTES}")
    reply = _exchange(port, message, tokens)
    try:
        content = json.loads(reply)
        if "error" in content:
            raise PinError(str(content["error"]))
        pins = [Pin(str(name), int(blocks)) for name, blocks in content["pins"]]
        more = bool(content.get("more", False))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, PinError):
            raise
        raise PinError(f"the answer at {port} is not from a controller of this version: use the same version of FlexKV "
                       "in all processes") from None
    if more and pins:
        pins += ask(port, {**request, "after": pins[-1].name})
    return pins


def _exchange(port: str, message: bytes, tokens: NDArray[np.uint32] | None) -> bytes:
    """Send a request, with or without tokens, and receive the reply."""
    fds = [] if tokens is None else [_sealed(tokens)]
    try:
        with connect(socket_path(port), time.monotonic() + _TIMEOUT_S) as connection:
            connection.settimeout(_TIMEOUT_S)
            socket.send_fds(connection, [message], fds)
            return connection.recv(_MAX_REPLY_BYTES)
    except TimeoutError as error:
        raise PinError(f"the controller at {port} has not answered for {_TIMEOUT_S:g} s: is it stopped?") from error
    except OSError as error:
        raise PinError(f"no controller answers at {port}: {error.strerror or error}") from error
    except FlexKVError as error:
        raise PinError(str(error)) from error
    finally:
        for fd in fds:
            os.close(fd)


def _sealed(tokens: NDArray[np.uint32]) -> int:
    fd = os.memfd_create("flexkv-tokens", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(tokens.tobytes())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd
