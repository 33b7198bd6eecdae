"""Loads in which each rank reads a part of equal KV, and the other parts from its peers: bytes, order, faults."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.transfer.executors import device
from flexkv.transfer.executors.device import DeviceExecutor
from flexkv.transfer.graph import OpStatus, TransferOp
from tests.support.harness import (
    TOKENS,
    check_drained,
    controller_of,
    mapping,
    tokens_of,
    until,
    wait_ready,
)
from tests.support.segment_ranks import Kind, SegmentRank, SlotModel, begin, exchange_of, move, segmented

LATENT = [Kind(20_000, copy="latent"), Kind(20_000, copy="latent"), Kind(1_312, copy="indexer")]
"""KV that is equal on all ranks, in two copies; the second is too small to be read in parts."""

MIXED = [Kind(4096), Kind(40_000, copy="a"), Kind(300, 1), Kind(9000, 1, "a")]
"""Two layer groups, in a shard of the rank and in a copy."""


def heads_of(num_ranks: int) -> list[list[Kind]]:
    """Two ranks share a head, beside a shard of each rank; the last rank shares nothing."""
    return [[Kind(30_000, copy=f"head {rank // 2}"), Kind(700)] for rank in range(num_ranks - 1)] + [[Kind(30_700)]]


def through(manager: KVManager, ranks: list[SegmentRank], num_pages: int) -> None:
    """Save, overwrite every page, load in an exchange: each rank has the bytes that it computed."""
    groups, rng = 1 + max(kind.group for kind in ranks[0].kinds), np.random.default_rng(1)
    for seed in range(3):
        for rank in ranks:
            rank.fill(seed)
        model = SlotModel(ranks, 8)
        slots, pages = [4, 0, 5, 7], [rng.permutation(num_pages)[:4].tolist() for _ in range(groups)]
        if groups > 1:
            pages[1][2] = -1
        assert move(manager, OpKind.D2H, slots, pages).all()
        model.move(OpKind.D2H, slots, pages)
        for rank, tensors in zip(ranks, model.pages, strict=True):
            for tensor, expected in zip(rank.tensors, tensors, strict=True):
                tensor[:] = expected[:] = rng.integers(0, 256, tensor.shape[1])
        order = rng.permutation(4)
        slots, pages = [slots[i] for i in order], [[group[i] for i in order] for group in pages]
        pages[0] = rng.permutation(num_pages)[:4].tolist()
        graph, done = begin(manager, OpKind.H2D, slots, pages, exchange=exchange_of(manager))
        assert controller_of(manager)._cache.transfer.wait(lambda done=done: bool(done), 10.0)
        assert graph.status is OpStatus.DONE
        model.move(OpKind.H2D, slots, pages)
        model.check()
        for rank in ranks:
            results = {result.task_id: result for result in rank.client.poll_results()}
            assert results[graph.task_id].kind is OpKind.H2D
            assert results[graph.task_id].ok.tolist() == [True] * 4


@pytest.mark.parametrize("mode", ["sharded", "rank0_only", "rank_rotate"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["latent", "heads", "mixed"])
def test_each_rank_has_the_bytes_that_computing_would_have_written(
    tmp_path: Path, name: str, num_ranks: int, mode: str
) -> None:
    kinds = {"latent": [LATENT] * num_ranks, "heads": heads_of(num_ranks + 1), "mixed": [MIXED] * num_ranks}[name]
    with segmented(tmp_path / "s", kinds, [12, 12], kv_shared_across_ranks_mode=mode) as (manager, ranks):
        assert exchange_of(manager)
        through(manager, ranks, 12)


@contextmanager
def two(tmp_path: Path, kinds: list[Kind] = LATENT, num_ranks: int = 2, **transfer: Any) -> Iterator[
    tuple[KVManager, list[SegmentRank], SlotModel]
]:
    """Ranks whose slots 0 to 3 hold the pages 0 to 3, and whose pages were overwritten then."""
    with segmented(tmp_path / "s", [kinds] * num_ranks, [8, 8], **transfer) as (manager, ranks):
        for rank in ranks:
            rank.fill(1)
        model = SlotModel(ranks, 8)
        assert move(manager, OpKind.D2H, [0, 1, 2, 3], [[0, 1, 2, 3]]).all()
        model.move(OpKind.D2H, [0, 1, 2, 3], [[0, 1, 2, 3]])
        for rank, tensors in zip(ranks, model.pages, strict=True):
            for tensor, expected in zip(rank.tensors, tensors, strict=True):
                tensor[:] = expected[:] = 170
            rank.client.poll_results()
        yield manager, ranks, model


def loading(manager: KVManager, **second: Any) -> tuple[Any, list[Any]]:
    """A load of which the first step may run at once, and the second one when rank 0 is in step 6."""
    return begin(manager, OpKind.H2D, [0, 1, 2, 3], [[4, 5, 6, 7]], second={"fence": 6, **second}, fence=5,
                 exchange=exchange_of(manager))


def test_a_step_reads_parts_and_the_next_one_waits_for_all_ranks(tmp_path: Path) -> None:
    with two(tmp_path) as (manager, ranks, model):
        for rank in ranks:
            rank.client.advance_fence(4, 4)
        graph, done = loading(manager)
        first, second = graph.ops
        ranks[0].client.advance_fence(6, 6)
        until(lambda: (ranks[0].tensors[0][4:] != 170).any())
        until(lambda: not (ranks[0].tensors[0][4:, :16384] == 170).all(axis=1).any())
        assert first.num_resolved == second.num_resolved == 0
        assert (ranks[0].tensors[1][4:, 8192:] == 170).all()             # the part of rank 1
        assert (ranks[1].tensors[0] == 170).all()
        assert not any(rank.client.poll_results() for rank in ranks)
        ranks[1].client.advance_fence(5, 5)
        until(lambda: first.done)
        assert first.ok.all()
        assert (ranks[1].tensors[0][4:, :16384] == 170).all()            # its own fence holds for the second step
        assert not ranks[1].client.poll_results()
        assert not done
        ranks[0].tensors[0][4, :100] = 7                                 # other bytes than those of the slot
        ranks[1].client.advance_fence(6, 6)
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.DONE
        model.move(OpKind.H2D, [0, 1, 2, 3], [[4, 5, 6, 7]])
        for tensors in model.pages:
            tensors[0][4, :100] = 7
        model.check()


def test_a_cancel_between_the_steps_ends_the_load_for_all_ranks(tmp_path: Path) -> None:
    with two(tmp_path) as (manager, ranks, _):
        ranks[0].client.advance_fence(6, 6)
        ranks[1].client.advance_fence(5, 5)
        graph, done = loading(manager)
        transfer = controller_of(manager)._cache.transfer
        until(lambda: graph.ops[0].done and any(rank.client.poll_results() for rank in ranks[:1]))
        assert not done
        transfer.cancel(graph)
        assert transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.CANCELLED
        assert not graph.ops[1].ok.any()
        [result] = ranks[1].client.poll_results()
        assert not result.ok.any()
        assert (ranks[1].tensors[0][4:, :16384] == 170).all()


def test_a_block_that_one_rank_cannot_read_fails_on_all(tmp_path: Path) -> None:
    """Slot 9 does not exist; the other blocks arrive."""
    with two(tmp_path) as (manager, ranks, model):
        graph, done = begin(manager, OpKind.H2D, [0, 9, 2], [[4, 5, 6]], exchange=exchange_of(manager))
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.FAILED
        assert graph.ops[1].ok.tolist() == [True, False, True]
        model.move(OpKind.H2D, [0, 2], [[4, 6]])
        model.check()
        for rank in ranks:
            parts = rank.client.poll_results()
            assert sorted(np.concatenate([part.failed_pages for part in parts]).tolist()) == [5]


@pytest.mark.parametrize("leaver", [0, 1], ids=["one that has its result", "one that waits"])
def test_a_rank_that_leaves_between_the_steps_ends_the_load(tmp_path: Path, leaver: int) -> None:
    """Also one that has all its bytes: the others may still read its pages, which are no longer kept for them."""
    with two(tmp_path, num_ranks=3) as (manager, ranks, _):
        ranks[0].client.advance_fence(6, 6)
        for rank in ranks[1:]:
            rank.client.advance_fence(5, 5)
        graph, done = loading(manager)
        until(lambda: graph.ops[0].done and bool(ranks[0].client.poll_results()))
        ranks[leaver].client.close()
        until(lambda: graph.status is OpStatus.FAILED)
        assert graph.ops[1].is_lost
        for rank in ranks:
            rank.client.advance_fence(6, 6)
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.FAILED
        assert exchange_of(manager) == 0


def test_a_rank_that_registers_again_is_read_only_when_all_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    with two(tmp_path) as (manager, ranks, model):
        first = exchange_of(manager)
        old = ranks[1].tensors[0]

        def again(*numbers: int) -> None:
            for number in numbers:
                ranks[number].client.close()
            until(lambda: not manager.is_ready())
            for number in numbers:
                until(lambda: controller_of(manager)._cache.listener._registries[0].rank_ids is not None)
                ranks[number] = SegmentRank(tmp_path / "s", number, LATENT, [8, 8])
                ranks[number].register()
                for tensor in ranks[number].tensors:
                    tensor[:] = 170
            model._ranks = ranks
            wait_ready(manager, 8)

        again(1)
        assert exchange_of(manager) == 0
        assert "a rank has registered again" in caplog.text
        old[:] = 99
        assert not move(manager, OpKind.H2D, [0, 1], [[4, 5]], exchange=first).any()      # an old graph
        assert move(manager, OpKind.H2D, [0, 1], [[4, 5]]).all()
        model.move(OpKind.H2D, [0, 1], [[4, 5]])
        model.check()
        again(0, 1)
        for tensors in model.pages:
            for tensor in tensors:
                tensor[:] = 170
        until(lambda: exchange_of(manager) > first)
        assert move(manager, OpKind.H2D, [0, 1], [[4, 5]], exchange=exchange_of(manager)).all()
        model.move(OpKind.H2D, [0, 1], [[4, 5]])
        model.check()


# ---- which loads, and which ranks --------------------------------------------------------------------------------


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TransferOp]]:
    ops: list[TransferOp] = []
    submit = DeviceExecutor.submit

    def record(self: DeviceExecutor, op: TransferOp, *others: Any) -> None:
        ops.append(op)
        submit(self, op, *others)

    monkeypatch.setattr(DeviceExecutor, "submit", record)
    yield ops


@pytest.mark.parametrize(("least_bytes", "layerwise", "expected"), [
    (1, False, {OpKind.D2H, OpKind.H2D, OpKind.P2D}), (1, True, {OpKind.D2H, OpKind.H2D}),
    (200_000, False, {OpKind.D2H, OpKind.H2D}),
])
def test_large_loads_of_tasks_are_exchanges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes: int, layerwise: bool, expected: set[OpKind]
) -> None:
    monkeypatch.setattr(device, "_EXCHANGE_BYTES", least_bytes)
    with segmented(tmp_path / "s", [LATENT] * 4, [12]) as (manager, ranks), recorded(monkeypatch) as ops:
        for rank in ranks:
            rank.fill(1)
        before = [[tensor[:3].copy() for tensor in rank.tensors] for rank in ranks]
        task = manager.put_async(tokens_of(3), mapping([0, 1, 2]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(3))
        pages = np.array([7, 5, 6], dtype=np.int32)
        task = manager.blocks.get_blocks(hasher.keys, 0, pages, layerwise=layerwise)
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert {op.kind for op in ops} == expected
        for rank, tensors in zip(ranks, before, strict=True):
            for tensor, saved in zip(rank.tensors, tensors, strict=True):
                np.testing.assert_array_equal(tensor[pages], saved)
            until(lambda rank=rank, task=task: task in {result.task_id for result in rank.client.poll_results()})


@pytest.mark.parametrize("reason", ["the setting", "one rank", "no copies", "tensors in another layout"])
def test_ranks_that_read_all_from_host_memory(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    options: dict[str, Any] = {"exchange_copies": False} if reason == "the setting" else {}
    kinds = [LATENT] if reason == "one rank" else [[Kind(9000)]] * 2 if reason == "no copies" else [LATENT] * 2
    if reason == "tensors in another layout":
        fill = SegmentRank.__init__

        def wider(self: SegmentRank, path: Path, rank: int, *others: Any, **more: Any) -> None:
            fill(self, path, rank, *others, **more)
            if rank == 1:
                self.tensors = [np.zeros((len(each), each.shape[1] + 64), np.uint8)[:, :-64] for each in self.tensors]

        monkeypatch.setattr(SegmentRank, "__init__", wider)
    with segmented(tmp_path / "s", kinds, [8], **options) as (manager, ranks):
        assert exchange_of(manager) == 0
        for rank in ranks:
            rank.fill(1)
        model = SlotModel(ranks, 8)
        for kind, pages in ((OpKind.D2H, [1, 2]), (OpKind.H2D, [4, 3])):
            assert move(manager, kind, [0, 1], [pages]).all()
            model.move(kind, [0, 1], [pages])
        model.check()
    if reason == "tensors in another layout":
        assert "another layout" in caplog.text


class Sequences:
    """KV of four ranks: of each block, the bytes that computing writes into each tensor of each rank."""

    def __init__(self, ranks: list[SegmentRank]) -> None:
        self.ranks = ranks

    def content(self, rank: int, index: int, sequence: int, block: int) -> np.ndarray:
        kind = self.ranks[rank].kinds[index]
        name = rank if kind.copy is None else 1000
        return np.random.default_rng([sequence, block, index, name]).integers(0, 256, kind.page_bytes, dtype=np.uint8)

    def write(self, pages: list[int], sequence: int | None) -> None:
        """Compute the blocks of a sequence into pages; None: other bytes."""
        for number, rank in enumerate(self.ranks):
            for index, tensor in enumerate(rank.tensors):
                for block, page in enumerate(pages):
                    tensor[page] = 170 if sequence is None else self.content(number, index, sequence, block)

    def check(self, pages: list[int], sequence: int) -> None:
        for number, rank in enumerate(self.ranks):
            for index, tensor in enumerate(rank.tensors):
                for block, page in enumerate(pages):
                    np.testing.assert_array_equal(tensor[page], self.content(number, index, sequence, block))


@pytest.mark.parametrize("seed", [1, 2])
def test_loads_that_succeed_are_right_whatever_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Pages are used again as soon as their load is at rest; nothing leaks."""
    monkeypatch.setattr(device, "_EXCHANGE_BYTES", 1)
    rng = random.Random(seed)
    with segmented(tmp_path / "s", [[*LATENT, Kind(700)]] * 4, [40], 24) as (manager, ranks):
        sequences, free, loads, num_right = Sequences(ranks), list(range(40)), list[tuple[int, list[int], int]](), 0

        def settle() -> int:
            task, pages, sequence = loads.pop(0)
            response = manager.wait(task, completely=True)[task]
            assert response.return_mask is not None
            num_loaded = int(response.return_mask.sum()) // TOKENS
            assert response.return_mask[: num_loaded * TOKENS].all()
            sequences.check(pages[:num_loaded], sequence)
            assert not num_loaded or response.status is Status.SUCCESS
            sequences.write(pages, None)
            free.extend(pages)
            return num_loaded

        for _ in range(60):
            sequence, count = rng.randrange(6), rng.randint(1, 6)
            while len(free) < count:
                num_right += settle()
            pages = [free.pop(rng.randrange(len(free))) for _ in range(count)]
            if rng.random() < 0.3:
                sequences.write(pages, sequence)
                task = manager.put_async(tokens_of(6, sequence)[: count * TOKENS], mapping(pages))
                manager.wait(task, completely=True)
                sequences.write(pages, None)
                free.extend(pages)
                continue
            task = manager.get_async(tokens_of(6, sequence)[: count * TOKENS], mapping(pages))
            loads.append((task, pages, sequence))
            if rng.random() < 0.3:
                manager.cancel(task)
        while loads:
            num_right += settle()
        assert num_right > 20
        check_drained(manager)
