"""How a device agent and the controller meet: fixed messages over a Unix socket that passes descriptors.

A connection says one HELLO and hears one WELCOME, with the descriptors of the host pool and the rings, or one
REFUSAL. After that the agent says FAREWELL when it ends on purpose and touches no slot and no page any more; either
side hangs up when it is over. A hang-up without a farewell is the death of a process.
"""

import struct
from dataclasses import astuple, dataclass, field

from flexkv._core.device.ring import FAREWELL, RING_HEADER_BYTES
from flexkv.errors import RegistrationError

__all__ = ["FAREWELL", "MAX_MESSAGE_BYTES", "NUM_FDS", "Hello", "Welcome", "pack_refusal"]

_MAGIC = b"FLEXKV03"
_HELLO = struct.Struct("<8siiiiQQ16s")
_WELCOME = struct.Struct("<8sQQQQQ")
_REFUSAL = struct.Struct("<8s1024s")
_REFUSED = b"FLEXKVNO"
MAX_MESSAGE_BYTES = 2048
NUM_FDS = 4
"""That come with a WELCOME; one more is the socket of GPUDirect Storage (``flexkv.storage.ssd.gds_queue``)."""

_MAX_SEGMENT_BYTES = 1 << 40
_MAX_POOL_BYTES = 1 << 47
"""The address space of a process on x86-64."""

_MAX_PAGES = 1 << 31
_MAX_RANK = (1 << 16) - 1
_MIN_RING_BYTES, _MAX_RING_BYTES = 4096, 1 << 30


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
        """The HELLO in a message; RegistrationError if it is none, or a number in it is out of range."""
        if len(message) != _HELLO.size or message[:8] != _MAGIC:
            raise RegistrationError("the message is no HELLO of this version: use one version of FlexKV")
        hello = cls(*_HELLO.unpack(message)[1:])
        _check("dp_client_id", hello.dp_client_id, 0, _MAX_RANK)
        _check("pp_rank", hello.pp_rank, 0, _MAX_RANK)
        _check("rank", hello.rank, 0, _MAX_RANK)
        _check("num_pages", hello.num_pages, 1, _MAX_PAGES)
        _check("segment_bytes", hello.segment_bytes, 1, _MAX_SEGMENT_BYTES)
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
        """The WELCOME in a message; RegistrationError if it is a refusal, or no WELCOME, or does not make sense."""
        if message[:8] == _REFUSED and len(message) == _REFUSAL.size:
            raise RegistrationError(_REFUSAL.unpack(message)[1].rstrip(b"\0").decode(errors="replace"))
        if len(message) != _WELCOME.size or message[:8] != _MAGIC:
            raise RegistrationError("the answer is no WELCOME of this version: use one version of FlexKV")
        welcome = cls(*_WELCOME.unpack(message)[1:])
        _check("pool_bytes", welcome.pool_bytes, 1, _MAX_POOL_BYTES)
        _check("slot_bytes", welcome.slot_bytes, 1, welcome.pool_bytes)
        _check("segment_bytes", welcome.segment_bytes, 1, welcome.slot_bytes)
        _check("segment_offset", welcome.segment_offset, 0, welcome.slot_bytes - welcome.segment_bytes)
        data_bytes = welcome.ring_bytes - RING_HEADER_BYTES
        _check("ring_bytes", data_bytes, _MIN_RING_BYTES, _MAX_RING_BYTES)
        if data_bytes & (data_bytes - 1):
            raise RegistrationError(f"ring_bytes of the controller is {data_bytes}: it must be a power of two")
        return welcome


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RegistrationError(f"{name} is {value}: it must be from {low} to {high}")


def pack_refusal(reason: str) -> bytes:
    """The message that refuses a rank; long reasons are cut."""
    return _REFUSAL.pack(_REFUSED, reason.encode(errors="replace")[:1023])
