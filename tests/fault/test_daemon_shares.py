"""Pools of a daemon that divide host memory by use: shares follow the load, and no byte is wrong meanwhile."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.server import host_budget
from flexkv.server.daemon import Daemon
from tests.fault.test_daemon import expected
from tests.support.daemon import SLOT_BYTES, engine, make_engine, running
from tests.support.harness import RankProcess, Tensors, mapping, tokens_of, until

BUDGET = 96
EXTENT = 4
OTHER = {"dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_budget, "_REST_S", 0.0)
    monkeypatch.setattr(host_budget, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(host_budget, "_HALF_LIFE_S", 2.0)


@contextmanager
def sharing(path: Path, **cache: Any) -> Iterator[Daemon]:
    with running(path, BUDGET, cache={"server_max_pools": 2, **cache}, extent_slots=EXTENT) as daemon:
        yield daemon


def memory_of(daemon: Daemon) -> dict[str, int]:
    """Bytes of memory that each pool has."""
    found = {}
    for name, pool in list(daemon._pools.items()):
        if (host := pool.cache.memory.pool) is not None and host.fd >= 0:
            found[name] = os.fstat(host.fd).st_blocks * 512
    return found


def stays_within(daemon: Daemon) -> None:
    """The pools together have no more memory than the budget, but for the ends of pages."""
    budget = daemon._budget
    assert budget is not None
    with budget._lock:                               # while one pool is looked at, none gives memory back
        memory, held = memory_of(daemon), budget.held_bytes
    assert sum(memory.values()) <= (BUDGET + EXTENT) * SLOT_BYTES, (memory, held)
    assert held <= (BUDGET + EXTENT) * SLOT_BYTES


def slots_of(manager: KVManager) -> int:
    return int(manager.stats()["num_slots"])


def save(manager: KVManager, tensors: Tensors, num_blocks: int, seed: int) -> bool:
    """Save a sequence of its own content; whether all of it was."""
    tensors.fill(range(num_blocks), seed)
    task = manager.put_async(tokens_of(num_blocks, seed), mapping(range(num_blocks)))
    return manager.wait(task)[task].status is Status.SUCCESS


def load(manager: KVManager, tensors: Tensors, num_blocks: int, seed: int) -> int:
    """Load the cached blocks of a sequence, and compare their bytes with computed ones; returns their number."""
    task, mask = manager.get_match(tokens_of(num_blocks, seed))
    found = int(mask.sum()) // 4
    if not found:
        manager.cancel(task)
        return 0
    tensors.zero()
    manager.launch([task], [mapping(range(found))])
    if manager.wait(task)[task].status is Status.SUCCESS:
        assert tensors.read(range(found)) == expected(list(range(found)), seed)
        return found
    return 0


def work(daemon: Daemon, manager: KVManager, tensors: Tensors, seed: int) -> int:
    """One turn of a load that needs more than a half of the budget."""
    found = load(manager, tensors, 12, seed % 7)
    save(manager, tensors, 12, seed % 7)
    stays_within(daemon)
    return found


def work_until(daemon: Daemon, manager: KVManager, tensors: Tensors, num_slots: int, timeout_s: float = 30.0) -> None:
    """Work until the pool has ``num_slots`` slots."""
    seed, deadline = 0, time.monotonic() + timeout_s
    while slots_of(manager) < num_slots:
        assert time.monotonic() < deadline, (slots_of(manager), memory_of(daemon))
        work(daemon, manager, tensors, seed)
        seed += 1


@pytest.mark.parametrize("ssd", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_shares_follow_the_load(tmp_path: Path, ssd: bool) -> None:
    path = tmp_path / "server"
    tier = {"ssd_cache_gb": 1 / 64, "ssd_cache_dir": str(tmp_path / "ssd"), "ssd_admission": "all"} if ssd else {}
    with sharing(path, **tier) as daemon, engine(path, tmp_path / "r0") as (one, _, first), engine(
        path, tmp_path / "r1", model=OTHER
    ) as (two, _, second):
        for busy, idle, tensors in ((one, two, first), (two, one, second), (one, two, first)):
            work_until(daemon, busy, tensors, 72)
            assert 0 < slots_of(idle) <= BUDGET - 72
            assert sum(work(daemon, busy, tensors, turn) for turn in range(7)) > 0
            one.check_integrity()
            two.check_integrity()
        assert slots_of(one) + slots_of(two) <= BUDGET


def test_a_pool_without_engines_yields_all(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with sharing(path) as daemon:
        with engine(path, tmp_path / "r0") as (one, _, first):
            for seed in range(7):
                save(one, first, 12, seed)
        assert len(daemon._pools) == 1
        with engine(path, tmp_path / "r1", model=OTHER) as (two, _, second):
            work_until(daemon, two, second, BUDGET)
            until(lambda: len(daemon._pools) == 1, 10.0)
            assert sum(load(two, second, 12, seed) for seed in range(7)) > 0


def test_a_guaranteed_share_is_kept_and_never_lent(tmp_path: Path) -> None:
    path, guaranteed = tmp_path / "server", 40 * SLOT_BYTES
    cache = {"num_cpu_blocks": None, "cpu_cache_gb": BUDGET * SLOT_BYTES / (1 << 30),
             "server_guarantees": {"kept": guaranteed / (1 << 30)}, "server_max_pools": 2}
    with running(path, cache=cache, extent_slots=EXTENT) as daemon, engine(path, tmp_path / "r0") as (
        one, _, first
    ):
        work_until(daemon, one, first, BUDGET - 40)                # before the model has come
        for seed in range(50):
            work(daemon, one, first, seed)
        assert slots_of(one) == BUDGET - 40
        kept = {"model_id": "kept"}                                # of the same layout
        with engine(path, tmp_path / "r1", model=kept) as (two, _, second):
            assert slots_of(two) == 40
            assert all(save(two, second, 12, seed) for seed in range(3))
        for seed in range(20):
            work(daemon, one, first, seed)
        assert slots_of(one) == BUDGET - 40                        # not while it has no engine either
        with engine(path, tmp_path / "r2", model=kept) as (two, _, second):
            assert sum(load(two, second, 12, seed) for seed in range(3)) == 36


@contextmanager
def engine_in_process(path: Path, port: Path) -> Iterator[tuple[KVManager, RankProcess]]:
    """An engine whose rank is a process of its own."""
    manager, rank = make_engine(path, port), RankProcess(str(port))
    try:
        manager.wait_ready(20.0)
        yield manager, rank
    finally:
        manager.shutdown()
        rank.kill()


def fill_all(daemon: Daemon, manager: KVManager, rank: RankProcess) -> None:
    """Let the pool of an engine grow until it has the whole budget."""
    seed, deadline = 0, time.monotonic() + 20.0
    while slots_of(manager) < BUDGET:
        assert time.monotonic() < deadline, slots_of(manager)
        rank("tensors", "fill", list(range(12)), seed)
        task = manager.put_async(tokens_of(12, seed), mapping(range(12)))
        manager.wait(task)
        seed += 1
        stays_within(daemon)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGCONT])
def test_a_stopped_rank_holds_up_no_other_pool(tmp_path: Path, kind: signal.Signals) -> None:
    """Its saves hold slots at the end of its pool, so that this cannot shrink. A third engine gets memory of the second
    one, and that of the first when its rank goes on, or its process has ended: only then it can write no more."""
    path = tmp_path / "server"
    with sharing(path, server_max_pools=3) as daemon, engine_in_process(path, tmp_path / "r0") as (one, rank):
        fill_all(daemon, one, rank)
        with engine(path, tmp_path / "r1", model=OTHER) as (two, _, second):
            work_until(daemon, two, second, 32)
            rank.signal(signal.SIGSTOP)
            free = slots_of(one) // 8 * 8
            held = [one.put_async(tokens_of(8, 100 + seed), mapping(range(8))) for seed in range(free // 8)]
            before = slots_of(one)
            with engine(path, tmp_path / "r2", model={"dtype": "int8"}) as (three, _, third):
                work_until(daemon, three, third, 8)
                for seed in range(40):
                    work(daemon, three, third, seed)
                    work(daemon, two, second, seed)
                assert slots_of(one) >= before - EXTENT
                rank.signal(kind)
                if kind is signal.SIGCONT:
                    one.wait(held)
                work_until(daemon, three, third, 48)
                for manager, tensors in ((two, second), (three, third)):
                    assert sum(work(daemon, manager, tensors, turn) for turn in range(9)) > 0
                    manager.check_integrity()
        until(lambda: all(pool.cache.stats()["tasks"] == 0 for pool in daemon._pools.values()), 10.0)
        for pool in daemon._pools.values():
            assert pool.cache.space.index is not None
            pool.cache.space.index.check_integrity()


KILLS = int(os.environ.get("DAEMON_KILLS", "6"))


def test_engines_are_killed_while_shares_change(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with sharing(path) as daemon, engine(path, tmp_path / "r0", model=OTHER) as (two, _, second):
        for number in range(KILLS):
            with engine_in_process(path, tmp_path / f"k{number}") as (one, rank):
                for seed in range(6):
                    rank("tensors", "fill", list(range(12)), seed)
                    task = one.put_async(tokens_of(12, seed), mapping(range(12)))
                    work(daemon, two, second, seed)
                    if seed < 5:
                        one.wait(task)
                rank.signal(signal.SIGKILL)
                for seed in range(10):
                    work(daemon, two, second, seed)
        work_until(daemon, two, second, 72)
        two.check_integrity()
