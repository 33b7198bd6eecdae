"""The layout of a slot: its segments, with the ranks that write and read them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flexkv.errors import InvariantError, RegistrationError
from flexkv.protocol.exchange import Share
from flexkv.protocol.registration import DIGEST_BYTES, Hello, Placement, SegmentClaim, SegmentKind

SLOT_ALIGNMENT_BYTES = 4096
"""Alignment of slots, so that they can be read and written with O_DIRECT."""

SEGMENT_ALIGNMENT_BYTES = 64
"""Alignment of segments: a cache line, so that two ranks never write to the same line."""

PART_ALIGNMENT_BYTES = 4096
"""Alignment of the parts that different ranks write of one segment, from the start of the segment, and the minimum size
of all parts but the last."""


@dataclass(frozen=True)
class Part:
    """Bytes ``[start, stop)`` of a segment, which ``rank`` writes."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """A range of bytes of every slot.

    Attributes
    ----------
    offset : int
        Offset in the slot, in bytes.
    claim : SegmentClaim
        Size and content, as its ranks have declared it.
    readers : tuple of int
        Ranks that read all of it, ascending.
    parts : tuple of Part
        The ranks that write it. Each byte has exactly one writer; every writer is a reader.
    """

    offset: int
    claim: SegmentClaim
    readers: tuple[int, ...]
    parts: tuple[Part, ...]


def _parts(claim: SegmentClaim, readers: Sequence[int], writer: int | None) -> tuple[Part, ...]:
    """Divide a segment between its ranks, as evenly as the alignment of parts allows; with ``writer``, one of them
    writes all."""
    if writer is not None:
        return (Part(readers[writer % len(readers)], 0, claim.segment_bytes),)
    size, count = claim.segment_bytes, min(len(readers), max(1, claim.segment_bytes // PART_ALIGNMENT_BYTES))
    share = -(-size // (count * PART_ALIGNMENT_BYTES)) * PART_ALIGNMENT_BYTES
    starts = range(0, size, share)
    return tuple(Part(rank, start, min(start + share, size)) for rank, start in zip(readers, starts, strict=False))


def check_agreement(hellos: Sequence[Hello]) -> None:
    """Check that ranks of one client can share a slot.

    Raises
    ------
    RegistrationError
        They have different numbers of layer groups, or a copy has different sizes or contents on two ranks.
    """
    copies: dict[tuple[int, bytes], tuple[int, SegmentClaim]] = {}
    for hello in hellos:
        if len(hello.num_pages) != len(hellos[0].num_pages):
            raise RegistrationError(
                f"rank {hello.rank} has {len(hello.num_pages)} layer groups, rank {hellos[0].rank} has "
                f"{len(hellos[0].num_pages)}: register the same groups on all ranks"
            )
        for claim in hello.segments:
            if claim.kind is SegmentKind.SHARD:
                continue
            rank, first = copies.setdefault((hello.pp_rank, claim.copy), (hello.rank, claim))
            if claim != first:
                raise RegistrationError(
                    f"a copy has {claim.segment_bytes} bytes a block on rank {hello.rank} and {first.segment_bytes} on "
                    f"rank {rank}, or other shapes: ranks that share a copy must register equal tensors for it"
                )


@dataclass(frozen=True)
class SlotLayout:
    """One slot: its segments, in the order of the ranks that declare them first.

    Attributes
    ----------
    segments : tuple of Segment
    held : tuple of tuple of int
        For each rank, the indices of its segments in the order in which the rank declared them.
    """

    segments: tuple[Segment, ...]
    held: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, hellos: Sequence[Hello], writer: int | None = None) -> "SlotLayout":
        """Make the layout for the ranks of one client, in order of rank.

        ``writer``: of the ranks that share a copy, the one with this number (modulo their count) writes all of it;
        None: each writes a part.

        Raises
        ------
        RegistrationError
            There is no rank, or ``check_agreement`` fails.
        """
        if not hellos:
            raise RegistrationError("no rank has declared a segment: each rank must hold part of a block")
        check_agreement(hellos)
        claims: list[SegmentClaim] = []
        readers: list[list[int]] = []
        held: list[tuple[int, ...]] = []
        shared: dict[tuple[int, bytes], int] = {}
        for rank, hello in enumerate(hellos):
            mine: list[int] = []
            for claim in hello.segments:
                index = len(claims)
                if claim.kind is SegmentKind.REPLICA:
                    index = shared.setdefault((hello.pp_rank, claim.copy), index)
                if index == len(claims):
                    claims.append(claim)
                    readers.append([])
                readers[index].append(rank)
                mine.append(index)
            held.append(tuple(mine))
        segments, end = [], 0
        for claim, ranks in zip(claims, readers, strict=True):
            segments.append(Segment(end, claim, tuple(ranks), _parts(claim, ranks, writer)))
            end += -(-claim.segment_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
        layout = cls(tuple(segments), tuple(held))
        layout.check_integrity()
        return layout

    @classmethod
    def sharded(cls, segment_bytes: Sequence[int]) -> "SlotLayout":
        """Make the layout for ranks that hold ``segment_bytes[rank]`` bytes of a block each.

        Raises
        ------
        RegistrationError
            There is no rank, or one holds no bytes.
        """
        if min(segment_bytes, default=1) < 1:
            raise RegistrationError(f"segments of {list(segment_bytes)} bytes: each rank must hold part of a block")
        content = bytes(DIGEST_BYTES)
        return cls.of([
            Hello(0, 0, rank, 0, (1,), (SegmentClaim(SegmentKind.SHARD, size, content),))
            for rank, size in enumerate(segment_bytes)
        ])

    @property
    def content(self) -> bytes:
        """Digest of the meaning of a slot's bytes. Slots with different digests are not comparable."""
        sizes = tuple(segment.claim.segment_bytes for segment in self.segments)
        contents = tuple(segment.claim.content for segment in self.segments)
        ranks = tuple(segment.readers for segment in self.segments)
        is_sharded = ranks == tuple((rank,) for rank in range(len(self.held)))
        meaning = (sizes, contents) if is_sharded else (sizes, contents, ranks)
        return hashlib.sha256(repr(meaning).encode()).digest()

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, a multiple of 4096."""
        end = self.segments[-1].offset + self.segments[-1].claim.segment_bytes
        return -(-end // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES

    def placements(self, rank: int) -> tuple[Placement, ...]:
        """Places of the segments of a rank, in the order in which the rank declared them."""
        places = []
        for index in self.held[rank]:
            segment = self.segments[index]
            start, stop = next(((part.start, part.stop) for part in segment.parts if part.rank == rank), (0, 0))
            places.append(Placement(segment.offset, segment.claim.segment_bytes, start, stop))
        return tuple(places)

    def shares(self, rank: int) -> dict[int, tuple[Share, ...]]:
        """Shares of the segments of ``rank``, by the rank that reads them from host memory in an exchange. A segment
        with one reader has none. The shares are about equal, whichever ranks write."""
        shares: dict[int, list[Share]] = {}
        for number, index in enumerate(self.held[rank]):
            segment = self.segments[index]
            if len(segment.readers) > 1:
                for part in _parts(segment.claim, segment.readers, None):
                    shares.setdefault(part.rank, []).append(Share(number, part.start, part.stop))
        return {reader: tuple(parts) for reader, parts in shares.items()}

    def claims(self, rank: int) -> tuple[SegmentClaim, ...]:
        """The segments that a rank has declared."""
        return tuple(self.segments[index].claim for index in self.held[rank])

    def check_integrity(self) -> None:
        """Raise InvariantError unless segments are disjoint, and each of their bytes has one writer, which is a
        reader."""
        end = 0
        for segment in self.segments:
            if segment.offset < end or segment.offset % SEGMENT_ALIGNMENT_BYTES:
                raise InvariantError(f"a segment at {segment.offset} overlaps one that ends at {end}")
            end = segment.offset + segment.claim.segment_bytes
            written = 0
            for part in segment.parts:
                if part.start != written or part.stop <= part.start or part.rank not in segment.readers:
                    raise InvariantError(f"byte {written} of a segment has no writer, or two, or one that is no reader")
                written = part.stop
            if written != segment.claim.segment_bytes:
                raise InvariantError(f"byte {written} of a segment has no writer")
