"""Slots with segments of one rank and of several, in one or more layer groups, against a model of their bytes."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.protocol.registration import Hello
from flexkv.protocol.ring import OpKind
from flexkv.rank.memory import CopyTable, RankMemory
from flexkv.rank.tensors import tensor_spec
from flexkv.storage.layout import SEGMENT_ALIGNMENT_BYTES, SlotLayout
from tests.support.segment_ranks import Kind, SegmentRank, SlotModel, exchange_of, move, segmented

from .examples import EXAMPLES

SIZES = st.sampled_from([1, 16, 100, 2048, 4096, 9000])
NUM_PAGES, NUM_SLOTS = (6, 4), 8


@st.composite
def rank_kinds(draw: st.DrawFn) -> list[list[Kind]]:
    """Tensors of one to three ranks: each tensor of the model is either a copy of some ranks or a shard of each."""
    num_ranks = draw(st.integers(1, 3))
    kinds: list[list[Kind]] = [[] for _ in range(num_ranks)]
    num_groups = draw(st.integers(1, 2))
    for group in range(num_groups):
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from([None, "a", "b"]))
            size = draw(SIZES)
            for rank in range(num_ranks):
                mine = None if name == "b" and rank == 0 else name       # rank 0 shares no copy "b"
                kinds[rank].append(Kind(size, group, mine))
    return kinds


def copy_spans(table: CopyTable, which: tuple[int, int], slot: "ctypes.Array[ctypes.c_char]", pages: Sequence[int],
               save: bool) -> None:
    """Move one block as an agent does."""
    for span in table.spans[which[0] : sum(which)]:
        for base, stride, size, offset in table.regions[span["first"] : span["first"] + span["num_regions"]].tolist():
            page, there = base + pages[span["group"]] * stride, ctypes.addressof(slot) + offset
            ctypes.memmove(*((there, page) if save else (page, there)), size)


@settings(max_examples=EXAMPLES // 20, deadline=None)
@given(rank_kinds())
def test_every_byte_of_a_slot_has_one_writer_and_reaches_all_readers(kinds: list[list[Kind]]) -> None:
    ranks = [SegmentRank(Path("unused"), rank, mine, NUM_PAGES) for rank, mine in enumerate(kinds)]
    memories = [RankMemory([tensor_spec(tensor) for tensor in rank.tensors], None, [kind.group for kind in rank.kinds],
                           [kind.copy for kind in rank.kinds]) for rank in ranks]
    layout = SlotLayout.of([Hello(0, 0, rank, 1, memory.num_pages, memory.segments)
                            for rank, memory in enumerate(memories)])
    tables = [memory.copy_table(layout.placements(rank)) for rank, memory in enumerate(memories)]
    covered = np.zeros(layout.slot_bytes, dtype=np.int32)
    for table in tables:
        for span in table.spans[table.saves[0] : sum(table.saves)]:
            covered[span["slot_offset"] : span["slot_offset"] + span["bytes"]] += 1
    expected = np.zeros(layout.slot_bytes, dtype=np.int32)
    for segment in layout.segments:
        assert segment.offset % SEGMENT_ALIGNMENT_BYTES == 0
        expected[segment.offset : segment.offset + segment.claim.segment_bytes] += 1
    np.testing.assert_array_equal(covered, expected)
    slot = (ctypes.c_char * layout.slot_bytes)()
    pages = [2, 1][: len(memories[0].num_pages)]
    for seed, save in ((1, True), (2, False)):
        for rank, table in zip(ranks, tables, strict=True):
            rank.fill(seed)
            copy_spans(table, table.saves if save else table.loads, slot, pages, save)
    for rank in ranks:
        loaded = [tensor.copy() for tensor in rank.tensors]
        rank.fill(1)
        for kind, tensor, got in zip(rank.kinds, rank.tensors, loaded, strict=True):
            np.testing.assert_array_equal(got[pages[kind.group]], tensor[pages[kind.group]])


def blocks(num_groups: int) -> st.SearchStrategy[list[tuple[int, tuple[int, ...]]]]:
    """Slots and pages of an op, each slot and each page at most once; -1: no page, but in one group at least."""
    pages = st.tuples(*(st.integers(-1, NUM_PAGES[group] - 1) for group in range(num_groups)))
    block = st.tuples(st.integers(0, NUM_SLOTS - 1), pages.filter(lambda numbers: max(numbers) >= 0))
    uniques = (lambda block: block[0], *(
        lambda block, group=group: block[1][group] if block[1][group] >= 0 else ("none", block)
        for group in range(num_groups)
    ))
    return st.lists(block, min_size=1, max_size=4, unique_by=uniques)


@settings(max_examples=min(EXAMPLES, 40), deadline=None)
@given(st.data(), rank_kinds())
def test_ranks_move_the_bytes_of_the_model(data: st.DataObject, kinds: list[list[Kind]]) -> None:
    num_groups = 1 + max(kind.group for kind in kinds[0])
    ops = data.draw(st.lists(st.tuples(st.sampled_from([OpKind.D2H, OpKind.H2D]), blocks(num_groups)), max_size=8))
    with TemporaryDirectory() as folder, segmented(Path(folder) / "s", kinds, NUM_PAGES, NUM_SLOTS) as (manager, ranks):
        for rank in ranks:
            rank.fill(3)
        model = SlotModel(ranks, NUM_SLOTS)
        for kind, moved in ops:
            slots, pages = [slot for slot, _ in moved], np.array([numbers for _, numbers in moved]).T.tolist()
            layerwise = kind is OpKind.H2D and len(moved) > 2
            exchange = exchange_of(manager) if kind is OpKind.H2D and not layerwise else 0
            assert move(manager, kind, slots, pages, layerwise=layerwise, exchange=exchange).all()
            model.move(kind, slots, pages)
            model.check()
