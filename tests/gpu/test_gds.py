"""GPUDirect Storage on a real GPU, with the real cuFile: bytes equal to those of the way through host memory.

Where /run/udev is not the host's, as in most containers, cuFile does not take the files: these tests fail there.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.config import CacheConfig, ModelConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.tensors import tensor_spec
from flexkv.rank.tp_client import KVTPClient
from tests.support.harness import LAYERS, TOKENS, mapping, tokens_of, until

pytestmark = pytest.mark.gpu

PAGES = 200
HOST_SLOTS = 64
SHAPE = (PAGES, 2, TOKENS, 8, 1000)                     # 375 KiB a block: slots end with a part that is not used


class Stage:
    """A manager with an SSD tier, and one rank with tensors on the GPU."""

    def __init__(self, place: Path, host_slots: int, **cache: Any) -> None:
        self.tensors = [torch.zeros(SHAPE, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        config = CacheConfig(
            tokens_per_block=TOKENS, num_cpu_blocks=host_slots, ssd_cache_gb=1.0, ssd_cache_dir=str(place / "ssd"),
            ssd_admission="all", load_policy="always", evict_start_threshold=1.0, **cache,
        )
        port = str(place / "s")
        self.manager = KVManager(ModelConfig(num_layers=LAYERS, model_id="gds"), config, gpu_register_port=port)
        self.manager.start()
        self.client = KVTPClient(port)
        self.client.register_tensors([tensor_spec(tensor) for tensor in self.tensors], 30.0)
        until(lambda: "ssd_written_blocks" in self.manager.stats(), 60.0)
        until(lambda: self.manager.stats()["num_slots"] == host_slots, 60.0)
        if cache.get("enable_gds"):
            until(lambda: self.manager.stats()["ssd_store_device_is_ready"] == 1, 60.0)

    def fill(self, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        for tensor in self.tensors:
            tensor.copy_(torch.randn(tensor.shape, device="cuda") * 50)
        torch.cuda.synchronize()
        return [tensor.clone() for tensor in self.tensors]

    def put(self, seed: int) -> None:
        task = self.manager.put_async(tokens_of(PAGES, seed), mapping(np.arange(PAGES)))
        assert self.manager.wait(task)[task].status is Status.SUCCESS
        until(lambda: self.manager.stats()["ssd_queued_blocks"] + self.manager.stats()["ssd_blocks_being_written"] == 0,
              30.0)

    def get(self, seed: int, content: list[torch.Tensor]) -> None:
        pages = np.random.default_rng(seed).permutation(PAGES)
        for tensor in self.tensors:
            tensor.zero_()
        torch.cuda.synchronize()
        task = self.manager.get_async(tokens_of(PAGES, seed), mapping(pages))
        assert self.manager.wait(task)[task].status is Status.SUCCESS
        index = torch.as_tensor(pages, device="cuda")
        assert all(torch.equal(a[index], b) for a, b in zip(self.tensors, content, strict=True))

    def stat(self, name: str) -> int:
        return self.manager.stats()[name]

    def close(self) -> None:
        self.manager.check_integrity()
        self.manager.shutdown()
        self.client.close()


def test_the_bytes_are_those_of_the_way_through_host_memory(tmp_path: Path) -> None:
    direct = Stage(tmp_path, HOST_SLOTS, enable_gds=True)
    contents = {}
    for seed in range(3):
        contents[seed] = direct.fill(seed)
        direct.put(seed)
    written = direct.stat("ssd_store_blocks_written")
    assert written == 3 * PAGES
    for seed in (0, 2, 1, 0):
        direct.get(seed, contents[seed])
    assert direct.stat("ssd_store_checksum_mismatches") == 0
    direct.close()
    by_host = Stage(tmp_path, 2 * PAGES)                # reads and verifies what the GPU wrote
    for seed in range(3):
        by_host.get(seed, contents[seed])
    contents[3] = by_host.fill(3)
    by_host.put(3)
    by_host.close()
    direct = Stage(tmp_path, HOST_SLOTS, enable_gds=True)
    for seed in range(4):                               # and the other way round, from a cold start
        direct.get(seed, contents[seed])
    assert direct.stat("blocks_being_fetched") == 0
    assert direct.stat("ssd_store_blocks_read") == 4 * PAGES
    direct.close()


def set_pages(stage: Stage, value: float) -> None:
    for tensor in stage.tensors:
        tensor.fill_(value)
    torch.cuda.synchronize()


def save(stage: Stage, seed: int, content: list[torch.Tensor], pages: np.ndarray, cancel_after: float | None) -> None:
    for tensor, there in zip(stage.tensors, content, strict=True):
        tensor[torch.as_tensor(pages, device="cuda")] = there
    torch.cuda.synchronize()
    task = stage.manager.put_async(tokens_of(PAGES, seed), mapping(pages))
    if cancel_after is not None:
        time.sleep(cancel_after)
        stage.manager.cancel(task)
        set_pages(stage, -1.0)                          # they may be another's from now on
    stage.manager.wait(task, completely=True)


def load(stage: Stage, seed: int, content: list[torch.Tensor], pages: np.ndarray, cancel_after: float | None) -> int:
    """Returns how many blocks came and were compared."""
    set_pages(stage, 0.0)
    task = stage.manager.get_async(tokens_of(PAGES, seed), mapping(pages))
    if cancel_after is not None:
        time.sleep(cancel_after)
        stage.manager.cancel(task)
    response = stage.manager.wait(task, completely=True)[task]
    if response.status is Status.CANCELLED:
        return 0
    assert response.return_mask is not None
    good = response.return_mask[::TOKENS].nonzero()[0]
    index = torch.as_tensor(pages[good], device="cuda")
    for tensor, there in zip(stage.tensors, content, strict=True):
        assert torch.equal(tensor[index], there[torch.as_tensor(good, device="cuda")])
    return len(good)


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    """Also where saves and loads are cancelled, and after a restart; SOAK_SECONDS tells for how long."""
    end = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "15"))
    rng = np.random.default_rng(1)
    stage = Stage(tmp_path, HOST_SLOTS, enable_gds=True)
    contents = [stage.fill(seed) for seed in range(16)]         # more than the SSD tier holds
    steps = compared = 0
    while time.monotonic() < end:
        seed, pages = int(rng.integers(len(contents))), rng.permutation(PAGES)
        cancel_after = rng.uniform(0.0, 0.05) if rng.random() < 0.4 else None
        if rng.random() < 0.4:
            save(stage, seed, contents[seed], pages, cancel_after)
        else:
            compared += load(stage, seed, contents[seed], pages, cancel_after)
        steps += 1
    read, written = stage.stat("ssd_store_blocks_read"), stage.stat("ssd_store_blocks_written")
    assert stage.stat("ssd_store_checksum_mismatches") == stage.stat("ssd_store_read_errors") == 0
    assert stage.stat("ssd_store_device_is_ready") == 1
    stage.close()
    stage = Stage(tmp_path, HOST_SLOTS, enable_gds=True)
    after = sum(load(stage, seed, content, np.arange(PAGES), None) for seed, content in enumerate(contents))
    assert stage.stat("ssd_store_checksum_mismatches") == 0
    stage.close()
    print(f"\n{steps} steps, {compared} blocks compared, {after} after a restart, {read} read, {written} written")
    assert compared > 100
    assert after > 100


def test_a_save_waits_for_compute(tmp_path: Path) -> None:
    """Pages are filled by compute that is still under way when the fence is told."""
    stage = Stage(tmp_path, 1, enable_gds=True)
    try:
        stream = torch.cuda.current_stream()
        for step in range(1, 6):
            for tensor in stage.tensors:
                tensor.zero_()
            torch.cuda.synchronize()
            hasher = stage.manager.blocks.hasher()
            hasher.extend(tokens_of(PAGES, 100 + step))
            put = stage.manager.blocks.put_blocks(hasher.keys, 0, np.arange(PAGES, dtype=np.int32), fence=step)
            assert put is not None
            torch.cuda._sleep(100_000_000)
            for tensor in stage.tensors:
                tensor.fill_(step)
            stage.client.advance_fence(save=step, stream=stream.cuda_stream)
            assert stage.manager.wait(put)[put].status is Status.SUCCESS
            for tensor in stage.tensors:
                tensor.zero_()
            get = stage.manager.blocks.get_blocks(hasher.keys, 0, np.arange(PAGES, dtype=np.int32), fence=step)
            stage.client.advance_fence(load=step, stream=stream.cuda_stream)
            assert stage.manager.wait(get)[get].status is Status.SUCCESS
            assert all(bool((tensor == step).all()) for tensor in stage.tensors)
    finally:
        stage.close()
