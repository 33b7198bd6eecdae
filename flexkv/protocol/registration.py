"""Registration of a device agent with the controller: fixed messages over a Unix socket that passes descriptors.

1. The rank sends one HELLO.
2. The controller replies with one WELCOME and the descriptors of the host pool and the rings, or with one REFUSAL.
3. An agent that ends on purpose sends FAREWELL once it accesses no slot and no page any more.

Either side ends the session by closing its end of the socket. If a rank's end closes without a farewell, the controller
treats the process as dead.
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
"""Number of descriptors that come with a WELCOME. With GPUDirect Storage there is one more, its socket
(``flexkv.storage.ssd.gds_queue``)."""

_MAX_SEGMENT_BYTES = 1 << 40
_MAX_POOL_BYTES = 1 << 47
"""Maximum size of the host pool: the address space of a process on x86-64."""

_MAX_PAGES = 1 << 31
_MAX_RANK = (1 << 16) - 1
_MIN_RING_BYTES, _MAX_RING_BYTES = 4096, 1 << 30


@dataclass(frozen=True)
class Hello:
    """Description of a rank, its first message; sizes in bytes. ``content``: digest of the layout of a block's bytes,
    16 bytes."""

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
        """Parse a HELLO; RegistrationError if the message is not a HELLO or a number in it is out of range."""
        if len(message) != _HELLO.size or message[:8] != _MAGIC:
            raise RegistrationError("the message is no HELLO of this version: use the same version of FlexKV in all "
                                    "processes")
        hello = cls(*_HELLO.unpack(message)[1:])
        _check("dp_client_id", hello.dp_client_id, 0, _MAX_RANK)
        _check("pp_rank", hello.pp_rank, 0, _MAX_RANK)
        _check("rank", hello.rank, 0, _MAX_RANK)
        _check("num_pages", hello.num_pages, 1, _MAX_PAGES)
        _check("segment_bytes", hello.segment_bytes, 1, _MAX_SEGMENT_BYTES)
        return hello


@dataclass(frozen=True)
class Welcome:
    """Sizes and offsets that the agent needs to map the host pool and the rings, in bytes.

    The message carries descriptors: host pool, rings, eventfd of ops, eventfd of results.
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
        """Parse a WELCOME; RegistrationError if the message is a refusal or not a WELCOME, or its sizes contradict each
        other."""
        if message[:8] == _REFUSED and len(message) == _REFUSAL.size:
            raise RegistrationError(_REFUSAL.unpack(message)[1].rstrip(b"\0").decode(errors="replace"))
        if len(message) != _WELCOME.size or message[:8] != _MAGIC:
            raise RegistrationError("the answer is no WELCOME of this version: use the same version of FlexKV in all "
                                    "processes")
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
    """Build the message that refuses a rank; a reason longer than 1,023 bytes is cut."""
    return _REFUSAL.pack(_REFUSED, reason.encode(errors="replace")[:1023])
