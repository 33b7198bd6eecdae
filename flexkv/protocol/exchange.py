"""Memory that ranks read of one another, as parts of HELLO and WELCOME. Everything is checked when it is parsed.

A rank exports the memory of its copies in its HELLO. The WELCOME names the part of each copy that a rank reads from
host memory in an exchange, and for each peer the parts that the peer reads, with the peer's exports.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexkv.errors import RegistrationError

_EXPORTS = struct.Struct("<16s16sII")
"""Then allocations and copies."""

_ALLOCATION = struct.Struct("<64sQQ")
_COPY = struct.Struct("<16s16sII")
"""Then the tensors of the copy."""

_TENSOR = struct.Struct("<IIQ")
_EXCHANGE = struct.Struct("<II")
"""Then the rank's shares, and peers."""

_SHARE = struct.Struct("<IIQQ")
_PEER = struct.Struct("<III")
"""Then the peer's shares and exports."""

ID_BYTES = 16
HANDLE_BYTES = 64
NO_DEVICE = bytes(ID_BYTES)
"""In place of a GPU's UUID: the memory is that of the process."""

MAX_EXPORT_BYTES = 16 << 10
"""Maximum size of one rank's exports: about 190 tensors with an allocation each."""

MAX_EXCHANGE_BYTES = 128 << 10
"""Maximum size of an exchange in a WELCOME: the exports of 8 ranks. With the rest of the message it fits the default
buffer of a Unix socket, 208 KiB."""

MAX_PEERS = 64
_MAX_SEGMENTS = 8
_MAX_ADDRESS = (1 << 64) - 1


class _Reader:
    """Reads structs from a message; RegistrationError if it is too short."""

    def __init__(self, message: bytes, subject: str) -> None:
        self._message, self._subject, self._at = message, subject, 0

    def one(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.part(layout.size))

    def part(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._message):
            raise RegistrationError(f"{self._subject} of {len(self._message)} bytes end in the middle")
        part, self._at = self._message[self._at : end], end
        return part

    def many(self, layout: struct.Struct, count: int) -> list[tuple[int, ...]]:
        return list(layout.iter_unpack(self.part(layout.size * count)))

    def finish(self) -> None:
        if self._at != len(self._message):
            raise RegistrationError(f"{self._subject} of {len(self._message)} bytes: {self._at} were expected")


@dataclass(frozen=True)
class Allocation:
    """An allocation that holds tensors.

    Attributes
    ----------
    handle : bytes
        Its handle of CUDA IPC, 64 bytes; zeros: the memory can be used in its process only.
    address : int
        Address in its process.
    num_bytes : int
    """

    handle: bytes = field(repr=False)
    address: int
    num_bytes: int


@dataclass(frozen=True)
class ExportedCopy:
    """The tensors of one copy.

    Attributes
    ----------
    copy : bytes
        Identity, as in ``SegmentClaim``.
    layout : bytes
        Digest of the shapes and strides of the tensors in memory, 16 bytes.
    tensors : tuple of (int, int)
        For each tensor, the index of its allocation and its offset there.
    """

    copy: bytes = field(repr=False)
    layout: bytes = field(repr=False)
    tensors: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Exports:
    """The memory of a rank's copies.

    Attributes
    ----------
    process : bytes
        Random identity of the process, 16 bytes.
    device : bytes
        UUID of the GPU, or NO_DEVICE.
    allocations : tuple of Allocation
    copies : tuple of ExportedCopy
    """

    process: bytes
    device: bytes
    allocations: tuple[Allocation, ...]
    copies: tuple[ExportedCopy, ...]

    def copy(self, identity: bytes) -> ExportedCopy | None:
        """The copy with an identity; None if there is none."""
        return next((copy for copy in self.copies if copy.copy == identity), None)

    def pack(self) -> bytes:
        """Encode the exports as a part of a message."""
        parts = [_EXPORTS.pack(self.process, self.device, len(self.allocations), len(self.copies))]
        parts += [_ALLOCATION.pack(each.handle, each.address, each.num_bytes) for each in self.allocations]
        for copy in self.copies:
            parts.append(_COPY.pack(copy.copy, copy.layout, len(copy.tensors), 0))
            parts += [_TENSOR.pack(allocation, 0, offset) for allocation, offset in copy.tensors]
        return b"".join(parts)

    @classmethod
    def unpack(cls, message: bytes) -> "Exports":
        """Parse exports; RegistrationError if they are too large, or contradict themselves."""
        if len(message) > MAX_EXPORT_BYTES:
            raise RegistrationError(f"exports of {len(message)} bytes: at most {MAX_EXPORT_BYTES} are allowed")
        reader = _Reader(message, "exports")
        process, device, num_allocations, num_copies = _EXPORTS.unpack(reader.part(_EXPORTS.size))
        allocations = tuple(
            Allocation(handle, address, num_bytes)
            for handle, address, num_bytes in _ALLOCATION.iter_unpack(reader.part(_ALLOCATION.size * num_allocations))
        )
        if any(not 0 < each.num_bytes <= _MAX_ADDRESS - each.address for each in allocations):
            raise RegistrationError("an exported allocation is empty, or extends past the end of the address space")
        if not 0 < num_copies <= _MAX_SEGMENTS:
            raise RegistrationError(f"exports of {num_copies} copies: a rank has 1 to {_MAX_SEGMENTS}")
        copies = []
        for _ in range(num_copies):
            copy, layout, count, _ = _COPY.unpack(reader.part(_COPY.size))
            tensors = tuple((allocation, offset) for allocation, _, offset in reader.many(_TENSOR, count))
            if not tensors or any(
                allocation >= num_allocations or offset >= allocations[allocation].num_bytes
                for allocation, offset in tensors
            ):
                raise RegistrationError("an exported copy has no tensor, or one outside of its allocation")
            copies.append(ExportedCopy(copy, layout, tensors))
        reader.finish()
        if len({copy.copy for copy in copies}) < num_copies:
            raise RegistrationError("a copy is exported twice")
        return cls(process, device, allocations, tuple(copies))


@dataclass(frozen=True)
class Share:
    """Bytes ``[start, stop)`` of a rank's segment, which one rank reads from host memory in an exchange; ``segment``:
    index in the HELLO of the rank that gets the WELCOME."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Peer:
    """Another rank, the shares that it reads, and its memory."""

    rank: int
    shares: tuple[Share, ...]
    exports: Exports


@dataclass(frozen=True)
class Exchange:
    """How a rank gets the bytes of its segments in an exchange. A segment without shares is read whole.

    Attributes
    ----------
    shares : tuple of Share
        The parts that the rank reads from host memory.
    peers : tuple of Peer
        The ranks that read other parts.
    """

    shares: tuple[Share, ...]
    peers: tuple[Peer, ...]

    def pack(self) -> bytes:
        """Encode the exchange as a part of a WELCOME."""
        parts = [_EXCHANGE.pack(len(self.shares), len(self.peers)), _pack_shares(self.shares)]
        for peer in self.peers:
            exports = peer.exports.pack()
            parts += [_PEER.pack(peer.rank, len(peer.shares), len(exports)), _pack_shares(peer.shares), exports]
        return b"".join(parts)

    @classmethod
    def unpack(cls, message: bytes, segment_bytes: Sequence[int]) -> "Exchange":
        """Parse an exchange of segments of these sizes; RegistrationError if it is too large, or if the shares of a
        segment leave out bytes of it or overlap."""
        if len(message) > MAX_EXCHANGE_BYTES:
            raise RegistrationError(f"an exchange of {len(message)} bytes: at most {MAX_EXCHANGE_BYTES} are allowed")
        reader = _Reader(message, "an exchange")
        num_shares, num_peers = reader.one(_EXCHANGE)
        shares = _read_shares(reader, num_shares)
        if num_peers > MAX_PEERS:
            raise RegistrationError(f"an exchange with {num_peers} peers: it may have {MAX_PEERS}")
        peers = []
        for _ in range(num_peers):
            rank, num_shares, num_bytes = reader.one(_PEER)
            theirs = _read_shares(reader, num_shares)
            peers.append(Peer(rank, theirs, Exports.unpack(reader.part(num_bytes))))
        reader.finish()
        exchange = cls(shares, tuple(peers))
        exchange._check(segment_bytes)
        return exchange

    def _check(self, segment_bytes: Sequence[int]) -> None:
        every = [*self.shares, *(share for peer in self.peers for share in peer.shares)]
        ends = [0] * len(segment_bytes)
        for share in sorted(every, key=lambda share: share.start):
            if share.segment >= len(ends) or share.start != ends[share.segment] or share.stop <= share.start:
                raise RegistrationError(f"an exchange of bytes {share.start} to {share.stop} of segment "
                                        f"{share.segment}: bytes are missing, or are read twice")
            ends[share.segment] = share.stop
        for end, size in zip(ends, segment_bytes, strict=True):
            if end not in (0, size):
                raise RegistrationError(f"an exchange of {end} bytes of a segment of {size}")


def _pack_shares(shares: Sequence[Share]) -> bytes:
    return b"".join(_SHARE.pack(share.segment, 0, share.start, share.stop) for share in shares)


def _read_shares(reader: _Reader, count: int) -> tuple[Share, ...]:
    return tuple(Share(segment, start, stop) for segment, _, start, stop in reader.many(_SHARE, count))
