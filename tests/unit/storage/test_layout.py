"""The layout of a slot: segments of one rank, and segments that several ranks share."""

import hashlib
from dataclasses import replace

import pytest

from flexkv.errors import InvariantError, RegistrationError
from flexkv.protocol.registration import Hello, Placement, SegmentClaim, SegmentKind
from flexkv.storage.layout import Part, SlotLayout, check_agreement
from tests.support.harness import hello_of


def copy_of(name: str, segment_bytes: int = 6144, content: bytes = bytes(16)) -> SegmentClaim:
    return SegmentClaim(SegmentKind.REPLICA, segment_bytes, content, name.encode().ljust(16, b"-"))


def rank_of(rank: int, *segments: SegmentClaim, pp_rank: int = 0) -> Hello:
    return hello_of(rank, segments=segments, pp_rank=pp_rank)


def test_sharded_slots_have_one_segment_a_rank() -> None:
    layout = SlotLayout.sharded([100, 5000, 64])
    assert [segment.offset for segment in layout.segments] == [0, 128, 5184]
    assert layout.slot_bytes == 8192
    assert layout.placements(1) == (Placement(128, 5000, 0, 5000),)
    assert [segment.readers for segment in layout.segments] == [(0,), (1,), (2,)]


def test_the_content_of_sharded_slots_is_that_of_earlier_versions() -> None:
    layout = SlotLayout.of([hello_of(0, 100), hello_of(1, 5000)])
    assert layout.content == hashlib.sha256(repr(((100, 5000), (bytes(16), bytes(16)))).encode()).digest()


def test_a_copy_is_stored_once_and_read_by_all() -> None:
    layout = SlotLayout.of([rank_of(rank, copy_of("mla")) for rank in range(3)])
    [segment] = layout.segments
    assert (segment.readers, segment.parts, layout.slot_bytes) == ((0, 1, 2), (Part(0, 0, 6144),), 8192)
    assert [layout.placements(rank)[0].write_stop for rank in range(3)] == [6144, 0, 0]
    assert layout.content != SlotLayout.sharded([6144]).content


def test_each_rank_writes_a_part_of_a_large_copy() -> None:
    layout = SlotLayout.of([rank_of(rank, copy_of("mla", 30_000)) for rank in range(3)])
    assert layout.segments[0].parts == (Part(0, 0, 12288), Part(1, 12288, 24576), Part(2, 24576, 30_000))


@pytest.mark.parametrize(("writer", "rank"), [(0, 0), (1, 1), (5, 2)])
def test_one_rank_may_write_all_of_a_copy(writer: int, rank: int) -> None:
    layout = SlotLayout.of([rank_of(rank, copy_of("mla", 30_000)) for rank in range(3)], writer)
    assert layout.segments[0].parts == (Part(rank, 0, 30_000),)
    assert layout.content == SlotLayout.of([rank_of(rank, copy_of("mla", 30_000)) for rank in range(3)]).content


def test_copies_of_other_names_and_other_stages_are_apart() -> None:
    shard = SegmentClaim(SegmentKind.SHARD, 100, bytes(16))
    layout = SlotLayout.of([
        rank_of(0, copy_of("a"), shard), rank_of(1, shard, copy_of("a")), rank_of(2, copy_of("b")),
        rank_of(0, copy_of("a"), pp_rank=1),
    ])
    assert [segment.readers for segment in layout.segments] == [(0, 1), (0,), (1,), (2,), (3,)]
    assert layout.held == ((0, 1), (2, 0), (3,), (4,))
    assert layout.claims(1) == (shard, copy_of("a"))


@pytest.mark.parametrize("wrong", [copy_of("a", 6145), copy_of("a", content=b"y" * 16)])
def test_replicas_that_differ_are_refused(wrong: SegmentClaim) -> None:
    with pytest.raises(RegistrationError, match="must register equal tensors"):
        SlotLayout.of([rank_of(0, copy_of("a")), rank_of(1, wrong)])
    check_agreement([rank_of(0, copy_of("a")), rank_of(0, wrong, pp_rank=1)])


def test_ranks_with_other_layer_groups_are_refused() -> None:
    with pytest.raises(RegistrationError, match="2 layer groups"):
        check_agreement([hello_of(0), hello_of(1, num_pages=(4, 4))])


def test_layouts_without_bytes_are_refused() -> None:
    for sizes in ([], [4096, 0]):
        with pytest.raises(RegistrationError):
            SlotLayout.sharded(sizes)


def test_integrity() -> None:
    layout = SlotLayout.of([rank_of(rank, copy_of("a", 9000)) for rank in range(2)])
    [segment] = layout.segments
    first, second = segment.parts
    for parts in ((first,), (second,), (first, first), (first, replace(second, rank=2)),
                  (replace(first, stop=0), second)):
        with pytest.raises(InvariantError, match="writer"):
            replace(layout, segments=(replace(segment, parts=parts),)).check_integrity()
    with pytest.raises(InvariantError, match="overlaps"):
        replace(layout, segments=(segment, segment)).check_integrity()
