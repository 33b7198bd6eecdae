"""Layouts: of an engine's KV tensors, and of a slot."""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flexkv.errors import RegistrationError

SLOT_ALIGNMENT_BYTES = 4096
"""Slots can be read and written with O_DIRECT."""

SEGMENT_ALIGNMENT_BYTES = 64
"""A cache line: two ranks never write the same one."""


class KVCacheLayoutType(enum.Enum):
    """Order of the outer dimensions of an engine's KV cache."""

    LAYERFIRST = "LAYERFIRST"
    BLOCKFIRST = "BLOCKFIRST"


@dataclass(frozen=True)
class KVCacheLayout:
    """What an engine says of its KV cache (upstream's signature). The tensors' own strides are what is used; this is
    checked against them."""

    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    kv_dim: int = 2
    num_kv_heads: int = 1
    _kv_shape: tuple[int, ...] | None = None
    layer_groups: object = None
    tp_size: int = 1
    is_mla: bool | None = None

    def __post_init__(self) -> None:
        for name in ("num_layer", "num_block", "tokens_per_block", "num_head", "head_size"):
            if getattr(self, name) < 1:
                raise RegistrationError(f"KVCacheLayout.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class SlotLayout:
    """One slot: a segment for each rank, in order of rank.

    Attributes
    ----------
    segment_bytes : tuple of int
        Bytes of a block on each rank.
    contents : tuple of bytes
        What each rank's bytes mean (``flexkv.server.tensors.content_digest``).
    """

    segment_bytes: tuple[int, ...]
    contents: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, segment_bytes: Sequence[int], contents: Sequence[bytes] = ()) -> "SlotLayout":
        """Make the layout for ranks that hold so many bytes of a block each."""
        if not segment_bytes or min(segment_bytes) < 1:
            raise RegistrationError(f"segments of {list(segment_bytes)} bytes: each rank must hold part of a block")
        return cls(tuple(segment_bytes), tuple(contents))

    @property
    def segment_offsets(self) -> tuple[int, ...]:
        """Where each rank's segment starts in the slot, in bytes."""
        offsets, end = [], 0
        for size in self.segment_bytes:
            offsets.append(end)
            end += -(-size // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
        return tuple(offsets)

    @property
    def content(self) -> bytes:
        """What the bytes of a slot mean: those of two slots are comparable only if it is equal."""
        return hashlib.sha256(repr((self.segment_bytes, self.contents)).encode()).digest()

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, a multiple of 4096."""
        end = self.segment_offsets[-1] + self.segment_bytes[-1]
        return -(-end // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
