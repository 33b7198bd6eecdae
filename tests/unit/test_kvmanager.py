"""KVManager: the contract of its methods, with bytes compared."""

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from flexkv.cache.reasons import MissReason
from flexkv.config import CacheConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.controller.tasks.task import KVTask
from flexkv.errors import SlotMappingError
from flexkv.metrics.request_trace import read_recorded
from flexkv.transfer.graph import TransferGraph
from tests.support.harness import PAGES, TOKENS, controller_of, local, mapping, remote, result_of, space_of, tokens_of


def test_round_trip_in_one_process(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, tensors):
        pages, tokens = [5, 3, 9, 10, 11], tokens_of(5)
        tensors.fill(pages, 1)
        before = tensors.read(pages)
        task, mask = manager.put_match(tokens)
        assert mask.all()
        assert manager.launch(task, mapping(pages)) == [task]
        response = manager.wait([task])[task]
        assert response.status is Status.SUCCESS
        assert response.return_mask is not None
        assert response.return_mask.all()
        tensors.zero()
        task, mask = manager.get_match(tokens)
        assert mask.all()
        elsewhere = [60, 1, 2, 63, 0]
        manager.launch([task], [mapping(elsewhere)])
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read(elsewhere) == before
        assert manager.wait([task])[task].status is Status.NOTFOUND        # a result is given once


def test_round_trip_with_two_ranks_in_other_processes(tmp_path: Path) -> None:
    with remote(tmp_path, ranks=2) as (manager, first, second):
        pages = list(range(7, 27))
        first("tensors", "fill", pages, 1)
        second("tensors", "fill", pages, 2)
        before = [rank("tensors", "read", pages) for rank in (first, second)]
        assert before[0] != before[1]
        task = manager.put_async(tokens_of(20), mapping(pages))
        assert manager.wait([task])[task].status is Status.SUCCESS
        for rank in (first, second):
            rank("tensors", "zero")
        task = manager.get_async(tokens_of(20), mapping(pages[::-1]))
        assert manager.wait([task])[task].status is Status.SUCCESS
        assert [rank("tensors", "read", pages[::-1]) for rank in (first, second)] == before


def test_a_task_that_a_reset_took_before_it_ran_moves_nothing(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tensors.fill(range(3), 1)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(3))
        put = manager.blocks.put_blocks(hasher.keys, 0, np.arange(3, dtype=np.int32))
        assert put is not None
        manager.wait(put, completely=True)
        get = controller_of(manager).tasks.new_get(space_of(manager).index, hasher.keys, 0, 3, 0)
        late = controller_of(manager).tasks.new_put(space_of(manager).index, hasher.keys[:0], 0, 0, 0)
        manager.reset()                                                     # on another thread
        pages = np.arange(10, 13, dtype=np.int32)
        controller_of(manager).tasks.run(get, pages, 0)
        assert manager.wait(get.task_id, completely=True)[get.task_id].status is Status.FAILED
        assert sorted(result_of(client, get.task_id).failed_pages.tolist()) == [10, 11, 12]
        assert not any(tensors.read(pages))
        controller_of(manager).tasks.run(late, pages[:0], 0)
        assert manager.wait(late.task_id)[late.task_id].status is Status.SUCCESS


def test_who_has_a_result_finds_what_was_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        on_done, taken = controller_of(manager).tasks._on_done, threading.Event()

        def late(task: KVTask, graph: TransferGraph) -> None:               # the data plane's thread is held up
            taken.set()
            time.sleep(0.1)
            on_done(task, graph)

        monkeypatch.setattr(controller_of(manager).tasks, "_on_done", late)
        task = manager.put_async(tokens_of(3), mapping([0, 1, 2]))
        assert taken.wait(5.0)
        assert manager.wait(task)[task].status is Status.SUCCESS
        task, mask = manager.get_match(tokens_of(3))
        assert mask.all()
        manager.cancel(task)


def test_only_what_is_missing_moves(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        tokens = tokens_of(6)
        task = manager.put_async(tokens[: 3 * TOKENS], mapping([0, 1, 2]))
        manager.wait(task)
        task, mask = manager.put_match(tokens[:-1])                         # the last block is not full
        assert mask.tolist() == [False] * 3 * TOKENS + [True] * 2 * TOKENS + [False] * (TOKENS - 1)
        manager.launch(task, mapping([3, 4]))
        manager.wait(task)
        computed = np.ones(len(tokens), dtype=np.bool_)
        computed[: TOKENS + 1] = False                                      # not at the end of a block
        task, mask = manager.get_match(tokens, computed)
        assert mask.tolist() == [False] * 2 * TOKENS + [True] * 3 * TOKENS + [False] * TOKENS
        assert manager.try_wait(task) == {}
        assert manager.wait(task, timeout=0)[task].status is Status.UNREADY
        manager.cancel(task)
        assert manager.wait(task)[task].status is Status.NOTFOUND


def test_nothing_to_do_succeeds(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        task, mask = manager.get_match(tokens_of(3))
        assert not mask.any()
        manager.launch(task, mapping([]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        task = manager.prefetch_async(tokens_of(3))
        assert manager.try_wait(task)[task].status is Status.SUCCESS
        assert manager.blocks.put_blocks(manager.blocks.hasher().keys, 0, np.zeros(0, dtype=np.int32)) is None


def test_bad_arguments_change_nothing(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        first, _ = manager.put_match(tokens_of(2, 1))
        second, _ = manager.put_match(tokens_of(2, 2))
        for wrong in (mapping([0, 1]) + 1, mapping([0]), mapping([0, 1, 2]), mapping([0, 1])[::-1]):
            with pytest.raises(SlotMappingError):
                manager.launch([first, second], [mapping([0, 1]), wrong])
        with pytest.raises(SlotMappingError):
            manager.launch([first, second], [mapping([0, 1])])
        with pytest.raises(KeyError):
            manager.launch([first, 999], [mapping([0, 1])] * 2)
        with pytest.raises(SlotMappingError):
            manager.put_async(tokens_of(2, 3), mapping([0]))
        with pytest.raises(ValueError, match="token_mask"):
            manager.get_match(tokens_of(2), np.ones(3, dtype=np.bool_))
        holes = np.array([True, False] * TOKENS)
        with pytest.raises(ValueError, match="False after True"):
            manager.get_match(tokens_of(2), holes)
        with pytest.raises(NotImplementedError):
            manager.get_match(tokens_of(2), swa_aware=True)
        with pytest.raises(NotImplementedError):
            manager.launch([first], [mapping([0, 1])], swa_slot_mappings=[])  # type: ignore[arg-type]
        assert manager.wait([first, second], timeout=0)[first].status is Status.UNREADY
        manager.launch([first, second], [mapping([0, 1]), mapping([2, 3])], as_batch=True)
        with pytest.raises(KeyError, match="launched already"):
            manager.launch([first], [mapping([0, 1])])
        assert {r.status for r in manager.wait([first, second]).values()} == {Status.SUCCESS}


def test_a_page_that_does_not_exist_fails_alone(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tokens = tokens_of(3)
        tensors.fill([0, 1], 1)
        before = tensors.read([0])
        task = manager.put_async(tokens, mapping([0, PAGES, 1]))
        response = manager.wait(task)[task]
        assert response.status is Status.FAILED
        assert response.return_mask is not None
        assert response.return_mask.tolist() == [True] * TOKENS + [False] * TOKENS + [True] * TOKENS
        hasher = manager.blocks.hasher()
        hasher.extend(tokens)
        found = manager.blocks.lookup(hasher.keys)
        assert (found.num_ready, found.reason) == (1, MissReason.FAILED)
        tensors.zero()
        task = manager.blocks.get_blocks(hasher.keys, 0, np.array([8, 9, 10], dtype=np.int32))
        assert manager.wait(task)[task].status is Status.FAILED
        assert result_of(client, task).failed_pages.tolist() == [9, 10]
        assert tensors.read([8]) == before


def test_namespaces_and_extras_separate(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        tokens = tokens_of(2)
        manager.wait(manager.put_async(tokens, mapping([0, 1]), namespace=["tenant"]))
        others = [
            manager.get_match(tokens), manager.get_match(tokens, namespace=["other"]),
            manager.get_match(tokens, namespace=["tenant"], block_extras={0: b"image"}),
        ]
        assert not any(mask.any() for _, mask in others)
        task, mask = manager.get_match(tokens, namespace=["tenant"])
        assert mask.all()
        manager.cancel([task, *(other for other, _ in others)])


def test_fences_hold_transfers_back(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tokens, pages = tokens_of(2), np.array([4, 5], dtype=np.int32)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens)
        task = manager.blocks.put_blocks(hasher.keys, 0, pages, fence=7)
        assert task is not None
        client.advance_fence(load=100, save=6)
        assert manager.wait(task, timeout=0.1)[task].status is Status.TIMEOUT
        assert manager.blocks.lookup(hasher.keys).reason is MissReason.NOT_READY
        tensors.fill(pages, 3)                                             # what the "compute" of step 7 writes
        before = tensors.read(pages)
        client.advance_fence(save=7)
        assert manager.wait(task)[task].status is Status.SUCCESS
        tensors.zero()
        task = manager.blocks.get_blocks(hasher.keys, 0, pages, fence=101)
        assert manager.wait(task, timeout=0.1)[task].status is Status.TIMEOUT
        assert tensors.read(pages) == bytes(len(before))
        client.advance_fence(load=101)
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read(pages) == before


def test_a_full_pool_evicts_and_a_pinned_one_misses(tmp_path: Path) -> None:
    with local(tmp_path, num_slots=8) as (manager, _, tensors):
        for seed in range(6):
            tensors.fill(range(4), seed)
            task = manager.put_async(tokens_of(4, seed), mapping(range(4)))
            assert manager.wait(task)[task].status is Status.SUCCESS
            before = tensors.read(range(4))
            tensors.zero()
            task = manager.get_async(tokens_of(4, seed), mapping(range(10, 14)))
            assert manager.wait(task)[task].status is Status.SUCCESS
            assert tensors.read(range(10, 14)) == before
        assert manager.stats()["evicted_blocks"] >= 16
        pinned = [manager.get_match(tokens_of(4, seed)) for seed in (4, 5)]
        assert sum(mask.sum() for _, mask in pinned) == 7 * TOKENS         # one was evicted ahead of need
        task, mask = manager.put_match(tokens_of(4, 9))
        assert mask.sum() == TOKENS                                         # what has room, and no error
        manager.cancel([task, *(task for task, _ in pinned)])


def test_a_get_that_finds_nothing_ends_with_an_empty_mask(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _client, _tensors):
        task = manager.get_async(tokens_of(4, 1), mapping(range(4)))
        response = manager.wait(task)[task]
        assert response.status is Status.SUCCESS
        assert response.return_mask is not None
        assert response.return_mask.tolist() == [False] * 4 * TOKENS


def test_reset_forgets_what_is_in_flight(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, client, _tensors):
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(2))
        done = manager.blocks.put_blocks(hasher.keys, 0, np.array([0, 1], dtype=np.int32))
        assert done is not None
        manager.wait(done)
        pinned, _ = manager.get_match(tokens_of(2))
        other = manager.blocks.hasher()
        other.extend(tokens_of(2, 5))
        held = manager.blocks.put_blocks(other.keys, 0, np.array([2, 3], dtype=np.int32), fence=1)
        assert held is not None
        manager.reset()
        assert manager.wait(held)[held].status is Status.CANCELLED
        assert manager.wait(pinned)[pinned].status is Status.NOTFOUND
        client.advance_fence(save=1)
        for keys in (hasher.keys, other.keys):
            assert manager.blocks.lookup(keys).num_ready == 0


def test_two_clients_put_the_same_prefix_at_once(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, tensors):
        tensors.fill(range(8), 1)
        expected = tensors.read(range(8))
        tensors.fill(range(8, 16), 1)
        barrier = threading.Barrier(2)
        statuses: list[Status] = []

        def put(first_page: int) -> None:
            barrier.wait()
            task = manager.put_async(tokens_of(8), mapping(range(first_page, first_page + 8)))
            statuses.append(manager.wait(task)[task].status)

        threads = [threading.Thread(target=put, args=(page,)) for page in (0, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert statuses == [Status.SUCCESS] * 2
        assert manager.stats()["indexed_blocks"] == 8
        task = manager.get_async(tokens_of(8), mapping(range(20, 28)))
        manager.wait(task)
        assert tensors.read(range(20, 28)) == expected


def test_upstream_registration_of_token_slots(tmp_path: Path) -> None:
    """K list and V list, token-major, as SGLang has them; slot mappings name token slots."""
    import torch

    from flexkv import KVTPClient
    from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
    from flexkv.errors import RegistrationError
    from tests.support.harness import make_manager, wait_ready

    manager = make_manager(tmp_path / "s")
    tensors = [torch.randint(0, 1000, (10 * TOKENS, 2, 8), dtype=torch.int16) for _ in range(4)]
    layout = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, 2, 10, TOKENS, 2, 8, is_mla=False)
    client = KVTPClient(f"ipc://{tmp_path}/s", device_id=0)
    with pytest.raises(RegistrationError, match="neither 10 pages"):
        client.register_to_server([torch.zeros(7, 2, 8)], layout)
    with pytest.raises(RegistrationError, match="swa_caches"):
        client.register_to_server(tensors, layout, swa_caches=tensors)  # type: ignore[arg-type]
    try:
        client.register_to_server(tensors, layout)
        wait_ready(manager)
        before = [tensor[: 2 * TOKENS].clone() for tensor in tensors]
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        task = manager.get_async(tokens_of(2), torch.from_numpy(mapping([8, 9])))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert all(bool((new[8 * TOKENS :] == old).all()) for new, old in zip(tensors, before, strict=True))
    finally:
        client.close()
        manager.shutdown()


def test_groups_of_tensors_and_sleep(tmp_path: Path) -> None:
    """Tensors of two shapes and an indexer make one block; they go away, and come back somewhere else."""
    import torch

    from flexkv import KVTPClient
    from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
    from flexkv.errors import RegistrationError
    from tests.support.harness import make_manager, until, wait_ready

    def make(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(10, TOKENS, 2, 8), (10 * TOKENS, 1, 24), (10, 132)]
        return [torch.randint(0, 250, shape, dtype=torch.uint8, generator=generator) for shape in shapes]

    def register(tensors: list[torch.Tensor], **options: bool) -> None:
        layouts = [KVCacheLayout(KVCacheLayoutType.LAYERFIRST, 1, 10, TOKENS, 2, size) for size in (8, 24)]
        client.register_to_server(tensors[:2], layouts[0], layer_groups=[[0], [1]], gpu_layouts=layouts,
                                  indexer_buffers=tensors[2:], indexer_layout=layouts[0], **options)

    def pages(tensors: list[torch.Tensor], first: int) -> list[torch.Tensor]:
        return [tensor.reshape(10, -1)[first : first + 3].clone() for tensor in tensors]

    manager, client = make_manager(tmp_path / "s"), KVTPClient(f"ipc://{tmp_path}/s")
    try:
        assert client.suspend_gpu_mappings() == 0
        with pytest.raises(RegistrationError, match="suspend_gpu_mappings"):
            register(make(1), resume=True)
        tensors = make(1)
        register(tensors)
        wait_ready(manager)
        before = pages(tensors, 2)
        task = manager.put_async(tokens_of(3), mapping([2, 3, 4]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert client.suspend_gpu_mappings() == 3
        until(lambda: not manager.is_ready())
        task = manager.get_async(tokens_of(3), mapping([6, 7, 8]))
        assert manager.wait(task)[task].status is not Status.SUCCESS
        with pytest.raises(RegistrationError, match="different shapes"):
            register([tensor.reshape(*tensor.shape[:-1], 2, -1) for tensor in make(2)], resume=True)
        client.suspend_gpu_mappings()
        tensors = make(2)
        register(tensors, resume=True)
        until(manager.is_ready)
        task = manager.get_async(tokens_of(3), mapping([6, 7, 8]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert all(torch.equal(a, b) for a, b in zip(pages(tensors, 6), before, strict=True))
    finally:
        client.close()
        manager.shutdown()


def test_before_the_ranks_are_there_nothing_is_found(tmp_path: Path) -> None:
    from tests.support.harness import make_manager

    manager = make_manager(tmp_path / "s")
    try:
        assert not manager.is_ready()
        task, mask = manager.put_match(tokens_of(2))
        assert not mask.any()
        assert not manager.get_match(tokens_of(2))[1].any()
        manager.launch(task, mapping([]))
        assert manager.wait(task)[task].status is Status.UNREADY
    finally:
        manager.shutdown()
        manager.shutdown()


def test_each_match_is_recorded_by_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.support.harness.CacheConfig", partial(CacheConfig, trace_path=str(tmp_path / "trace"))
    )
    asked = [tokens_of(5), tokens_of(3, seed=1), tokens_of(5)]
    with local(tmp_path) as (manager, _, _):
        for tokens in asked:
            manager.cancel(manager.get_match(tokens)[0])
        hashers = [manager.blocks.hasher() for _ in asked]
    found = read_recorded((tmp_path / "trace").read_bytes())
    assert found is not None
    for hasher, tokens, keys in zip(hashers, asked, found.sequences, strict=True):
        hasher.extend(tokens)
        assert (hasher.keys[:, 0] == keys).all()
