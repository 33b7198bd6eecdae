"""What a user asks of a running controller, over the socket where ranks register: to pin and unpin prefixes.

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
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv.cache.pins import Pin
from flexkv.config.namespace_entry import NamespaceEntry
from flexkv.errors import FlexKVError, PinError
from flexkv.transfer.protocol import MAX_MESSAGE_BYTES
from flexkv.transfer.socket_file import connect, socket_path

logger = logging.getLogger("flexkv.transfer")

_MAGIC = b"FLEXKVC1"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MAX_REPLY_BYTES = 1 << 17
_PAGE = 64
"""Pins in one reply. A name has at most 128 bytes, or 256 in JSON, so that a reply fits a socket's buffer."""

MAX_TOKENS = 1 << 22
"""Of one prefix: hashed in a few milliseconds."""

_TIMEOUT_S = 10.0
"""How long a user waits for the reply."""


def is_control(message: bytes) -> bool:
    """Whether a connection's first message is a user's request, and not a rank's."""
    return message[:7] == _MAGIC[:7]


class Control:
    """Answers requests. Never raises.

    Parameters
    ----------
    pin, unpin, pins : callable
        As those of ``KVManager``.
    """

    def __init__(
        self,
        pin: Callable[[ArrayLike, Sequence[str] | None, str], Pin],
        unpin: Callable[[str], Pin],
        pins: Callable[[], Sequence[Pin]],
    ) -> None:
        self._pin = pin
        self._unpin = unpin
        self._pins = pins

    def answer(self, message: bytes, fds: Sequence[int]) -> bytes:
        """The reply to a request; ``fds`` stay the caller's."""
        try:
            pins = self._carry_out(_parse(message), fds)
            page = sorted(pins, key=lambda pin: pin.name)[:_PAGE]
            entries = [[pin.name, pin.num_blocks] for pin in page]
            reply: dict[str, Any] = {"pins": entries, "more": len(page) < len(pins)}
        except (FlexKVError, ValueError) as error:
            reply = {"error": str(error)[:1000]}
        except Exception:
            logger.exception("a user's request failed")
            reply = {"error": "the controller failed at this request: see its log"}
        return json.dumps(reply, ensure_ascii=False).encode()

    def _carry_out(self, request: dict[str, Any], fds: Sequence[int]) -> Sequence[Pin]:
        match request:
            case {"command": "pins", **rest} if not rest:
                return self._pins()
            case {"command": "pins", "after": str(name), **rest} if not rest:
                return [pin for pin in self._pins() if pin.name > name]
            case {"command": "unpin", "name": str(name), **rest} if not rest:
                return [self._unpin(name)]
            case {
                "command": "pin", "name": str(name), "namespace": list(namespace), "num_tokens": int(count), **rest
            } if not rest and all(isinstance(entry, str) for entry in namespace):
                entries = [NamespaceEntry.parse(entry) for entry in namespace]
                return [self._pin(_read_tokens(fds, count), entries, name)]
        raise PinError(f"{str(request)[:200]} is no request: its command or its fields are not those of this version")


def _parse(message: bytes) -> dict[str, Any]:
    if message[:8] != _MAGIC:
        raise PinError("the request is of another version of FlexKV: use the controller's own flexkv command")
    try:
        request = json.loads(message[8:])
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise PinError(f"the request is no JSON object of at most {MAX_MESSAGE_BYTES} bytes")
    return request


def _read_tokens(fds: Sequence[int], count: int) -> NDArray[np.uint32]:
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
