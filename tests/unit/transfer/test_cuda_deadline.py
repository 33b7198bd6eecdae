"""Time limits of transfers that wait for steps on a GPU, against a fake driver."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.support.harness import Tensors, controller_of, local, tokens_of, until
from tests.unit.transfer.test_cuda import saved, stream_of


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda().checked() as fake:
        yield fake


@pytest.mark.parametrize("kind", ["put", "get"])
def test_a_step_on_the_gpu_may_take_longer_than_the_limit(tmp_path: Path, cuda: FakeCuda, kind: str) -> None:
    """The fence advances when the step is given to the stream; the limit counts from when the GPU has done it."""
    driver, stream = stream_of()
    tensors, target = Tensors(device=0), np.zeros(100, np.uint8)
    try:
        with local(tmp_path, tensors=tensors, op_timeout_s=0.15) as (manager, client, _):
            keys = saved(manager, tensors, 4)
            before = tensors.read(range(4))
            cuda.delay(1_000_000)
            driver.cuMemcpyAsync(target.ctypes.data, np.ones(100, np.uint8).ctypes.data, 100, stream)
            client.advance_fence(load=1, save=1, stream=int(stream))
            hasher = manager.blocks.hasher()
            hasher.extend(tokens_of(4, 9))
            pages = np.arange(4, dtype=np.int32)
            task = (manager.blocks.put_blocks(hasher.keys, 0, pages, fence=1) if kind == "put"
                    else manager.blocks.get_blocks(keys, 0, pages + 8, fence=1))
            assert task is not None
            until(lambda: controller_of(manager)._cache.transfer._device.links[0].busy)
            cuda.delay(0)
            assert manager.wait(task)[task].status is Status.SUCCESS
            assert target.all()                                             # the step was done before
            if kind == "put":
                task = manager.blocks.get_blocks(hasher.keys, 0, pages + 8)
                assert manager.wait(task)[task].status is Status.SUCCESS
            assert tensors.read(range(8, 12)) == before
    finally:
        driver.cuStreamDestroy(stream)
        driver.cuCtxPopCurrent()
