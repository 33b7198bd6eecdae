"""Loads that read GPU memory of other processes, with the fake driver: bytes, ranks that are killed, failing GPUs, GPUs
that cannot be read."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flexkv._core.device.agent import STRATEGIES
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import OpStatus
from tests.support.gpu_ranks import GpuRank, gpu_ranks
from tests.support.harness import controller_of, until, wait_ready
from tests.support.segment_ranks import Kind, begin, exchange_of, move

NVLINK = {"count": 4, "access": True, "nvlink": True}
KINDS = [Kind(20_000, copy="latent"), Kind(3_000), Kind(20_000, copy="latent"), Kind(1_312, copy="indexer")]
PAGES, SLOTS = [4, 0, 6, 1], [3, 1, 0, 2]


def saved(manager: Any, ranks: list[GpuRank]) -> None:
    """Save the blocks of a sequence, and spoil all pages."""
    for rank in ranks:
        rank("fill", PAGES, 1)
    assert move(manager, OpKind.D2H, SLOTS, [PAGES]).all()
    for rank in ranks:
        rank("spoil")
        rank("results")


@pytest.mark.parametrize(("num_ranks", "strategy"), [(2, name) for name in STRATEGIES] + [(4, "auto")])
def test_bytes_of_the_gpus_of_other_processes(tmp_path: Path, num_ranks: int, strategy: str) -> None:
    with gpu_ranks(
        tmp_path / "s", [KINDS] * num_ranks, 8, 8, NVLINK, gpu_strategy=strategy, gpu_window_mb=1
    ) as (manager, ranks):
        assert exchange_of(manager)
        saved(manager, ranks)
        assert move(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]], exchange=exchange_of(manager)).all()
        for rank in ranks:
            rank.check([7, 6, 5, 4], 1)
            [(_, pages, failed)] = rank("results")
            assert (sorted(pages), failed) == ([4, 5, 6, 7], [])
        assert all((rank("read", [0])[0] == 170).all() for rank in ranks)


def test_a_rank_killed_between_the_steps_ends_the_load(tmp_path: Path) -> None:
    with gpu_ranks(tmp_path / "s", [KINDS] * 3, 8, 8, NVLINK) as (manager, ranks):
        saved(manager, ranks)
        ranks[0]("advance", 6)
        for rank in ranks[1:]:
            rank("advance", 5)
        graph, done = begin(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]], second={"fence": 6}, fence=5,
                            exchange=exchange_of(manager))
        until(lambda: graph.ops[0].done and bool(ranks[0]("results")))
        assert all(rank("maps_peers") for rank in ranks)
        ranks[0].kill()                                      # it has all its bytes; the others do not
        until(lambda: graph.status is OpStatus.FAILED)
        for rank in ranks[1:]:
            rank("advance", 6)
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert not exchange_of(manager)
        until(lambda: all(link.hello.rank for link in controller_of(manager)._cache.transfer._device.links))
        until(lambda: not any(rank("maps_peers") for rank in ranks[1:]))
        again = GpuRank(tmp_path / "s", 0, KINDS, 8, NVLINK)
        try:
            wait_ready(manager, 8)
            assert not exchange_of(manager)                  # the others know the memory of the old process
            again("advance", 6)
            assert move(manager, OpKind.H2D, SLOTS, [[3, 2, 1, 0]]).all()
            for rank in (again, *ranks[1:]):
                rank.check([3, 2, 1, 0], 1)
        finally:
            again.kill()


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("call", ["cuLaunchKernel", "cuMemcpyBatchAsync", "cuEventRecord", "cuEventQuery"])
def test_a_gpu_that_fails_in_a_step_ends_the_load_for_all_ranks(tmp_path: Path, step: int, call: str) -> None:
    """No page of a load that has failed is reported as loaded; the ranks agree."""
    strategy = "batch" if call == "cuMemcpyBatchAsync" else "auto"
    with gpu_ranks(tmp_path / "s", [KINDS] * 2, 8, 8, NVLINK, gpu_strategy=strategy) as (manager, ranks):
        saved(manager, ranks)
        ranks[0]("advance", 6)
        ranks[1]("advance", 5 if step else 4)
        graph, done = begin(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]], second={"fence": 6}, fence=5,
                            exchange=exchange_of(manager))
        if step:
            until(lambda: graph.ops[0].done)
        ranks[1]("fake", "fail", call)
        ranks[1]("advance", 6)
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.FAILED
        assert not graph.ops[1].ok.any()
        [(_, _, failed)] = ranks[1]("results")
        assert sorted(failed) == [4, 5, 6, 7]


@pytest.mark.parametrize(("plan", "reason"), [
    ({"count": 2, "access": False, "nvlink": False}, "cannot access"),
    ({"count": 2, "access": True, "nvlink": False}, "has no NVLink"),
])
def test_gpus_that_cannot_be_read_over_nvlink(tmp_path: Path, plan: dict[str, Any], reason: str) -> None:
    with gpu_ranks(tmp_path / "s", [KINDS] * 2, 8, 8, plan) as (manager, ranks):
        assert not exchange_of(manager)
        saved(manager, ranks)
        assert move(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]]).all()
        for rank in ranks:
            rank.check([7, 6, 5, 4], 1)


def test_processes_without_a_gpu_read_all_from_host_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.support.harness import RankProcess, make_manager

    caplog.set_level(logging.INFO, "flexkv")
    manager = make_manager(tmp_path / "s", 8, 2)
    ranks = [RankProcess(str(tmp_path / "s"), rank, copies=["latent"] * 3) for rank in range(2)]
    try:
        wait_ready(manager, 8)
        assert not exchange_of(manager)
        for rank in ranks:
            rank("tensors", "fill", [0, 1], 7)
        assert move(manager, OpKind.D2H, [3, 4], [[0, 1]]).all()
        assert move(manager, OpKind.H2D, [3, 4], [[5, 6]]).all()
        assert len({rank("tensors", "read", pages) for rank in ranks for pages in ([0, 1], [5, 6])}) == 1
    finally:
        manager.shutdown()
        for rank in ranks:
            rank.kill()


def test_a_rank_that_stops_in_the_second_step_holds_the_pages_until_it_is_at_rest(tmp_path: Path) -> None:
    """The load times out; its slots and pages are in use until the rank goes on and has ended its copies."""
    with gpu_ranks(tmp_path / "s", [KINDS] * 2, 8, 8, NVLINK, op_timeout_s=1.0) as (manager, ranks):
        saved(manager, ranks)
        ranks[1]("fake", "delay", 200_000)
        graph, done = begin(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]], exchange=exchange_of(manager))
        until(lambda: graph.ops[0].done)
        assert ranks[1].process.pid is not None
        os.kill(ranks[1].process.pid, signal.SIGSTOP)
        try:
            until(lambda: graph.status is OpStatus.TIMEOUT)
            assert not graph.quiesced
        finally:
            os.kill(ranks[1].process.pid, signal.SIGCONT)
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.TIMEOUT
        assert graph.quiesced
        ranks[1]("fake", "delay", 0)
        for rank in ranks:
            rank("spoil")
        assert move(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]], exchange=exchange_of(manager)).all()
        for rank in ranks:
            rank.check([7, 6, 5, 4], 1)


def test_a_rank_killed_while_it_is_read_ends_the_load_and_breaks_no_other(tmp_path: Path) -> None:
    with gpu_ranks(tmp_path / "s", [KINDS] * 3, 8, 8, NVLINK) as (manager, ranks):
        saved(manager, ranks)
        ranks[1]("fake", "delay", 200_000)
        graph, done = begin(manager, OpKind.H2D, SLOTS, [[7, 6, 5, 4]], exchange=exchange_of(manager))
        until(lambda: graph.ops[0].done and bool(ranks[0]("results")))
        ranks[0].kill()                                      # it has answered both steps, and rank 1 reads its pages
        assert controller_of(manager)._cache.transfer.wait(lambda: bool(done), 5.0)
        assert graph.status is OpStatus.FAILED
        assert graph.ops[1].is_lost
        until(lambda: not any(rank("maps_peers") for rank in ranks[1:]))
        assert [rank("error") for rank in ranks[1:]] == [None, None]
