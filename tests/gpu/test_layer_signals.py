"""On a real GPU: layers are signalled through eventfds when their bytes are on the device, also after sleep."""

from pathlib import Path

import pytest
import torch

from flexkv.controller.response import KVResponseStatus as Status
from tests.support.harness import TOKENS, until
from tests.unit.rank.test_layer_signals import COUNTERS, LAYERS, LAYOUT, PAGES, Rank, same

pytestmark = pytest.mark.gpu


class GpuRank(Rank):
    def make(self, fake: bool) -> list[torch.Tensor]:
        shape = (PAGES * TOKENS, 2, 64)
        tensors = [torch.randint(-999, 999, shape, dtype=torch.int16, device="cuda") for _ in range(2 * LAYERS)]
        torch.cuda.synchronize()
        return tensors


def test_each_layer_is_on_the_device_when_it_is_told_of(tmp_path: Path) -> None:
    rank = GpuRank(tmp_path, fake=False)
    try:
        before = rank.save(8)
        assert rank.counters.send(rank.path) == b"\x01"
        for turn in range(4 * COUNTERS):
            for tensor in rank.tensors:
                tensor[12 * TOKENS :] = 0
            torch.cuda.synchronize()
            task = rank.load(8, turn % COUNTERS)
            for layer in range(LAYERS):
                assert rank.counters.wait(turn % COUNTERS, layer)
                assert same(rank.layer(layer, 12, 8), before[layer])
            assert rank.manager.wait(task)[task].status is Status.SUCCESS
            assert rank.counters.told() == []
    finally:
        rank.close()


def test_tensors_that_were_unmapped_come_back_elsewhere(tmp_path: Path) -> None:
    rank = GpuRank(tmp_path, fake=False)
    try:
        before = rank.save(8)
        assert rank.counters.send(rank.path) == b"\x01"      # a load that cannot tell of its layers fails
        assert rank.client.suspend_gpu_mappings() == 2 * LAYERS
        until(lambda: not rank.manager.is_ready())
        old, rank.tensors = rank.tensors, rank.make(fake=False)
        assert {tensor.data_ptr() for tensor in old}.isdisjoint(tensor.data_ptr() for tensor in rank.tensors)
        del old
        torch.cuda.empty_cache()
        rank.client.register_to_server(rank.tensors, LAYOUT, resume=True)
        until(rank.manager.is_ready)
        task = rank.load(8, 0)
        assert rank.manager.wait(task)[task].status is Status.SUCCESS
        assert all(same(rank.layer(layer, 12, 8), before[layer]) for layer in range(LAYERS))
    finally:
        rank.close()
