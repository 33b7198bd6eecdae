"""On real GPUs: each rank reads a part of equal KV from host memory, and the other parts from its peers' GPUs."""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv._core.device.agent import STRATEGIES
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import OpStatus
from tests.support.gpu_ranks import GpuRank, gpu_ranks
from tests.support.harness import controller_of, until
from tests.support.segment_ranks import Kind, begin, exchange_of, move

pytestmark = pytest.mark.gpu

KINDS = [Kind(73_728, copy="latent"), Kind(4096), Kind(73_728, copy="latent"), Kind(1_312, copy="indexer"),
         Kind(141 * 16, copy="latent")]
"""Copies of DeepSeek's page size, a small one, and a shard of each rank."""


def devices(request_: str) -> list[int]:
    """A GPU for each rank. Two processes may also read each other's memory on one GPU."""
    if request_ == "one GPU":
        return [0, 0]
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return [0, 1]


def save(manager: KVManager, ranks: list[GpuRank], slots: list[int], pages: list[int], seed: int) -> None:
    for rank in ranks:
        rank("fill", pages, seed)
    assert move(manager, OpKind.D2H, slots, [pages]).all()
    for rank in ranks:
        rank("spoil")
        rank("results")


@pytest.mark.parametrize("where", ["one GPU", "two GPUs"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_has_the_bytes_that_computing_would_have_written(tmp_path: Path, strategy: str, where: str) -> None:
    with gpu_ranks(
        tmp_path / "s", [KINDS] * 2, 64, 40, devices=devices(where), gpu_strategy=strategy, gpu_window_mb=1
    ) as (manager, ranks):
        assert exchange_of(manager)
        order = np.random.default_rng(1).permutation
        for seed in range(3):
            slots, pages = order(40)[:24].tolist(), order(64)[:24].tolist()
            save(manager, ranks, slots, pages, seed)
            pages = order(64)[:24].tolist()
            assert move(manager, OpKind.H2D, slots, [pages], exchange=exchange_of(manager)).all()
            for rank in ranks:
                rank.check(pages, seed)
                [(_, moved, failed)] = rank("results")
                assert (sorted(moved), failed) == (sorted(pages), [])


def test_many_loads_at_once(tmp_path: Path) -> None:
    """Some in an exchange, some not; pages are used again as soon as a load has ended."""
    rng, wait = random.Random(1), 30.0
    with gpu_ranks(tmp_path / "s", [KINDS] * 2, 256, 64, devices=devices("two GPUs")) as (manager, ranks):
        transfer = controller_of(manager)._cache.transfer
        for start in range(0, 64, 16):
            save(manager, ranks, list(range(start, start + 16)), list(range(16)), start)
        for _ in range(20):
            pages = rng.sample(range(256), 192)
            loads = []
            for number in range(12):
                start = rng.randrange(4) * 16
                count = rng.randint(1, 16)
                mine = pages[16 * number : 16 * number + count]
                exchange = exchange_of(manager) if number % 3 else 0
                _, done = begin(manager, OpKind.H2D, list(range(start, start + count)), [mine], exchange=exchange)
                loads.append((start, mine, done))
            for start, mine, done in loads:
                assert transfer.wait(lambda done=done: bool(done), wait)
                assert done[0].status is OpStatus.DONE
                for rank in ranks:
                    rank.check(mine, start)


@pytest.mark.parametrize("delay_ms", [2, 8, 15, 25])
def test_a_rank_killed_while_its_memory_is_read_breaks_no_other_gpu(tmp_path: Path, delay_ms: int) -> None:
    kinds, where = [Kind(1 << 20, copy="latent")] * 4, devices("two GPUs")
    with gpu_ranks(tmp_path / "s", [kinds] * 2, 512, 16, devices=where) as (manager, ranks):
        save(manager, ranks, list(range(16)), list(range(16)), 1)
        graph, done = begin(manager, OpKind.H2D, list(range(16)) * 30, [list(range(20, 500))],
                            exchange=exchange_of(manager))          # 2 GiB
        time.sleep(delay_ms / 1e3)
        ranks[0].process.kill()
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 30.0)
        if graph.status is OpStatus.DONE:
            ranks[1].check(list(range(20, 36)), 1)
        until(lambda: not ranks[1]("maps_peers"), 20.0)
        assert ranks[1]("error") is None
        ranks[1]("spoil")
        assert (ranks[1]("read", [0])[0] == 170).all()


def test_a_killed_rank_ends_the_load_and_its_memory_is_free(tmp_path: Path) -> None:
    kinds, where = [Kind(1 << 20, copy="latent")] * 4, devices("two GPUs")
    torch.cuda.mem_get_info(0)
    free = torch.cuda.mem_get_info(0)[0]
    with gpu_ranks(tmp_path / "s", [kinds] * 2, 512, 16, devices=where) as (manager, ranks):
        save(manager, ranks, list(range(16)), list(range(16)), 1)
        assert torch.cuda.mem_get_info(0)[0] < free - (2 << 30)
        ranks[0]("advance", 6)
        ranks[1]("advance", 5)
        graph, done = begin(manager, OpKind.H2D, list(range(16)), [list(range(20, 36))], second={"fence": 6}, fence=5,
                            exchange=exchange_of(manager))
        until(lambda: graph.ops[0].done)
        ranks[0].kill()
        until(lambda: graph.status is OpStatus.FAILED, 20.0)
        ranks[1]("advance", 6)
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 20.0)
        assert not exchange_of(manager)
        until(lambda: not ranks[1]("maps_peers"), 20.0)
        until(lambda: torch.cuda.mem_get_info(0)[0] > free - (1 << 30), 20.0)      # the tensors had 2 GiB
        assert ranks[1]("read", [0])[0].shape == (1, 1 << 20)            # its own context works


@pytest.mark.parametrize("reason", ["the setting", "cuMemCreate"])
def test_ranks_that_read_all_from_host_memory(tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"exchange_copies": False} if reason == "the setting" else {}
    if reason == "cuMemCreate":
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with gpu_ranks(tmp_path / "s", [KINDS] * 2, 16, 8, devices=devices("two GPUs"), **options) as (manager, ranks):
        assert not exchange_of(manager)
        save(manager, ranks, [3, 1], [0, 5], 1)
        assert move(manager, OpKind.H2D, [3, 1], [[7, 2]]).all()
        for rank in ranks:
            rank.check([7, 2], 1)


def test_time_of_a_large_load(tmp_path: Path) -> None:
    """2 GiB on all GPUs, read whole by each rank and in an exchange; prints the times (``pytest -s``)."""
    count = max(2, torch.cuda.device_count())
    kinds, blocks = [Kind(73_728, copy="latent")] * 61, 480
    where = [*devices("two GPUs"), *range(2, count)]
    with gpu_ranks(
        tmp_path / "s", [kinds] * count, blocks + 32, blocks, devices=where, op_timeout_s=60.0
    ) as (manager, ranks):
        few = list(range(0, blocks, 20))
        save(manager, ranks, few, few, 1)
        slots = np.arange(blocks)
        pages = np.random.default_rng(1).permutation(blocks)
        transfer = controller_of(manager)._cache.transfer
        for name, exchange in (("whole", 0), ("exchange", exchange_of(manager))):
            times = []
            for _ in range(6):
                start = time.perf_counter()
                graph, done = begin(manager, OpKind.H2D, slots.tolist(), [pages.tolist()], exchange=exchange)
                assert transfer.wait(lambda done=done: bool(done), 60.0)
                times.append(time.perf_counter() - start)
                assert graph.status is OpStatus.DONE
            for rank in ranks:
                rank.check(pages[few].tolist(), 1)
                rank("spoil")
            gib = blocks * 61 * 73_728 / (1 << 30)
            print(f"\n{count} ranks, {gib:.2f} GiB, {name}: {', '.join(f'{1e3 * each:.1f}' for each in times)} ms")
