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
    """Load what is there of a sequence, and compare it with what was computed; number of blocks."""
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


def test_shares_follow_the_load(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with sharing(path) as daemon, engine(path, tmp_path / "r0") as (one, _, first), engine(
        path, tmp_path / "r1", model=OTHER
    ) as (two, _, second):
        for busy, idle, tensors in ((one, two, first), (two, one, second), (one, two, first)):
            seed, deadline = 0, time.monotonic() + 40.0
            while slots_of(busy) < 72:
                assert time.monotonic() < deadline, (slots_of(busy), slots_of(idle))
                work(daemon, busy, tensors, seed)
                seed += 1
            assert 0 < slots_of(idle) <= BUDGET - 72
            assert sum(work(daemon, busy, tensors, seed + turn) for turn in range(7)) > 0
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
            seed, deadline = 0, time.monotonic() + 30.0
            while slots_of(two) < BUDGET:
                assert time.monotonic() < deadline, slots_of(two)
                work(daemon, two, second, seed)
                seed += 1
            until(lambda: len(daemon._pools) == 1, 10.0)
            assert sum(load(two, second, 12, seed) for seed in range(7)) > 0
