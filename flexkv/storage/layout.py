"""The layout of a slot."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flexkv.errors import RegistrationError

SLOT_ALIGNMENT_BYTES = 4096
"""Alignment of slots, so that they can be read and written with O_DIRECT."""

SEGMENT_ALIGNMENT_BYTES = 64
"""Alignment of segments: a cache line, so that two ranks never write to the same line."""


@dataclass(frozen=True)
class SlotLayout:
    """One slot: a segment for each rank, in order of rank.

    Attributes
    ----------
    segment_bytes : tuple of int
        Bytes of a block on each rank.
    contents : tuple of bytes
        Digest of the meaning of each rank's bytes (``flexkv.rank.tensors.content_digest``).
    """

    segment_bytes: tuple[int, ...]
    contents: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, segment_bytes: Sequence[int], contents: Sequence[bytes] = ()) -> "SlotLayout":
        """Make the layout for ranks that hold ``segment_bytes[rank]`` bytes of a block each."""
        if not segment_bytes or min(segment_bytes) < 1:
            raise RegistrationError(f"segments of {list(segment_bytes)} bytes: each rank must hold part of a block")
        return cls(tuple(segment_bytes), tuple(contents))

    @property
    def segment_offsets(self) -> tuple[int, ...]:
        """Offset of each rank's segment in the slot, in bytes."""
        offsets, end = [], 0
        for size in self.segment_bytes:
            offsets.append(end)
            end += -(-size // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
        return tuple(offsets)

    @property
    def content(self) -> bytes:
        """Digest of the meaning of a slot's bytes. Slots with different digests are not comparable."""
        return hashlib.sha256(repr((self.segment_bytes, self.contents)).encode()).digest()

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, a multiple of 4096."""
        end = self.segment_offsets[-1] + self.segment_bytes[-1]
        return -(-end // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
