"""Segments that ranks share: each byte is written once, and the death of a rank fails only the ops that concern it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flexkv._core.device.agent import STRATEGIES
from flexkv.controller.registry import Registry
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.rank.rank import RankClient
from flexkv.transfer.graph import OpStatus
from tests.native.fake_cuda.fake import fake_cuda
from tests.support.harness import (
    LAYERS,
    RankProcess,
    Tensors,
    controller_of,
    make_manager,
    mapping,
    tokens_of,
    until,
    wait_ready,
)
from tests.support.segment_ranks import Kind, SlotModel, begin, move, segmented

MLA = ["latent"] * LAYERS
"""Copies of the tensors of a rank whose KV is equal on all ranks."""

WIDE = (2, 4, 2, 512)                     # 48 KiB a block, so that two ranks write a part each
GROUPS = [Kind(4096), Kind(512, copy="a"), Kind(300, 1), Kind(9000, 1, "a")]
"""Two layer groups with other bytes a page, in a segment of the rank and a copy."""


@contextmanager
def copies(tmp_path: Path, page_shape: tuple[int, ...] | None = None, **transfer: float) -> Iterator[
    tuple[KVManager, list[RankProcess]]
]:
    """Two ranks in processes of their own that share all their KV."""
    manager = make_manager(tmp_path / "s", 48, 2, **transfer)
    shape = {} if page_shape is None else {"page_shape": page_shape}
    ranks = [RankProcess(str(tmp_path / "s"), rank, copies=MLA, **shape) for rank in range(2)]    # type: ignore[arg-type]
    try:
        wait_ready(manager)
        for rank in ranks:
            rank("tensors", "fill", [0, 1, 2], 7)
        yield manager, ranks
    finally:
        manager.shutdown()
        for rank in ranks:
            rank.kill()


def save(manager: KVManager, seed: int) -> Status:
    task = manager.put_async(tokens_of(3, seed), mapping([0, 1, 2]))
    return manager.wait(task, timeout=5.0)[task].status


def load(manager: KVManager, seed: int) -> Status:
    task = manager.get_async(tokens_of(3, seed), mapping([3, 4, 5]))
    return manager.wait(task, timeout=5.0)[task].status


# ---- ranks that run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_shape", [None, WIDE], ids=["one writer", "two writers"])
def test_equal_kv_is_stored_once_and_read_by_all(tmp_path: Path, page_shape: tuple[int, ...] | None) -> None:
    with copies(tmp_path, page_shape) as (manager, ranks):
        [before] = {rank("tensors", "read", [0, 1, 2]) for rank in ranks}
        assert controller_of(manager)._cache.listener.host_pool.slot_bytes == -(-len(before) // 3 // 4096) * 4096
        assert save(manager, 1) is Status.SUCCESS
        assert load(manager, 1) is Status.SUCCESS
        assert {rank("tensors", "read", [3, 4, 5]) for rank in ranks} == {before}


@pytest.mark.parametrize("mode", ["sharded", "rank0_only", "rank_rotate", "layer_parallel", "all_write"])
@pytest.mark.parametrize("num_heads", [1, 2, 8], ids=["MLA", "two heads", "all sharded"])
def test_eight_ranks_store_equal_kv_once(tmp_path: Path, mode: str, num_heads: int) -> None:
    """Host bytes do not depend on the number of ranks; saved, the pages overwritten, and loaded by all."""
    ranks_a_head = 8 // num_heads
    kinds = [[Kind(20_000, copy=None if ranks_a_head == 1 else f"head {rank // ranks_a_head}"), ] * 3
             for rank in range(8)]
    with segmented(tmp_path / "s", kinds, [6], kv_shared_across_ranks_mode=mode) as (manager, ranks):
        assert controller_of(manager)._cache.listener.host_pool.slot_bytes <= num_heads * (60_000 + 64) + 4096
        for rank in ranks:
            rank.fill(1)
        model = SlotModel(ranks, 8)
        for kind, slots, pages in ((OpKind.D2H, [0, 1, 2, 7], [5, 4, 3, 0]), (OpKind.H2D, [2, 0, 7], [0, 1, 2]),
                                   (OpKind.D2H, [3], [1]), (OpKind.H2D, [3, 1], [5, 4])):
            assert move(manager, kind, slots, [pages]).all()
            model.move(kind, slots, [pages])
            model.check()
            for rank in ranks:                             # of the pages that are free
                rank.tensors[0][3] = 0
            for tensors in model.pages:
                tensors[0][3] = 0


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_each_rank_writes_its_part_of_a_copy(tmp_path: Path, strategy: str | None) -> None:
    """Bytes of the slot, by which rank they came from."""
    options = {} if strategy is None else {"device": 0, "gpu_strategy": strategy, "gpu_window_mb": 1}
    with fake_cuda().checked(), segmented(
        tmp_path / "s", [[Kind(9000, copy="a"), Kind(4000)]] * 2, [6], **options       # type: ignore[arg-type]
    ) as (manager, ranks):
        for number, rank in enumerate(ranks):
            for tensor in rank.tensors:
                tensor[:] = 1 + number
        assert move(manager, OpKind.D2H, [3, 5], [[1, 4]]).all()
        for slot in (3, 5):
            found = np.frombuffer(controller_of(manager)._cache.listener.host_pool.slot(slot), dtype=np.uint8)
            expected = np.zeros(len(found), dtype=np.uint8)
            expected[:8192], expected[8192:9000] = 1, 2
            expected[9024:13024], expected[13056:17056] = 1, 2
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_groups_have_pages_of_their_own(tmp_path: Path, strategy: str | None) -> None:
    """-1 skips a group; the group's bytes in slots and pages stay as they are. A block without any page fails."""
    options = {} if strategy is None else {"device": 0, "gpu_strategy": strategy, "gpu_window_mb": 1}
    with fake_cuda().checked(), segmented(tmp_path / "s", [GROUPS] * 3, [6, 4], **options) as (      # type: ignore[arg-type]
        manager, ranks
    ):
        for rank in ranks:
            rank.fill(1)
        model = SlotModel(ranks, 8)
        for kind, slots, pages in (
            (OpKind.D2H, [0, 1, 2, 3], [[5, 4, 3, 2], [0, 1, 2, 3]]),
            (OpKind.D2H, [1, 2, 3], [[-1, 0, 1], [3, -1, 2]]),
            (OpKind.H2D, [0, 2, 1], [[4, 5, -1], [-1, -1, 0]]),
            (OpKind.H2D, [3, 1, 0], [[0, -1, 1], [1, 2, 3]]),
        ):
            for layerwise in {False, kind is OpKind.H2D}:
                assert move(manager, kind, slots, pages, layerwise=layerwise).all()
                model.move(kind, slots, pages)
                model.check()
        for kind in (OpKind.D2H, OpKind.H2D):
            ok = move(manager, kind, [4, 5, 6, 7, 1], [[-1, 6, 0, 0, 2], [-1, 0, 4, -2, -1]])
            assert ok.tolist() == [False, False, False, False, True]
            model.move(kind, [1], [[2], [-1]])
        model.check()


@pytest.mark.parametrize("sizes", [(8, 4088), (4088, 8), (4081, 15)])
@pytest.mark.parametrize("strategy", ["auto", "staged"])
def test_a_group_that_almost_fills_the_slot_leaves_the_rest_as_it_is(
    tmp_path: Path, strategy: str, sizes: tuple[int, int]
) -> None:
    """Runs of slots up to the last of the pool: copies end with the group's bytes."""
    kinds, every = [[Kind(sizes[0]), Kind(sizes[1], 1)]], list(range(64))
    with fake_cuda().checked(), segmented(
        tmp_path / "s", kinds, [64, 64], 64, device=0, gpu_strategy=strategy, gpu_window_mb=1
    ) as (manager, [rank]):
        rank.fill(1)
        model, absent = SlotModel([rank], 64), [-1] * 64
        for kind, pages in (
            (OpKind.D2H, [every, every]), (OpKind.D2H, [every[::-1], absent]), (OpKind.D2H, [absent, every[::-1]]),
            (OpKind.H2D, [every, every]),
        ):
            assert move(manager, kind, every, pages).all()
            model.move(kind, every, pages)
            model.check()


def test_results_on_a_rank_have_the_pages_of_each_group(tmp_path: Path) -> None:
    with segmented(tmp_path / "s", [GROUPS], [6, 4]) as (manager, [rank]):
        assert move(manager, OpKind.D2H, [1, 2, 9], [[3, -1, 0], [-1, 2, 0]]).tolist() == [True, True, False]
        [result] = rank.client.poll_results()
        assert result.pages.tolist() == [[3, -1, 0], [-1, 2, 0]]
        assert result.failed_pages.tolist() == [[0], [0]]


def test_an_op_with_the_pages_of_other_groups_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with segmented(tmp_path / "s", [GROUPS], [6, 4]) as (manager, _):
        for pages in ([[1, 2]], [[1, 2]] * 3):
            assert not move(manager, OpKind.D2H, [1, 2], pages).any()
        assert move(manager, OpKind.D2H, [1, 2], [[1, 2]] * 2).all()
    assert "for 2 layer groups" in caplog.text


def test_large_ops_are_cut_to_records_with_all_groups(tmp_path: Path) -> None:
    kinds, num_pages = [[Kind(16), Kind(8, 1)]], [700, 300]
    with segmented(tmp_path / "s", kinds, num_pages, 600, ring_bytes=4096) as (manager, [rank]):
        rank.fill(1)
        model, rng = SlotModel([rank], 600), np.random.default_rng(1)
        for kind in (OpKind.D2H, OpKind.H2D):
            pages = [rng.permutation(700)[:600].tolist(), [*rng.permutation(300).tolist(), *[-1] * 300]]
            slots = rng.permutation(600).tolist()
            assert move(manager, kind, slots, pages).all()
            model.move(kind, slots, pages)
            model.check()


# ---- ranks that die ---------------------------------------------------------------------------------------------


def test_saves_go_on_without_a_rank_that_only_reads(tmp_path: Path) -> None:
    with copies(tmp_path) as (manager, [_, reader]):
        assert save(manager, 1) is Status.SUCCESS
        reader.signal(signal.SIGKILL)
        until(lambda: not manager.is_ready())
        assert save(manager, 2) is Status.SUCCESS
        assert load(manager, 1) is Status.FAILED
        again = RankProcess(str(tmp_path / "s"), 1, copies=MLA)
        try:
            wait_ready(manager)
            for seed in (1, 2):
                again("tensors", "zero")
                assert load(manager, seed) is Status.SUCCESS
                expected = Tensors()
                expected.fill([0, 1, 2], 7)
                assert again("tensors", "read", [3, 4, 5]) == expected.read([0, 1, 2])
        finally:
            again.kill()


@pytest.mark.parametrize("writer", [0, 1])
def test_saves_fail_without_a_rank_that_writes_a_part(tmp_path: Path, writer: int) -> None:
    with copies(tmp_path, WIDE) as (manager, ranks):
        assert save(manager, 1) is Status.SUCCESS
        ranks[writer].signal(signal.SIGKILL)
        until(lambda: not manager.is_ready())
        assert save(manager, 2) is Status.FAILED
        assert load(manager, 1) is Status.FAILED
        until(lambda: manager.stats()["free_slots"] == 45)


def test_a_stopped_reader_holds_up_loads_and_no_save(tmp_path: Path) -> None:
    with copies(tmp_path, op_timeout_s=1.0) as (manager, [_, reader]):
        assert save(manager, 1) is Status.SUCCESS
        reader.signal(signal.SIGSTOP)
        assert save(manager, 2) is Status.SUCCESS
        assert load(manager, 2) is Status.TIMEOUT
        reader.signal(signal.SIGCONT)
        assert load(manager, 2) is Status.SUCCESS


def test_ops_under_way_fail_only_where_they_concern_the_dead_rank(tmp_path: Path) -> None:
    with copies(tmp_path) as (manager, [writer, reader]):
        writer("client", "advance_fence", 0, 0)
        ops = {kind: begin(manager, kind, [slot], [[slot]], fence=5)
               for slot, kind in enumerate((OpKind.D2H, OpKind.H2D))}
        reader.signal(signal.SIGKILL)
        transfer = controller_of(manager)._cache.transfer
        graph, done = ops[OpKind.H2D]
        until(lambda: graph.status is OpStatus.FAILED)
        assert ops[OpKind.D2H][0].status is OpStatus.RUNNING
        writer("client", "advance_fence", 5, 5)
        until(lambda: transfer.wait(lambda: bool(done and ops[OpKind.D2H][1]), 0.1))
        assert ops[OpKind.D2H][0].status is OpStatus.DONE


# ---- at the door ------------------------------------------------------------------------------------------------


def test_ranks_that_do_not_agree_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    manager = make_manager(tmp_path / "s", 8, 2)
    clients = []

    def register(arrays: list[np.ndarray], reason: str, **options: list) -> RankClient:
        clients.append(RankClient(str(tmp_path / "s"), intra_client_id=int(not reason.startswith("first"))))
        clients[-1].register_tensors(arrays, 10.0, **options)
        return clients[-1]

    pages = np.zeros((8, 100), dtype=np.uint8)
    try:
        register([pages, pages], "first", copies=["a", None])
        until(lambda: "0 of 2" in controller_of(manager)._cache.listener.describe_ranks(0))
        registry = controller_of(manager)._cache.listener._registries[0]
        until(lambda: len(registry._waiting) == 1)
        wrong = [
            ([pages[:, :64].copy(), pages], "must register equal tensors", {"copies": ["a", None]}),
            ([pages.reshape(8, 10, 10), pages], "must register equal tensors", {"copies": ["a", None]}),
            ([pages, pages], "2 layer groups", {"groups": [0, 1], "copies": ["a", None]}),
        ]
        for arrays, reason, options in wrong:
            client = register(arrays, reason, **options)          # type: ignore[arg-type]
            with pytest.raises(RegistrationError, match=reason):
                client.wait_connected(5.0)
            assert len(registry._waiting) == 1
        second = register([pages, pages], "second", copies=["a", None])
        wait_ready(manager, 8)
        second.close()
        until(lambda: not manager.is_ready())
        for options, reason in (({"copies": [None, "a"]}, "different shapes"),
                                ({"copies": ["b", None]}, "different shapes"), ({}, "does not fit the pool")):
            client = register([pages, pages], reason, **options)  # type: ignore[arg-type]
            with pytest.raises(RegistrationError, match=reason):
                client.wait_connected(5.0)
        register([pages, pages], "second", copies=["a", None])
        wait_ready(manager, 8)
    finally:
        manager.shutdown()
        for client in clients:
            client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "flexkv-register"]


def test_direct_storage_is_off_for_slots_that_it_cannot_move(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its moves name one page a block, and a slot that is one segment."""
    cache = {"enable_gds": True, "ssd_cache_gb": 1.0, "ssd_cache_dir": str(tmp_path / "ssd")}
    manager = make_manager(tmp_path / "s", 8, cache=cache)
    tensors = [np.zeros((8, 100), dtype=np.uint8) for _ in range(2)]
    client = RankClient(str(tmp_path / "s"))
    try:
        client.register_tensors(tensors, 10.0, copies=["a", None])
        wait_ready(manager, 8)
        tensors[0][:2], tensors[1][:2] = 3, 4
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        task = manager.get_async(tokens_of(2), mapping([5, 6]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert (tensors[0][5:7] == 3).all()
        assert (tensors[1][5:7] == 4).all()
        assert "GPUDirect Storage is off" in caplog.text
    finally:
        manager.shutdown()
        client.close()


def test_a_rank_with_several_groups_refuses_direct_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that a controller names in its moves need not exist in the other group."""
    caplog.set_level(logging.INFO, "flexkv")
    monkeypatch.setattr(Registry, "_has_plain_slots", lambda *_: True)
    cache = {"enable_gds": True, "ssd_cache_gb": 1.0, "ssd_cache_dir": str(tmp_path / "ssd")}
    manager, client = make_manager(tmp_path / "s", 8, cache=cache), RankClient(str(tmp_path / "s"))
    try:
        client.register_tensors([np.zeros((num_pages, 100)) for num_pages in (8, 4)], 10.0, groups=[0, 1])
        with pytest.raises(RegistrationError, match="GPUDirect Storage"):
            client.wait_connected(10.0)
        until(lambda: "rank 0 (process" in caplog.text and "has left" in caplog.text)
    finally:
        manager.shutdown()
        client.close()
