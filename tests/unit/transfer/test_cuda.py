"""The CUDA path against a fake driver: every strategy and layout, fences, and each call of the driver failing."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv._core.device.agent import STRATEGIES
from flexkv._core.device.cuda_driver import load_driver
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError
from flexkv.kvmanager import KVManager
from flexkv.rank.kernels import compiled_kernel
from flexkv.rank.tp_client import KVTPClient
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.support.harness import PAGES, Tensors, local, make_manager, mapping, result_of, tokens_of, until

SHAPES = {"aligned": (2, 4, 2, 64), "words": (2, 4, 1, 2), "odd": (3, 1, 5), "large": (2, 4, 2, 4096)}


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda().checked() as fake:
        yield fake


def scattered(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).permutation(PAGES)[:count]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_come_back(tmp_path: Path, cuda: FakeCuda, strategy: str, shape: str) -> None:
    tensors = Tensors(PAGES, SHAPES[shape], device=0)
    options = {"tensors": tensors, "gpu_strategy": strategy, "gpu_window_mb": 1}
    with local(tmp_path, 2 * PAGES, **options) as (manager, _, _):
        for seed in range(4):
            pages = scattered(PAGES, seed)
            tensors.fill(pages, seed)
            before = tensors.read(pages)
            task = manager.put_async(tokens_of(PAGES, seed), mapping(pages))
            assert manager.wait(task)[task].status is Status.SUCCESS
            tensors.zero()
            pages = scattered(PAGES, seed + 100)
            task = manager.get_async(tokens_of(PAGES, seed), mapping(pages))
            assert manager.wait(task)[task].status is Status.SUCCESS
            assert tensors.read(pages) == before


def test_staging_buffers_grow_so_far_that_a_block_fits(tmp_path: Path, cuda: FakeCuda) -> None:
    tensors = Tensors(PAGES, (2, 4, 2, 16384), device=0)                     # 1.5 MiB a block
    with local(tmp_path, 2 * PAGES, tensors=tensors, gpu_strategy="staged", gpu_window_mb=1) as (manager, _, _):
        tensors.fill(range(4), 1)
        before = tensors.read(range(4))
        task = manager.put_async(tokens_of(4), mapping(range(4)))
        assert manager.wait(task)[task].status is Status.SUCCESS
        cuda.fail("cuLaunchKernel", code=0)
        task = manager.get_async(tokens_of(4), mapping(range(9, 13)))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert cuda.calls == 4                                              # one block a window, by the kernel
        assert tensors.read(range(9, 13)) == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_directions_at_once_over_many_windows(tmp_path: Path, cuda: FakeCuda, strategy: str) -> None:
    tensors = Tensors(PAGES, SHAPES["large"], device=0)
    options = {"tensors": tensors, "gpu_strategy": strategy, "gpu_window_mb": 1}
    with local(tmp_path, 4 * PAGES, **options) as (manager, _, _):
        half = PAGES // 2
        cuda.delay(300)
        tensors.fill(range(half), 1)
        first = tensors.read(range(half))
        task = manager.put_async(tokens_of(half, 1), mapping(range(half)))
        assert manager.wait(task)[task].status is Status.SUCCESS
        for seed in range(2, 6):
            tensors.fill(range(half), seed)
            content = tensors.read(range(half))
            put = manager.put_async(tokens_of(half, seed), mapping(range(half)))
            get = manager.get_async(tokens_of(half, 1), mapping(range(half, PAGES)))
            assert {response.status for response in manager.wait([put, get]).values()} == {Status.SUCCESS}
            assert tensors.read(range(half, PAGES)) == first
            get = manager.get_async(tokens_of(half, seed), mapping(range(half, PAGES)))
            assert manager.wait(get)[get].status is Status.SUCCESS
            assert tensors.read(range(half, PAGES)) == content


def test_two_ranks_share_a_slot(tmp_path: Path, cuda: FakeCuda) -> None:
    manager = make_manager(tmp_path / "s", 2 * PAGES, ranks=2)
    ranks = [(Tensors(device=0), KVTPClient(str(tmp_path / "s"), intra_client_id=rank)) for rank in range(2)]
    try:
        for tensors, client in ranks:
            client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        until(lambda: manager.is_ready() and manager.stats()["num_slots"] == 2 * PAGES, 20)
        for rank, (tensors, _) in enumerate(ranks):
            tensors.fill(range(PAGES), rank)
        before = [tensors.read(range(PAGES)) for tensors, _ in ranks]
        task = manager.put_async(tokens_of(PAGES), mapping(range(PAGES)))
        assert manager.wait(task)[task].status is Status.SUCCESS
        for tensors, _ in ranks:
            tensors.zero()
        task = manager.get_async(tokens_of(PAGES), mapping(range(PAGES)))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert [tensors.read(range(PAGES)) for tensors, _ in ranks] == before
    finally:
        manager.shutdown()
        for _, client in ranks:
            client.close()


def stream_of() -> Any:
    from cuda.bindings import driver

    load_driver()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    return driver, driver.cuStreamCreateWithPriority(1, 0)[1]


@pytest.fixture
def compute(cuda: FakeCuda) -> Iterator[int]:
    """Handle of a compute stream."""
    driver, stream = stream_of()
    yield int(stream)
    driver.cuStreamDestroy(stream)
    driver.cuCtxPopCurrent()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copies_wait_for_compute(tmp_path: Path, cuda: FakeCuda, strategy: str) -> None:
    """A put reads pages after a slow kernel has written them; a get writes pages after the kernel has read them."""
    driver, stream = stream_of()
    tensors = Tensors(device=0)
    try:
        with local(tmp_path, tensors=tensors, gpu_strategy=strategy) as (manager, client, _):
            hasher = manager.blocks.hasher()
            hasher.extend(tokens_of(4))
            written = Tensors()
            written.fill(range(4), 7)
            pages = np.arange(4, dtype=np.int32)
            put = manager.blocks.put_blocks(hasher.keys, 0, pages, fence=1)
            cuda.delay(20_000)
            for source, target in zip(written.layers, tensors.layers, strict=True):
                driver.cuMemcpyAsync(target.ctypes.data, source.ctypes.data, target.nbytes, stream)
            client.advance_fence(save=1, stream=int(stream))
            assert put is not None
            assert manager.wait(put)[put].status is Status.SUCCESS
            kept = Tensors()
            get = manager.blocks.get_blocks(hasher.keys, 0, pages + 8, fence=2)
            for source, target in zip(tensors.layers, kept.layers, strict=True):
                driver.cuMemcpyAsync(target.ctypes.data, source.ctypes.data, target.nbytes, stream)
            client.advance_fence(load=2, stream=int(stream))
            assert get is not None
            assert manager.wait(get)[get].status is Status.SUCCESS
            assert tensors.read(range(8, 12)) == written.read(range(4))
            assert kept.read(range(8, 12)) == bytes(len(kept.read(range(4))))
    finally:
        cuda.delay(0)
        driver.cuStreamDestroy(stream)
        driver.cuCtxPopCurrent()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copies_do_not_wait_for_later_compute(tmp_path: Path, cuda: FakeCuda, strategy: str) -> None:
    driver, stream = stream_of()
    tensors, slow, target = Tensors(device=0), np.ones(100, np.uint8), np.zeros(100, np.uint8)
    try:
        with local(tmp_path, tensors=tensors, gpu_strategy=strategy) as (manager, client, _):
            client.wait_connected(10)
            client.advance_fence(save=1, load=1, stream=int(stream))
            cuda.delay(2_000_000)
            driver.cuMemcpyAsync(target.ctypes.data, slow.ctypes.data, 100, stream)
            client.advance_fence(save=2, load=2, stream=int(stream))
            time.sleep(0.1)                                                # the slow one has started
            cuda.delay(0)
            tensors.fill([1, 2], 1)
            hasher = manager.blocks.hasher()
            hasher.extend(tokens_of(4))
            early = manager.blocks.put_blocks(hasher.keys[:2], 0, np.array([1, 2], np.int32), fence=1)
            assert early is not None
            assert manager.wait(early)[early].status is Status.SUCCESS
            assert not target.any()
            late = manager.blocks.put_blocks(hasher.keys, 2, np.array([1, 2], np.int32), fence=2)
            assert late is not None
            assert manager.wait(late)[late].status is Status.SUCCESS
            assert target.all()
    finally:
        driver.cuStreamDestroy(stream)
        driver.cuCtxPopCurrent()


def saved(manager: KVManager, tensors: Tensors, num_blocks: int) -> Any:
    """Keys of blocks with content, which pages 0 to ``num_blocks`` hold too."""
    tensors.fill(range(num_blocks), 1)
    hasher = manager.blocks.hasher()
    hasher.extend(tokens_of(num_blocks))
    put = manager.blocks.put_blocks(hasher.keys, 0, np.arange(num_blocks, dtype=np.int32))
    assert put is not None
    assert manager.wait(put)[put].status is Status.SUCCESS
    return hasher.keys


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compute_follows_a_load_layer_by_layer(tmp_path: Path, cuda: FakeCuda, compute: int, strategy: str) -> None:
    from cuda.bindings import driver

    tensors = Tensors(page_shape=SHAPES["large"], device=0)
    with local(tmp_path, PAGES, tensors=tensors, gpu_strategy=strategy, gpu_window_mb=1) as (manager, client, _):
        keys = saved(manager, tensors, 32)
        for step in range(1, 4):
            seen = Tensors(page_shape=SHAPES["large"])
            for array in tensors.layers:
                array[32:] = 0
            cuda.delay(500)
            get = manager.blocks.get_blocks(keys, 0, np.arange(32, 64, dtype=np.int32), step, layerwise=True)
            client.advance_fence(load=step, stream=compute)
            for layer, (source, target) in enumerate(zip(tensors.layers, seen.layers, strict=True)):
                assert client.follow_load(get, layer, 10.0, compute)
                driver.cuMemcpyAsync(target.ctypes.data, source.ctypes.data, target.nbytes, compute)
            assert manager.wait(get)[get].status is Status.SUCCESS
            driver.cuStreamSynchronize(compute)
            assert seen.read(range(32, 64)) == tensors.read(range(32))
            cuda.delay(0)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["cuMemcpy2DAsync", "cuLaunchKernel", "cuEventRecord", "cuEventQuery"])
def test_a_layerwise_load_that_fails_ends_the_wait(
    tmp_path: Path, cuda: FakeCuda, compute: int, name: str, after: int
) -> None:
    """Compute is not held up, and no block of the load is called good that is not."""
    tensors = Tensors(page_shape=SHAPES["large"], device=0)
    options = {"tensors": tensors, "gpu_strategy": "staged", "gpu_window_mb": 1}
    with local(tmp_path, PAGES, **options) as (manager, client, _):
        keys = saved(manager, tensors, 32)
        cuda.fail(name, after=after)
        get = manager.blocks.get_blocks(keys, 0, np.arange(32, 64, dtype=np.int32), layerwise=True)
        assert client.follow_load(get, None, 10.0, compute)
        response = manager.wait(get)[get]
        result = result_of(client, get)
        for position in np.flatnonzero(result.ok):
            assert tensors.read([32 + position]) == tensors.read([position])
        assert (response.status is Status.SUCCESS) == bool(result.ok.all())
        cuda.reset()


def test_a_cancelled_layerwise_load_ends_the_wait_but_not_for_those_before_it(
    tmp_path: Path, cuda: FakeCuda, compute: int
) -> None:
    tensors = Tensors(device=0)
    with local(tmp_path, tensors=tensors) as (manager, client, _):
        keys = saved(manager, tensors, 4)
        first = manager.blocks.get_blocks(keys, 0, np.arange(4, 8, dtype=np.int32), fence=9, layerwise=True)
        second = manager.blocks.get_blocks(keys, 0, np.arange(8, 12, dtype=np.int32), fence=9, layerwise=True)
        manager.cancel(second)
        assert not client.follow_load(second, None, 0.1, compute)          # the first one's fence was not reached
        client.advance_fence(load=9, stream=compute)
        assert client.follow_load(second, None, 10.0, compute)
        assert manager.wait(first)[first].status is Status.SUCCESS
        assert tensors.read(range(4, 8)) == tensors.read(range(4))
        assert not result_of(client, second).ok.any()
        assert manager.wait(second)[second].status is Status.CANCELLED


STAGES = {
    "cuStreamWaitEvent": "staged", "cuLaunchKernel": "direct", "cuEventRecord": "staged", "cuMemcpyAsync": "staged",
    "cuMemcpy2DAsync": "staged", "cuMemcpyBatchAsync": "batch", "cuEventQuery": "staged",
}


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize("name", STAGES)
def test_a_call_that_fails_is_a_failed_transfer(
    tmp_path: Path, cuda: FakeCuda, caplog: pytest.LogCaptureFixture, name: str, put: bool, after: int
) -> None:
    tensors = Tensors(PAGES, SHAPES["odd"] if name == "cuMemcpy2DAsync" else SHAPES["large"], device=0)
    with local(tmp_path, num_slots=2 * PAGES, tensors=tensors, gpu_strategy=STAGES[name], gpu_window_mb=1) as (
        manager, client, _,
    ):
        tokens, pages = tokens_of(PAGES), scattered(PAGES, 1)
        tensors.fill(pages, 1)
        before = tensors.read(pages)
        if not put:
            task = manager.put_async(tokens, mapping(pages))
            assert manager.wait(task)[task].status is Status.SUCCESS
        cuda.fail(name, after)
        task = (manager.put_async if put else manager.get_async)(tokens, mapping(pages))
        response = manager.wait(task)[task]
        happened = cuda.calls > after
        cuda.reset()
        assert response.status is (Status.FAILED if happened else Status.SUCCESS)
        assert happened or after
        result = result_of(client, task)
        if put:
            hasher = manager.blocks.hasher()
            hasher.extend(tokens)
            assert manager.blocks.lookup(hasher.keys).num_ready <= int(result.ok.argmin()) or result.ok.all()
            assert tensors.read(pages) == before
        if happened:
            assert not result.ok.all()
            assert f"{name} failed with CUDA_ERROR_FAKE" in caplog.text
            task = manager.put_async(tokens_of(2, 9), mapping([0, 1]))       # a broken context stays broken
            assert manager.wait(task)[task].status is Status.FAILED


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "name", ["cuMemAlloc", "cuEventCreate", "cuStreamCreateWithPriority", "cuCtxGetStreamPriorityRange"]
)
def test_a_rank_that_cannot_be_set_up_says_why(tmp_path: Path, cuda: FakeCuda, name: str, after: int) -> None:
    if name == "cuCtxGetStreamPriorityRange" and after:
        after = 0
    manager = make_manager(tmp_path / "s")
    client = KVTPClient(str(tmp_path / "s"))
    cuda.fail(name, after, code=2)
    try:
        tensors = Tensors(device=0)
        client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        with pytest.raises(RegistrationError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            client.wait_connected(10)
    finally:
        client.close()
        manager.shutdown()


def test_a_pool_that_cannot_be_pinned_is_slow_but_right(
    tmp_path: Path, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.fail("cuMemHostRegister", 0)
    tensors = Tensors(device=0)
    with caplog.at_level(logging.WARNING), local(tmp_path, tensors=tensors) as (manager, _, _):
        tensors.fill([1, 5], 1)
        before = tensors.read([1, 5])
        task = manager.put_async(tokens_of(2), mapping([1, 5]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        task = manager.get_async(tokens_of(2), mapping([7, 6]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read([7, 6]) == before
    assert "cannot be pinned" in caplog.text


@pytest.mark.parametrize("fails", [True, False])
def test_blocks_wait_for_their_part_of_the_pool(tmp_path: Path, cuda: FakeCuda, fails: bool) -> None:
    cuda.delay_registering(300_000)
    if fails:
        cuda.fail("cuMemHostRegister", 0)
    tensors = Tensors(device=0)
    with local(tmp_path, tensors=tensors) as (manager, _, _):
        tensors.fill([1], 1)
        task = manager.put_async(tokens_of(1), mapping([1]))
        assert manager.wait(task, timeout=5)[task].status is Status.SUCCESS


def test_a_driver_without_batches(tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexkv._core.device import cuda_driver

    cuda.fail("cuMemcpyBatchAsync", 0, code=500)
    monkeypatch.setattr("flexkv.rank.rank.load_driver", cuda_driver.Driver)
    tensors = Tensors(device=0)
    assert not cuda_driver.Driver().has_batch_copy
    with local(tmp_path, tensors=tensors, gpu_strategy="batch") as (manager, _, _):
        tensors.fill([1, 5], 1)
        before = tensors.read([1, 5])
        manager.wait(manager.put_async(tokens_of(2), mapping([1, 5])))
        task = manager.get_async(tokens_of(2), mapping([7, 6]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read([7, 6]) == before


def test_the_kernel_is_kept_and_checked(tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = load_driver().device(0)
    image = compiled_kernel(device)
    assert image[:4] == b"\x7fELF"
    [file] = (tmp_path / "flexkv" / "kernels").iterdir()
    assert file.read_bytes()[:-32] == image
    file.write_bytes(b"\x7fELF damaged")
    assert compiled_kernel(device) == image
    assert file.read_bytes()[:-32] == image


def test_tensors_on_two_devices_are_refused() -> None:
    specs = [*Tensors(device=0).specs(), *Tensors().specs()]
    with pytest.raises(RegistrationError, match="must be on one"):
        KVTPClient("unused").register_tensors(specs)
