"""Pools of the daemon: models with equal layouts of a block share one, others do not."""

import time
from pathlib import Path

from flexkv.config import TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.tp_client import KVTPClient
from tests.fault.test_daemon import TWO_POOLS, expected
from tests.support.daemon import engine, make_engine, running, sessions_of
from tests.support.harness import Tensors, mapping, tokens_of, until


def test_models_with_equal_layouts_share_memory_and_no_kv(tmp_path: Path) -> None:
    """The share of each grows and shrinks by use."""
    path = tmp_path / "server"
    with running(path) as daemon, engine(path, tmp_path / "r0") as (one, _, first), engine(
        path, tmp_path / "r1", model={"model_id": "other"}
    ) as (two, _, second):
        assert len({session.cache for session in sessions_of(daemon)}) == 1
        first.fill(range(40), 7)
        second.fill(range(40), 8)
        task = one.put_async(tokens_of(40), mapping(range(40)))
        assert one.wait(task)[task].status is Status.SUCCESS
        task, mask = one.get_match(tokens_of(40))
        assert mask.all()                                          # more than a half of the slots
        one.cancel(task)
        assert not two.get_match(tokens_of(40))[1].any()
        task = two.put_async(tokens_of(40), mapping(range(40)))
        assert two.wait(task)[task].status is Status.SUCCESS
        task, mask = two.get_match(tokens_of(40))
        blocks = int(mask.sum()) // 4
        assert blocks > 24                                         # those of the first model were evicted
        two.launch([task], [mapping(range(64 - blocks, 64))])
        assert two.wait(task)[task].status is Status.SUCCESS
        assert second.read(range(64 - blocks, 64)) == expected(list(range(blocks)), 8)
        two.check_integrity()


def test_other_layouts_have_other_pools(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r0") as (one, _, first):
        with engine(path, tmp_path / "r1", model={"dtype": "bfloat16"}) as (two, _, _):
            first.fill([0, 1], 7)
            task = one.put_async(tokens_of(2), mapping([0, 1]))
            assert one.wait(task)[task].status is Status.SUCCESS
            assert not two.get_match(tokens_of(2))[1].any()
            assert 0 < one.stats()["num_slots"] <= 48 - two.stats()["num_slots"] < 48
            third = make_engine(path, tmp_path / "r2", model={"dtype": "int8"})
            time.sleep(0.2)
            assert not third.is_ready()                                # both pools have engines
        until(lambda: len(sessions_of(daemon)) == 2, 10.0)             # it has the place of the second now
        third.shutdown()


def narrow_engine(path: Path, port: Path, head_size: int) -> tuple[KVManager, KVTPClient]:
    """An engine of a model "narrow", whose tensors are not those of its settings."""
    manager = make_engine(path, port, model={"model_id": "narrow"})
    tensors = Tensors(page_shape=(2, 4, 2, head_size))
    client = KVTPClient(str(port), transfer_config=TransferConfig(server_recv_port=str(path)))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    return manager, client


def test_an_engine_whose_blocks_do_not_fit_the_pool_gets_one_of_its_own(tmp_path: Path) -> None:
    """Equal settings need not mean equal tensors: the pool is replaced, or stays with the engines that it has."""
    path = tmp_path / "server"

    with running(path) as daemon:
        with engine(path, tmp_path / "r0"):
            manager, client = narrow_engine(path, tmp_path / "r1", 32)
            time.sleep(0.5)
            assert not manager.is_ready()                              # the only pool is in use
            assert sessions_of(daemon)
        manager.wait_ready(20.0)
        manager.shutdown()
        client.close()


def test_a_pool_of_ones_own_is_the_last_resort(tmp_path: Path) -> None:
    """Two engines of one domain with different tensors: the second is refused, and does not connect again and again."""
    path = tmp_path / "server"
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r0"):
        engines = [narrow_engine(path, tmp_path / "r1", 32)]
        engines[0][0].wait_ready(20.0)
        engines.append(narrow_engine(path, tmp_path / "r2", 16))
        until(lambda: len(sessions_of(daemon)) == 3, 10.0)
        before = set(sessions_of(daemon))
        time.sleep(0.5)
        assert set(sessions_of(daemon)) == before
        assert not engines[1][0].is_ready()
        assert engines[0][0].is_ready()
        for manager, client in engines:
            manager.shutdown()
            client.close()
