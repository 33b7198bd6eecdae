"""Requests of a user to a running controller, over the socket where ranks register: to pin and unpin prefixes.

A connection says one request and hears one reply. A request is ``FLEXKVC1`` and a JSON object:
``{"command": "pin", "name": NAME, "namespace": [NAME, ...], "num_tokens": N}`` with a descriptor of a memfd that holds
the tokens (uint32) and is sealed, ``{"command": "unpin", "name": NAME}``, or ``{"command": "pins"}``, which lists the
names after ``"after": NAME`` if that is given. The reply is ``{"pins": [[NAME, BLOCKS], ...], "more": BOOL}``, of the
prefixes that were pinned or unpinned or are pinned, or ``{"error": TEXT}``; a request that is refused has changed
nothing. ``more``: the list is cut, and the rest comes after its last name. An entry of the namespace is as
``NamespaceEntry.parse`` reads it: a tenant's NAME, or ``KIND:NAME``.
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
"""A name has at most 128 bytes, or 256 in JSON, so that a reply fits a socket's buffer."""

MAX_TOKENS = 1 << 22
"""Tokens of one prefix: hashed in a few milliseconds."""

_TIMEOUT_S = 10.0
"""How long a user waits for the reply."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned prefix: its name, and how many blocks it keeps."""

    name: str
    num_blocks: int


def is_request(message: bytes) -> bool:
    """Whether a connection's first message is a user's request, and not a rank's."""
    return message[:7] == _MAGIC[:7]


def parse_request(message: bytes) -> dict[str, Any]:
    """The JSON object of a request; PinError if it is none."""
    if message[:8] != _MAGIC:
        raise PinError("the request is of another version of FlexKV: use the controller's own flexkv command")
    try:
        request = json.loads(message[8:])
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise PinError(f"the request is no JSON object of at most {MAX_MESSAGE_BYTES} bytes")
    return request


def read_tokens(fds: Sequence[int], count: int) -> NDArray[np.uint32]:
    """The tokens that came with a request; PinError if they do not come as they must."""
    if not 1 <= count <= MAX_TOKENS:
        raise PinError(f"{count} tokens: give 1 to {MAX_TOKENS}")
    try:
        sealed = len(fds) == 1 and fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or os.fstat(fds[0]).st_size != 4 * count:     # memory that nobody changes: no read of it can hang
        raise PinError(f"{count} tokens must come in a sealed memfd of {4 * count} bytes")
    return np.frombuffer(os.pread(fds[0], 4 * count, 0), dtype=np.uint32)


def ask(port: str, request: dict[str, Any], tokens: NDArray[np.uint32] | None = None) -> list[Pin]:
    """Ask the controller that listens at ``port``; the user's side.

    Raises
    ------
    PinError
        The controller refuses, with the reason, or no controller answers there.
    """
    message = _MAGIC + json.dumps(request, ensure_ascii=False).encode()
    if len(message) > MAX_MESSAGE_BYTES:
        raise PinError(f"name and namespace are too long: the request is {len(message)} bytes, not {MAX_MESSAGE_BYTES}")
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
        raise PinError(f"the answer at {port} is no controller's of this version: use one version of FlexKV") from None
    if more and pins:
        pins += ask(port, {**request, "after": pins[-1].name})
    return pins


def _exchange(port: str, message: bytes, tokens: NDArray[np.uint32] | None) -> bytes:
    """Send a request, with tokens or without, and receive the reply."""
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
