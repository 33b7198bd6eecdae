"""The KV memory of a rank: its tensors as segments of a slot, and the copies that its agent makes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flexkv._core.device.agent import REGION_DTYPE, SPAN_DTYPE, spans_of
from flexkv.errors import RegistrationError
from flexkv.protocol.exchange import Share
from flexkv.protocol.registration import (
    DIGEST_BYTES,
    MAX_LAYER_GROUPS,
    MAX_SEGMENTS,
    Placement,
    SegmentClaim,
    SegmentKind,
)
from flexkv.rank.regions import TensorSpec, clipped, layer_spans, paired, regions_from_tensors
from flexkv.rank.tensors import content_digest

_LAYER_SPANS = 8
"""Maximum number of parts of a layerwise load: compute starts after an eighth; copies stay large."""


_PAIR_DTYPE = np.dtype([("region", REGION_DTYPE), ("stride", np.uint64), ("group", np.uint64)])


@dataclass(frozen=True)
class CopyTable:
    """The copies that an agent makes for a block, as parameters of ``DeviceAgent``.

    Attributes
    ----------
    regions : (n,) REGION_DTYPE
        The first ``num_load_regions`` are those of a load.
    spans : (m,) SPAN_DTYPE
    saves, loads, layers : (int, int)
        First span and number of spans of a save, a load and a layerwise load.
    shares, peers : (int, int)
        The same of the two steps of an exchange; (0, 0) without peers.
    span_of_layer : list of int
        The span of layerwise loads with the last byte of each layer.
    """

    regions: NDArray[np.void]
    num_load_regions: int
    spans: NDArray[np.void]
    saves: tuple[int, int]
    loads: tuple[int, int]
    layers: tuple[int, int]
    span_of_layer: list[int]
    shares: tuple[int, int] = (0, 0)
    peers: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PeerShare:
    """A share that a peer has, and its memory.

    Attributes
    ----------
    share : Share
    addresses : sequence of int
        Address in this process of each of the peer's tensors of the segment, in the order of ``RankMemory.tensors_of``.
    """

    share: Share
    addresses: Sequence[int]


@dataclass(frozen=True)
class _Piece:
    """Tensors of one layer group in one segment; their bytes follow one another there."""

    segment: int
    group: int
    tensors: list[int]
    regions: NDArray[np.void]                        # offsets count from the start of the segment


class RankMemory:
    """The tensors of a rank, their layer groups, and the segments that hold their bytes.

    Parameters
    ----------
    specs : sequence of TensorSpec
    layers : sequence of int, optional
        The layer of each tensor, from 0 and ascending; default: each tensor is a layer.
    groups : sequence of int, optional
        The layer group of each tensor, from 0; default: all are in one group.
    copies : sequence of str or None, optional
        For each tensor, the name of the copy that this rank shares with other ranks of its pipeline stage; None, the
        default: the bytes of this rank alone. Tensors with the same name make one segment.
    meaning : str
        Content of a page, where shapes do not show it: pages with another meaning have another layout.

    Attributes
    ----------
    num_pages : tuple of int
        Number of pages in each layer group.
    segments : tuple of SegmentClaim
    tensors_of : list of list of TensorSpec
        Tensors of each segment, in the order of their bytes.

    Raises
    ------
    RegistrationError
        The tensors cannot be divided into pages, or the parameters do not fit them.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], layers: Sequence[int] | None = None, groups: Sequence[int] | None = None,
        copies: Sequence[str | None] | None = None, meaning: str = "",
    ) -> None:
        regions_from_tensors(specs[:1])              # refuses an empty list
        self._specs, self._meaning = list(specs), meaning
        self.layers = list(range(len(specs)) if layers is None else layers)
        self._groups = [0] * len(specs) if groups is None else list(groups)
        names: list[str | None] = [None] * len(specs) if copies is None else list(copies)
        for what, values in (("layers", self.layers), ("groups", self._groups), ("copies", names)):
            if len(values) != len(specs):
                raise RegistrationError(f"{len(values)} {what} for {len(specs)} tensors: give one for each tensor")
        if self.layers[0] < 0 or self.layers != sorted(self.layers):
            raise RegistrationError(f"layers {self.layers}: number them from 0, and register tensors in their order")
        num_groups, segments = max(self._groups) + 1, list(dict.fromkeys(names))
        is_numbered = set(self._groups) == set(range(num_groups))
        if not is_numbered or num_groups > MAX_LAYER_GROUPS or len(segments) > MAX_SEGMENTS:
            raise RegistrationError(
                f"layer groups {sorted(set(self._groups))} in {len(segments)} segments: number the groups from 0 "
                f"without gaps, at most {MAX_LAYER_GROUPS}, in at most {MAX_SEGMENTS} segments"
            )
        self._pieces: list[_Piece] = []
        self.tensors_of: list[list[TensorSpec]] = []
        self._order: list[list[int]] = []
        pages: dict[int, int] = {}
        claims = []
        for segment, name in enumerate(segments):
            order: list[int] = []
            size = 0
            for group in range(num_groups):
                tensors = [i for i in range(len(specs)) if names[i] == name and self._groups[i] == group]
                if tensors:
                    order, size = order + tensors, size + self._add_piece(segment, group, tensors, size, pages)
            claims.append(self._claim(name, order, size))
            self.tensors_of.append([self._specs[i] for i in order])
            self._order.append(order)
        self.num_pages = tuple(pages[group] for group in range(num_groups))
        self.segments = tuple(claims)

    def _add_piece(self, segment: int, group: int, tensors: list[int], offset: int, pages: dict[int, int]) -> int:
        """Add the tensors of a layer group at ``offset`` of a segment; returns their bytes. ``pages``: the number of
        pages of each group."""
        regions, num_pages, num_bytes = regions_from_tensors([self._specs[i] for i in tensors])
        if pages.setdefault(group, num_pages) != num_pages:
            raise RegistrationError(
                f"tensors of {pages[group]} and of {num_pages} pages in layer group {group}: all tensors of a group "
                "must have as many pages"
            )
        self._pieces.append(_Piece(segment, group, tensors, _moved(regions, offset)))
        return num_bytes

    def _claim(self, name: str | None, tensors: Sequence[int], size: int) -> SegmentClaim:
        """Declare the segment that holds ``tensors`` in this order."""
        content, groups = content_digest([self._specs[i] for i in tensors]), [self._groups[i] for i in tensors]
        if any(groups) or self._meaning:
            content = hashlib.sha256(content + bytes(groups) + self._meaning.encode()).digest()[:DIGEST_BYTES]
        if name is None:
            return SegmentClaim(SegmentKind.SHARD, size, content)
        return SegmentClaim(
            SegmentKind.REPLICA, size, content, hashlib.sha256(name.encode()).digest()[:DIGEST_BYTES]
        )

    def copy_table(
        self, placements: Sequence[Placement], shares: Sequence[Share] = (),
        peers: Sequence[PeerShare] | None = None,
    ) -> CopyTable:
        """The copies for a slot in which segment i is at ``placements[i]``.

        With ``peers``, they include an exchange, in which this rank reads ``shares`` from host memory."""
        regions = [_moved(piece.regions, placements[piece.segment].offset) for piece in self._pieces]
        parts, saved_parts = list(regions), []
        spans = _spans(regions, self._pieces, 0)
        loads = layers = (0, len(spans))
        span_of_layer = [0] * (max(self.layers) + 1)
        if len(self._pieces) == 1:
            spans, span_of_layer = layer_spans(regions[0], self._layer_bytes(), _LAYER_SPANS)
            layers = (1, len(spans) - 1) if len(spans) > 1 else loads
        else:
            for span, piece in enumerate(self._pieces):
                for tensor in piece.tensors:
                    span_of_layer[self.layers[tensor]] = max(span, span_of_layer[self.layers[tensor]])
        saves, num_load_regions = loads, sum(map(len, regions))
        if any((place.write_start, place.write_stop) != (0, place.segment_bytes) for place in placements):
            for piece, table in zip(self._pieces, regions, strict=True):
                place = placements[piece.segment]
                saved_parts.append(clipped(table, place.offset + place.write_start, place.offset + place.write_stop))
            saved = _spans(saved_parts, self._pieces, num_load_regions)
            saves, spans = (len(spans), len(saved)), np.concatenate([spans, saved])
        copies = CopyTable(
            np.concatenate(parts + saved_parts), num_load_regions, spans, saves, loads, layers, span_of_layer
        )
        return self._with_exchange(copies, placements, regions, shares, peers) if peers is not None else copies

    def _with_exchange(
        self, table: CopyTable, placements: Sequence[Placement], regions: Sequence[NDArray[np.void]],
        shares: Sequence[Share], peers: Sequence[PeerShare],
    ) -> CopyTable:
        """Add the spans of an exchange. Both steps have one, perhaps without regions, so that each has a result."""
        shared = {share.segment for share in shares} | {peer.share.segment for peer in peers}
        mine = {share.segment: share for share in shares}
        parts = []
        for piece, whole in zip(self._pieces, regions, strict=True):
            offset, share = placements[piece.segment].offset, mine.get(piece.segment, Share(piece.segment, 0, 0))
            is_shared = piece.segment in shared
            parts.append(clipped(whole, offset + share.start, offset + share.stop) if is_shared else whole)
        reads = _spans(parts, self._pieces, len(table.regions))
        reads = reads if len(reads) else np.zeros(1, dtype=SPAN_DTYPE)
        all_regions = [table.regions, *parts]
        pairs = self._pairs(peers)
        copies = []
        first = sum(map(len, all_regions))
        for group, stride in sorted(set(zip(pairs["group"].tolist(), pairs["stride"].tolist(), strict=True))):
            chosen = pairs["region"][(pairs["group"] == group) & (pairs["stride"] == stride)]
            sizes = chosen["chunk_bytes"]
            copies.append((first, len(chosen), 0, int(sizes.sum()), int(sizes.max()), group, stride))
            all_regions.append(chosen)
            first += len(chosen)
        reached = np.array(copies, dtype=SPAN_DTYPE) if copies else np.zeros(1, dtype=SPAN_DTYPE)
        return replace(
            table, regions=np.concatenate(all_regions), spans=np.concatenate([table.spans, reads, reached]),
            shares=(len(table.spans), len(reads)), peers=(len(table.spans) + len(reads), len(reached)),
        )

    def _pairs(self, peers: Sequence[PeerShare]) -> NDArray[np.void]:
        """(n,) _PAIR_DTYPE: the regions that copy the peers' shares. Regions of different peers alternate, so that the
        links of all peers are in use at the same time."""
        found, nth = [np.empty(0, dtype=_PAIR_DTYPE)], [np.empty(0, dtype=np.intp)]
        for peer in peers:
            share, address_of = peer.share, dict(zip(self._order[peer.share.segment], peer.addresses, strict=True))
            count = 0
            for piece in (piece for piece in self._pieces if piece.segment == share.segment):
                specs = [replace(self._specs[i], ptr=address_of[i]) for i in piece.tensors]
                theirs = _moved(regions_from_tensors(specs)[0], int(piece.regions["slot_offset"][0]))
                near, far = (clipped(table, share.start, share.stop) for table in (piece.regions, theirs))
                if len(near):
                    regions, strides = paired(near, far)
                    rows = np.zeros(len(regions), dtype=_PAIR_DTYPE)
                    rows["region"], rows["stride"], rows["group"] = regions, strides, piece.group
                    found.append(rows)
                    nth.append(count + np.arange(len(regions)))
                    count += len(regions)
        rows = np.concatenate(found)
        ordered: NDArray[np.void] = rows[np.argsort(np.concatenate(nth), kind="stable")]
        return ordered

    def _layer_bytes(self) -> list[int]:
        """Bytes of a block in each layer."""
        sizes = [0] * (max(self.layers) + 1)
        for layer, spec in zip(self.layers, self._specs, strict=True):
            sizes[layer] += regions_from_tensors([spec])[2]
        return sizes


def _moved(regions: NDArray[np.void], offset: int) -> NDArray[np.void]:
    moved = regions.copy()
    moved["slot_offset"] += np.uint64(offset)
    return moved


def _spans(tables: Sequence[NDArray[np.void]], pieces: Sequence[_Piece], first: int) -> NDArray[np.void]:
    """A span for each table of regions that is not empty. ``first``: the number of regions before them."""
    spans = [np.empty(0, dtype=SPAN_DTYPE)]
    for piece, table in zip(pieces, tables, strict=True):
        if len(table):
            span = spans_of(np.ascontiguousarray(table, dtype=REGION_DTYPE), [(0, len(table))], piece.group)
            span["first"] += first
            spans.append(span)
        first += len(table)
    return np.concatenate(spans)
