"""Pools of a daemon that divide host memory, with ranks on a fake GPU: memory that is given back is not pinned."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.tp_client import KVTPClient
from flexkv.server import host_budget
from flexkv.server.daemon import Daemon
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.support.daemon import make_engine, running
from tests.support.harness import PAGES, Tensors, mapping, tokens_of, until

SHAPE = (2, 4, 2, 4096)
SLOT_BYTES = 3 * 2 * 4 * 2 * 4096 * 2
PART_SLOTS = (16 << 20) // SLOT_BYTES
EXTENT_SLOTS = 2 * PART_SLOTS
BUDGET = 6 * EXTENT_SLOTS
BLOCKS = 48


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(host_budget, "_REST_S", 0.0)
    monkeypatch.setattr(host_budget, "_HALF_LIFE_S", 2.0)
    with fake_cuda().checked() as fake:
        yield fake


@contextmanager
def engine_on_gpu(path: Path, port: Path, dtype: str) -> Iterator[tuple[KVManager, KVTPClient, Tensors]]:
    """An engine that may not be ready yet."""
    manager, tensors = make_engine(path, port, model={"dtype": dtype}), Tensors(PAGES, SHAPE, device=0)
    client = KVTPClient(str(port), transfer_config=TransferConfig(server_recv_port=str(path)))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        yield manager, client, tensors
    finally:
        manager.shutdown()
        client.close()


class Load:
    """Sequences that an engine saves and loads, with the bytes that were computed."""

    def __init__(self, manager: KVManager, tensors: Tensors) -> None:
        self._manager, self._tensors = manager, tensors
        self._computed: dict[int, list[bytes]] = {}

    def turn(self, seed: int) -> int:
        found = self._load(seed) if seed in self._computed else 0
        self._tensors.fill(range(BLOCKS), seed)
        self._computed[seed] = [self._tensors.read([page]) for page in range(BLOCKS)]
        task = self._manager.put_async(tokens_of(BLOCKS, seed), mapping(range(BLOCKS)))
        assert self._manager.wait(task)[task].status is Status.SUCCESS
        return found

    def _load(self, seed: int) -> int:
        task, mask = self._manager.get_match(tokens_of(BLOCKS, seed))
        found = int(mask.sum()) // 4
        if not found:
            self._manager.cancel(task)
            return 0
        self._tensors.zero()
        self._manager.launch([task], [mapping(range(found))])
        assert self._manager.wait(task)[task].status is Status.SUCCESS
        assert [self._tensors.read([page]) for page in range(found)] == self._computed[seed][:found]
        return found


def pinned_bytes(cuda: FakeCuda) -> int:
    return sum(size for _, size in cuda.parts)


def held(daemon: Daemon) -> int:
    assert daemon._budget is not None
    return daemon._budget.held_bytes


def test_memory_goes_from_one_gpu_engine_to_another_and_back(tmp_path: Path, cuda: FakeCuda) -> None:
    path = tmp_path / "server"
    with running(
        path, BUDGET, cache={"server_max_pools": 2}, extent_bytes=16 << 20
    ) as daemon, engine_on_gpu(path, tmp_path / "r0", "float16") as (one, first, ones), engine_on_gpu(
        path, tmp_path / "r1", "bfloat16"
    ) as (two, second, twos):
        for manager in (one, two):
            manager.wait_ready(20.0)
        loads: dict[Any, Load] = {one: Load(one, ones), two: Load(two, twos)}
        found = 0
        for busy in (one, two, one):
            seed, deadline = 0, time.monotonic() + 60.0
            while busy.stats()["num_slots"] < 4 * EXTENT_SLOTS:
                assert time.monotonic() < deadline, (one.stats()["num_slots"], two.stats()["num_slots"])
                found += loads[busy].turn(seed % 9)
                seed += 1
                assert held(daemon) <= BUDGET * SLOT_BYTES
            busy.check_integrity()
        assert found > 0
        until(lambda: pinned_bytes(cuda) == held(daemon) <= BUDGET * SLOT_BYTES, 20.0)
        agents = [client.rank._agent for client in (first, second)]
        slots = [manager.stats()["num_slots"] for manager in (one, two)]
        assert [agent.pinned_slots for agent in agents if agent is not None] == slots


def test_a_pool_that_could_not_be_pinned_once_grows_again_after_it_has_shrunk(tmp_path: Path, cuda: FakeCuda) -> None:
    path = tmp_path / "server"
    with running(
        path, BUDGET, cache={"server_max_pools": 2}, extent_bytes=16 << 20
    ) as daemon, engine_on_gpu(path, tmp_path / "r0", "float16") as (one, first, ones):
        one.wait_ready(20.0)
        load, seed, deadline = Load(one, ones), 0, time.monotonic() + 60.0
        cuda.fail("cuMemHostRegister", 0, 2)
        while one.stats()["num_slots"] < BUDGET:
            assert time.monotonic() < deadline
            load.turn(seed)
            seed += 1
        agent = first.rank._agent
        assert agent is not None
        unpinned = agent.pinned_slots
        assert unpinned < BUDGET                                   # a part was refused
        with engine_on_gpu(path, tmp_path / "r1", "bfloat16") as (two, _, twos):
            two.wait_ready(30.0)
            other, seeds = Load(two, twos), itertools.count()
            until(lambda: other.turn(next(seeds) % 9) >= 0 and one.stats()["num_slots"] < unpinned, 30.0)
        until(lambda: load.turn(next(seeds)) >= 0 and one.stats()["num_slots"] == BUDGET, 30.0)
        until(lambda: agent.pinned_slots == BUDGET, 20.0)
        assert held(daemon) == BUDGET * SLOT_BYTES
        one.check_integrity()


def test_memory_that_cannot_be_unpinned_stays_with_its_pool(tmp_path: Path, cuda: FakeCuda) -> None:
    path = tmp_path / "server"
    with running(
        path, BUDGET, cache={"server_max_pools": 2}, extent_bytes=16 << 20
    ) as daemon, engine_on_gpu(path, tmp_path / "r0", "float16") as (one, _, ones):
        one.wait_ready(20.0)
        load, seed, deadline = Load(one, ones), 0, time.monotonic() + 60.0
        while one.stats()["num_slots"] < BUDGET:
            assert time.monotonic() < deadline
            load.turn(seed)
            seed += 1
        cuda.fail("cuMemHostUnregister", 0, 1)
        with engine_on_gpu(path, tmp_path / "r1", "bfloat16") as (two, _, _):
            until(lambda: cuda.calls > 0, 20.0)
            time.sleep(0.5)
            assert not two.is_ready()                              # it has no memory
            assert held(daemon) == BUDGET * SLOT_BYTES
            load.turn(0)                                           # the others go on with the memory that they have
        one.check_integrity()
