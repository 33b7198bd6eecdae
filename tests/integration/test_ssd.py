"""The SSD tier on real files: put, out of host memory, back; restart, back; bytes compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.cache.reasons import MissReason
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.tp_client import KVTPClient
from tests.support.harness import LAYERS, PAGES, Tensors, mapping, tokens_of, until, wait_ready

HOST_SLOTS = 40
PAGE_SHAPE = (2, 16, 2, 64)             # blocks of 24 KiB
BLOCKS = 30


@contextmanager
def running(
    tmp_path: Path, page_shape: tuple[int, ...] = PAGE_SHAPE, **settings: Any
) -> Iterator[tuple[KVManager, Tensors]]:
    """A manager and a rank in this process, with two directories."""
    settings = {
        "ssd_admission": "all", "ssd_cache_gb": 0.01, "ssd_cache_dir": f"{tmp_path / 'a'};{tmp_path / 'b'}", **settings
    }
    manager = KVManager(
        ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16"),
        CacheConfig(tokens_per_block=4, num_cpu_blocks=HOST_SLOTS, **settings),
        gpu_register_port=str(tmp_path / "s"), transfer_config=TransferConfig(),
    )
    manager.start()
    tensors = Tensors(PAGES, page_shape)
    client = KVTPClient(str(tmp_path / "s"), transfer_config=TransferConfig())
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        wait_ready(manager, HOST_SLOTS)
        until(lambda: "ssd_written_blocks" in manager.stats(), 20.0)
        yield manager, tensors
        until(lambda: manager.stats()["blocks_being_fetched"] == 0)
        manager.check_integrity()
    finally:
        manager.shutdown()
        client.close()


def put(manager: KVManager, tensors: Tensors, seed: int) -> bytes:
    pages = range(BLOCKS)
    tensors.fill(pages, seed)
    task = manager.put_async(tokens_of(BLOCKS, seed), mapping(pages))
    assert manager.wait(task, completely=True)[task].status is Status.SUCCESS
    until(lambda: manager.stats()["ssd_queued_blocks"] + manager.stats()["ssd_blocks_being_written"] == 0)
    return tensors.read(pages)


def get(manager: KVManager, tensors: Tensors, seed: int) -> bytes:
    tensors.zero()
    pages = range(PAGES - BLOCKS, PAGES)
    task = manager.get_async(tokens_of(BLOCKS, seed), mapping(pages))
    response = manager.wait(task)[task]
    assert response.status is Status.SUCCESS
    assert response.return_mask is not None
    assert response.return_mask.all()
    return tensors.read(pages)


@pytest.mark.parametrize("ssd_io", ["auto", "threads"])
def test_put_evict_get_restart_get(tmp_path: Path, ssd_io: str) -> None:
    with running(tmp_path, ssd_io=ssd_io) as (manager, tensors):
        contents = {seed: put(manager, tensors, seed) for seed in range(6)}
        assert manager.stats()["evicted_blocks"] > 0
        for seed, content in contents.items():
            assert get(manager, tensors, seed) == content
        assert manager.stats()["ssd_store_blocks_read"] > 4 * BLOCKS
    with running(tmp_path, ssd_io=ssd_io) as (manager, tensors):
        assert manager.stats()["free_slots"] == HOST_SLOTS
        for seed, content in contents.items():
            assert get(manager, tensors, seed) == content
    with running(tmp_path, (16, 2, 2, 64), ssd_io=ssd_io) as (manager, _):     # as many bytes, with another meaning
        assert manager.get_match(tokens_of(BLOCKS, 0))[1].sum() == 0
    with running(tmp_path, ssd_io=ssd_io, key_secret="another") as (manager, _):
        assert manager.get_match(tokens_of(BLOCKS, 0))[1].sum() == 0


def test_a_block_that_rotted_is_a_miss(tmp_path: Path) -> None:
    with running(tmp_path) as (manager, tensors):
        content = put(manager, tensors, 1)
    data = max((path for path in (tmp_path / "a").iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
    other = max((path for path in (tmp_path / "b").iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
    for path in (data, other):
        written = path.read_bytes()
        at = written.find(content[:64])
        if at >= 0:                                          # the first block of the sequence
            path.write_bytes(written[:at] + b"\xff" + written[at + 1 :])
            break
    else:
        raise AssertionError("the block is in no file")
    with running(tmp_path) as (manager, tensors):
        tensors.zero()
        task = manager.get_async(tokens_of(BLOCKS, 1), mapping(range(BLOCKS)))
        response = manager.wait(task)[task]
        assert response.status is Status.FAILED
        assert response.return_mask is not None
        assert not response.return_mask[: 4].any()
        assert response.return_mask[4:].all()
        assert tensors.read(range(1, BLOCKS)) == content[len(content) // BLOCKS :]
        until(lambda: manager.stats()["blocks_being_fetched"] == 0)
        found = manager.blocks.lookup(_keys(manager))
        assert (found.num_ready, found.reason) == (0, MissReason.FAILED)


def test_nothing_of_before_a_reset_is_there_after_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as (manager, tensors):
        put(manager, tensors, 1)
        manager.reset()
        content = put(manager, tensors, 2)
    with running(tmp_path) as (manager, tensors):
        assert manager.blocks.lookup(_keys(manager)).num_ready == 0
        assert get(manager, tensors, 2) == content


def _keys(manager: KVManager) -> "np.typing.NDArray[np.uint64]":
    hasher = manager.blocks.hasher()
    hasher.extend(tokens_of(BLOCKS, 1))
    return hasher.keys
