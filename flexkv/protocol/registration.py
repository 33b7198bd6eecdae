"""Registration of a device agent with the controller: fixed messages over a Unix socket that passes descriptors.

1. The rank sends one HELLO.
2. The controller replies with one WELCOME and the descriptors of the host pool and the rings, or with one REFUSAL.
3. An agent that ends on purpose sends FAREWELL once it accesses no slot and no page any more.

Either side ends the session by closing its end of the socket. If a rank's end closes without a farewell, the controller
treats the process as dead.
"""

import enum
import struct
from dataclasses import dataclass, field

from flexkv._core.device.ring import FAREWELL
from flexkv._core.ring_pair import HEADER_BYTES
from flexkv.errors import RegistrationError
from flexkv.protocol.exchange import MAX_EXCHANGE_BYTES, MAX_EXPORT_BYTES, Exchange, Exports

__all__ = [
    "DIGEST_BYTES", "FAREWELL", "MAX_HELLO_BYTES", "MAX_LAYER_GROUPS", "MAX_MESSAGE_BYTES", "MAX_SEGMENTS",
    "MAX_WELCOME_BYTES", "NUM_FDS", "Hello", "Placement", "SegmentClaim", "SegmentKind", "Welcome", "pack_refusal",
]

_MAGIC = b"FLEXKV06"
_HELLO = struct.Struct("<8siiiiIII")
"""Then the number of pages of each layer group (uint64), the segments, and exports, whose size is the last number."""

_SEGMENT = struct.Struct("<IIQ16s16s")
_WELCOME = struct.Struct("<8sQQQQII")
"""Then the placements, and the exchange, whose size is the last number."""

_PLACEMENT = struct.Struct("<QQQQ")
_REFUSAL = struct.Struct("<8s1024s")
_REFUSED = b"FLEXKVNO"
MAX_MESSAGE_BYTES = 2048
"""Maximum size of all other messages."""

MAX_HELLO_BYTES = MAX_MESSAGE_BYTES + MAX_EXPORT_BYTES
MAX_WELCOME_BYTES = MAX_MESSAGE_BYTES + MAX_EXCHANGE_BYTES
NUM_FDS = 4
"""Number of descriptors that come with a WELCOME. With GPUDirect Storage there is one more, its socket
(``flexkv.storage.ssd.gds_queue``)."""

DIGEST_BYTES = 16
MAX_SEGMENTS = 8
"""Maximum number of segments of one rank."""

MAX_LAYER_GROUPS = 8
_MAX_SEGMENT_BYTES = 1 << 40
_MAX_POOL_BYTES = 1 << 47
"""Maximum size of the host pool: the address space of a process on x86-64."""

_OTHER_VERSION = "the {} of this version: use the same version of FlexKV in all processes"
_MAX_PAGES = 1 << 31
_MAX_RANK = (1 << 16) - 1
_MIN_RING_BYTES, _MAX_RING_BYTES = 4096, 1 << 30


class SegmentKind(enum.IntEnum):
    """Which ranks write and read a segment."""

    SHARD = 1
    """The rank that declares it, alone."""
    REPLICA = 2
    """All ranks of the pipeline stage that declare a segment with the same ``copy``. Their bytes are equal, and are
    stored once."""


@dataclass(frozen=True)
class SegmentClaim:
    """A segment of a slot, as a rank declares it.

    Attributes
    ----------
    kind : SegmentKind
    segment_bytes : int
        Size in each slot.
    content : bytes
        Digest of the layout of the bytes, 16 bytes.
    copy : bytes
        Identity of the copy of a REPLICA, 16 bytes that are not all zero; of a SHARD, zeros.
    """

    kind: SegmentKind
    segment_bytes: int
    content: bytes = field(repr=False)
    copy: bytes = field(default=bytes(DIGEST_BYTES), repr=False)

    def pack(self) -> bytes:
        """Encode the segment as a part of a HELLO."""
        return _SEGMENT.pack(self.kind, 0, self.segment_bytes, self.content, self.copy)

    @classmethod
    def parse(cls, kind: int, segment_bytes: int, content: bytes, copy: bytes) -> "SegmentClaim":
        """Make a segment from the fields of a HELLO; RegistrationError if the kind is unknown or a field does not fit
        it."""
        if kind not in SegmentKind.__members__.values():
            raise RegistrationError(f"a segment of kind {kind}: it must be SHARD (1) or REPLICA (2)")
        _check("segment_bytes", segment_bytes, 1, _MAX_SEGMENT_BYTES)
        if any(copy) != (kind == SegmentKind.REPLICA):
            raise RegistrationError("copy of a segment: a REPLICA must name one, and a SHARD must not")
        return cls(SegmentKind(kind), segment_bytes, content, copy)


@dataclass(frozen=True)
class Hello:
    """Description of a rank, its first message.

    Attributes
    ----------
    dp_client_id, pp_rank, rank : int
        Data-parallel client, pipeline stage, and rank within the stage.
    pid : int
        Process id.
    num_pages : tuple of int
        Number of pages in each layer group.
    segments : tuple of SegmentClaim
        The rank reads all of them; the Welcome assigns the part of each that the rank writes.
    exports : Exports or None
        Memory of the rank's copies, which its peers may read; None: they may not.
    """

    dp_client_id: int
    pp_rank: int
    rank: int
    pid: int
    num_pages: tuple[int, ...]
    segments: tuple[SegmentClaim, ...]
    exports: Exports | None = field(default=None, repr=False)

    def pack(self) -> bytes:
        """Encode the HELLO message."""
        exports = b"" if self.exports is None else self.exports.pack()
        head = _HELLO.pack(
            _MAGIC, self.dp_client_id, self.pp_rank, self.rank, self.pid, len(self.num_pages), len(self.segments),
            len(exports),
        )
        pages = struct.pack(f"<{len(self.num_pages)}Q", *self.num_pages)
        return head + pages + b"".join(segment.pack() for segment in self.segments) + exports

    @classmethod
    def unpack(cls, message: bytes) -> "Hello":
        """Parse a HELLO; RegistrationError if the message is not a HELLO or a number in it is out of range."""
        if len(message) < _HELLO.size or message[:8] != _MAGIC:
            raise RegistrationError(_OTHER_VERSION.format("message is no HELLO"))
        _, dp_client_id, pp_rank, rank, pid, num_groups, num_segments, num_exported = _HELLO.unpack_from(message)
        _check("dp_client_id", dp_client_id, 0, _MAX_RANK)
        _check("pp_rank", pp_rank, 0, _MAX_RANK)
        _check("rank", rank, 0, _MAX_RANK)
        _check("number of layer groups", num_groups, 1, MAX_LAYER_GROUPS)
        _check("number of segments", num_segments, 1, MAX_SEGMENTS)
        first = _HELLO.size + 8 * num_groups
        end = first + _SEGMENT.size * num_segments
        if len(message) != end + num_exported:
            raise RegistrationError(_OTHER_VERSION.format("message is no HELLO"))
        num_pages = struct.unpack_from(f"<{num_groups}Q", message, _HELLO.size)
        for number in num_pages:
            _check("num_pages", number, 1, _MAX_PAGES)
        segments = tuple(
            SegmentClaim.parse(kind, segment_bytes, content, copy)
            for kind, _, segment_bytes, content, copy in _SEGMENT.iter_unpack(message[first:end])
        )
        copies = [segment.copy for segment in segments if segment.kind is SegmentKind.REPLICA]
        if len(set(copies)) < len(copies):
            raise RegistrationError("two segments of a rank are the same copy: declare it once")
        exports = Exports.unpack(message[end:]) if num_exported else None
        if exports is not None and any(copy.copy not in copies for copy in exports.copies):
            raise RegistrationError("exports of a copy that the rank does not declare")
        return cls(dp_client_id, pp_rank, rank, pid, num_pages, segments, exports)


@dataclass(frozen=True)
class Placement:
    """Place of a rank's segment in every slot, and the part of it that the rank writes.

    Attributes
    ----------
    offset : int
        Offset in the slot, in bytes.
    segment_bytes : int
    write_start, write_stop : int
        The rank writes bytes ``[write_start, write_stop)`` of the segment; none if they are equal.
    """

    offset: int
    segment_bytes: int
    write_start: int
    write_stop: int


@dataclass(frozen=True)
class Welcome:
    """Sizes and offsets that the agent needs to map the host pool and the rings, in bytes.

    The message carries descriptors: host pool, rings, eventfd of ops, eventfd of results. ``placements``: one for each
    segment of the Hello, in its order. ``first_task``: tasks that the rank will get from this controller have larger
    ids; a task with a smaller one is lost. ``exchange``: how the rank gets its copies in a load that reads peers; None:
    there are no such loads.
    """

    pool_bytes: int
    slot_bytes: int
    ring_bytes: int
    placements: tuple[Placement, ...]
    first_task: int = 0
    exchange: Exchange | None = field(default=None, repr=False)

    def pack(self) -> bytes:
        """Encode the WELCOME message."""
        exchange = b"" if self.exchange is None else self.exchange.pack()
        head = _WELCOME.pack(
            _MAGIC, self.pool_bytes, self.slot_bytes, self.ring_bytes, self.first_task, len(self.placements),
            len(exchange),
        )
        return head + b"".join(
            _PLACEMENT.pack(place.offset, place.segment_bytes, place.write_start, place.write_stop)
            for place in self.placements
        ) + exchange

    @classmethod
    def unpack(cls, message: bytes) -> "Welcome":
        """Parse a WELCOME; RegistrationError if the message is a refusal or not a WELCOME, or its sizes contradict each
        other."""
        if message[:8] == _REFUSED and len(message) == _REFUSAL.size:
            raise RegistrationError(_REFUSAL.unpack(message)[1].rstrip(b"\0").decode(errors="replace"))
        if len(message) < _WELCOME.size or message[:8] != _MAGIC:
            raise RegistrationError(_OTHER_VERSION.format("answer is no WELCOME"))
        _, pool_bytes, slot_bytes, ring_bytes, first_task, num_segments, num_more = _WELCOME.unpack_from(message)
        _check("number of segments", num_segments, 1, MAX_SEGMENTS)
        end = _WELCOME.size + _PLACEMENT.size * num_segments
        if len(message) != end + num_more:
            raise RegistrationError(_OTHER_VERSION.format("answer is no WELCOME"))
        places = tuple(Placement(*numbers) for numbers in _PLACEMENT.iter_unpack(message[_WELCOME.size : end]))
        exchange = Exchange.unpack(message[end:], [place.segment_bytes for place in places]) if num_more else None
        welcome = cls(pool_bytes, slot_bytes, ring_bytes, places, first_task, exchange)
        _check("pool_bytes", pool_bytes, 1, _MAX_POOL_BYTES)
        _check("slot_bytes", slot_bytes, 1, pool_bytes)
        end = 0
        for place in sorted(places, key=lambda place: place.offset):
            _check("segment_bytes", place.segment_bytes, 1, slot_bytes)
            _check("offset of a segment", place.offset, end, slot_bytes - place.segment_bytes)
            _check("write_stop", place.write_stop, 0, place.segment_bytes)
            _check("write_start", place.write_start, 0, place.write_stop)
            end = place.offset + place.segment_bytes
        data_bytes = ring_bytes - HEADER_BYTES
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
