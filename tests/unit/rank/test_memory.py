"""The memory of a rank: which segments and layer groups its tensors make, and the copies of saves and loads."""

import numpy as np
import pytest

from flexkv.errors import RegistrationError
from flexkv.protocol.registration import Placement, SegmentKind
from flexkv.rank.memory import RankMemory
from flexkv.rank.regions import TensorSpec
from flexkv.rank.tensors import content_digest, tensor_spec

ARRAYS = [np.zeros((pages, size), dtype=np.uint8) for pages, size in ((8, 100), (8, 200), (5, 300), (5, 400))]
SPECS = [tensor_spec(array) for array in ARRAYS]
GROUPS = [0, 0, 1, 1]


def test_one_segment_by_default() -> None:
    memory = RankMemory(SPECS[:2])
    [claim] = memory.segments
    assert (claim.kind, claim.segment_bytes, memory.num_pages) == (SegmentKind.SHARD, 300, (8,))
    assert claim.content == content_digest(SPECS[:2])
    table = memory.copy_table([Placement(128, 300, 0, 300)])
    assert (table.saves, table.loads, table.layers, table.span_of_layer) == ((0, 1), (0, 1), (1, 2), [1, 2])
    assert table.spans["slot_offset"].tolist() == [128, 128, 228]
    assert table.spans["bytes"].tolist() == [300, 100, 200]
    assert table.num_load_regions == len(table.regions) == 2


def test_a_span_for_each_layer_group_of_each_segment() -> None:
    memory = RankMemory(SPECS, groups=GROUPS, copies=["x", None, None, "x"])
    assert [claim.segment_bytes for claim in memory.segments] == [500, 500]
    assert memory.num_pages == (8, 5)
    table = memory.copy_table([Placement(0, 500, 64, 164), Placement(512, 500, 0, 500)])
    first, count = table.loads
    assert table.spans[first : first + count].tolist() == [
        (0, 1, 0, 100, 100, 0, 0), (1, 1, 100, 400, 400, 1, 0), (2, 1, 512, 200, 200, 0, 0),
        (3, 1, 712, 300, 300, 1, 0)]
    first, count = table.saves
    assert table.spans[first : first + count].tolist() == [
        (4, 1, 64, 36, 36, 0, 0), (5, 1, 100, 64, 64, 1, 0), (6, 1, 512, 200, 200, 0, 0),
        (7, 1, 712, 300, 300, 1, 0)]
    assert table.regions["base"][4] == ARRAYS[0].ctypes.data + 64
    assert table.span_of_layer == [0, 2, 3, 1]
    assert (table.layers, table.num_load_regions) == (table.loads, 4)


def test_a_rank_that_writes_nothing_has_no_spans_of_saves() -> None:
    table = RankMemory(SPECS[:2], copies=["x", "x"]).copy_table([Placement(0, 300, 0, 0)])
    assert (table.saves[1], len(table.regions), table.num_load_regions) == (0, 2, 2)


def test_pages_with_another_meaning_are_of_another_layout() -> None:
    """Equal shapes hide it: with decode context parallelism a page has other tokens for each interleave."""
    meanings = ("", "interleave 1", "interleave 4")
    assert len({RankMemory(SPECS[:2], meaning=meaning).segments[0].content for meaning in meanings}) == 3


def test_the_digest_of_a_copy_says_which_groups_it_is_in() -> None:
    same = [SPECS[0], SPECS[0]]
    claims = [RankMemory(same, groups=groups, copies=["x"] * 2).segments[0] for groups in (None, [0, 1], [1, 0])]
    assert claims[0].content != claims[1].content == claims[2].content        # bytes are in order of the groups
    assert claims[0].copy == claims[1].copy != RankMemory(same, copies=["y"] * 2).segments[0].copy


@pytest.mark.parametrize(("specs", "options", "reason"), [
    ([], {}, "no tensors"),
    (SPECS, {}, "pages"),
    (SPECS, {"groups": [0, 1, 1, 1]}, "pages"),
    (SPECS, {"groups": [0, 0, 1, 0], "copies": [None, None, None, "x"]}, "in layer group 0"),
    (SPECS, {"groups": [0, 0, 2, 2]}, "without gaps"),
    (SPECS, {"groups": [0, 0, -1, -1]}, "without gaps"),
    (SPECS[:2], {"groups": [0]}, "one for each tensor"),
    (SPECS[:2], {"copies": ["x"] * 3}, "one for each tensor"),
    (SPECS[:2], {"layers": [0]}, "one for each tensor"),
    (SPECS[:2], {"layers": [-1, 0]}, "number them from 0"),
    (SPECS[:2], {"layers": [1, 0]}, "in their order"),
    ([SPECS[0]] * 9, {"groups": list(range(9))}, "at most 8"),
    ([SPECS[0]] * 9, {"copies": list("abcdefghi")}, "at most 8"),
])
def test_tensors_that_do_not_fit_are_refused(specs: list[TensorSpec], options: dict[str, list], reason: str) -> None:
    with pytest.raises(RegistrationError, match=reason):
        RankMemory(specs, **options)
