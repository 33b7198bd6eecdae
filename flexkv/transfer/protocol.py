"""How a device agent and the controller meet: fixed messages over a Unix socket that passes descriptors.

A connection says one HELLO and hears one WELCOME, with the descriptors of the host pool and the rings, or one
REFUSAL. After that nothing is said on it: it is there to hang up, on either side.
"""

import os
import socket
import struct
from dataclasses import astuple, dataclass, field
from pathlib import Path

from flexkv.config import register_port
from flexkv.errors import RegistrationError

_MAGIC = b"FLEXKV02"
_HELLO = struct.Struct("<8siiiiQQ16s")
_WELCOME = struct.Struct("<8sQQQQQ")
_REFUSAL = struct.Struct("<8s1024s")
_REFUSED = b"FLEXKVNO"
MAX_MESSAGE_BYTES = 2048
NUM_FDS = 4
"""That come with a WELCOME; one more is the socket of GPUDirect Storage (``flexkv.transfer.gds``)."""


@dataclass(frozen=True)
class Hello:
    """A rank introduces itself; sizes in bytes. ``content``: 16 bytes that say what those of a block mean."""

    dp_client_id: int
    pp_rank: int
    rank: int
    pid: int
    num_pages: int
    segment_bytes: int
    content: bytes = field(repr=False)

    def pack(self) -> bytes:
        return _HELLO.pack(_MAGIC, *astuple(self))

    @classmethod
    def unpack(cls, message: bytes) -> "Hello":
        if len(message) != _HELLO.size or message[:8] != _MAGIC:
            raise RegistrationError("what connected is no device agent of this version")
        hello = cls(*_HELLO.unpack(message)[1:])
        if hello.num_pages < 1 or hello.segment_bytes < 1 or hello.pp_rank < 0 or hello.rank < 0:
            raise RegistrationError(f"{hello}: impossible sizes or ranks")
        return hello


@dataclass(frozen=True)
class Welcome:
    """What the agent must know to map and use pool and rings; sizes in bytes.

    Comes with descriptors: host pool, rings, eventfd of ops, eventfd of results.
    """

    pool_bytes: int
    slot_bytes: int
    segment_offset: int
    segment_bytes: int
    ring_bytes: int

    def pack(self) -> bytes:
        return _WELCOME.pack(_MAGIC, *astuple(self))

    @classmethod
    def unpack(cls, message: bytes) -> "Welcome":
        if message[:8] == _REFUSED and len(message) == _REFUSAL.size:
            raise RegistrationError(_REFUSAL.unpack(message)[1].rstrip(b"\0").decode(errors="replace"))
        if len(message) != _WELCOME.size or message[:8] != _MAGIC:
            raise RegistrationError("what answered is no controller of this version")
        return cls(*_WELCOME.unpack(message)[1:])


def pack_refusal(reason: str) -> bytes:
    return _REFUSAL.pack(_REFUSED, reason.encode()[:1023])


def socket_path(port: str) -> Path:
    """File of a port, given as a path or as upstream's ``ipc://`` address; ConfigError for another address."""
    return Path(str(register_port("gpu_register_port", port)).removeprefix("ipc://"))


def listen(port: str) -> socket.socket:
    """A non-blocking listening socket, for this user alone. A file left by a controller that died is replaced.

    Raises
    ------
    RegistrationError
        Another controller listens there, or the place cannot be used.
    """
    path = socket_path(port)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        if path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                try:
                    probe.connect(str(path))
                    raise RegistrationError(f"another controller listens at {path}: give each its gpu_register_port")
                except ConnectionRefusedError:
                    path.unlink()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        listener.bind(str(path))
        os.chmod(path, 0o600)     # before listen: nobody can have connected yet
        listener.listen(64)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise RegistrationError(f"cannot listen at {path}: {error.strerror or error}") from error
    except RegistrationError:
        listener.close()
        raise
    return listener


def peer_uid(connection: socket.socket) -> int:
    """User of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid
