"""On a real GPU: bytes through the whole stack, every strategy and layout, and a soak with cancels and page reuse."""

import os
import random
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv._core.device.agent import STRATEGIES
from flexkv.config import TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.regions import TensorSpec
from flexkv.rank.tensors import tensor_spec
from flexkv.rank.tp_client import KVTPClient
from tests.support.harness import LAYERS, TOKENS, check_drained, make_manager, mapping, result_of, tokens_of, until

pytestmark = pytest.mark.gpu

PAGES = 256


class Rank:
    """A manager and one rank with tensors on the GPU."""

    def __init__(self, tmp_path: Path, specs: list[TensorSpec], num_slots: int, **transfer: Any) -> None:
        self.num_slots = num_slots
        self.manager: KVManager = make_manager(tmp_path / "s", num_slots, **transfer)
        self.client = KVTPClient(str(tmp_path / "s"), transfer_config=TransferConfig(**transfer))
        self.client.register_tensors(specs, 30.0)
        self.client.wait_connected(30.0)
        until(lambda: self.manager.stats().get("num_slots", 0) == num_slots, 60.0)

    def close(self) -> None:
        self.manager.shutdown()
        self.client.close()


LAYOUTS: dict[str, Any] = {
    "vllm 0.23 [blocks, 2, tokens, heads, size]": lambda: [
        torch.empty(PAGES, 2, TOKENS, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)
    ],
    "vllm 0.21 [2, blocks, tokens, heads, size]": lambda: [
        torch.empty(2, PAGES, TOKENS, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)
    ],
    "strided [blocks, heads, tokens, 2 size] of one pool": lambda: list(
        torch.empty(PAGES, LAYERS, 8, TOKENS, 256, dtype=torch.bfloat16, device="cuda").unbind(1)
    ),
    "latent, bytes not a multiple of 16": lambda: [
        torch.empty(PAGES, TOKENS, 141, dtype=torch.uint8, device="cuda") for _ in range(LAYERS)
    ],
    "TensorRT-LLM pool [blocks, layers, 2, heads * size * tokens]": lambda: [
        torch.empty(PAGES, LAYERS, 2, 8 * 128 * TOKENS, dtype=torch.bfloat16, device="cuda")
    ],
    "TensorRT-LLM regions, two groups of their own stride": lambda: [
        torch.empty(PAGES, size + 512, dtype=torch.uint8, device="cuda")[:, :size] for size in (49152, 8192)
    ],
    "SGLang K list and V list [slots, heads, size]": lambda: [
        torch.empty(PAGES * TOKENS, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2 * LAYERS)
    ],
    "SGLang latent [slots, 1, size] and indexer [pages, bytes]": lambda: [
        *(torch.empty(PAGES * TOKENS, 1, 576, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)),
        *(torch.empty(PAGES, TOKENS * 132, dtype=torch.uint8, device="cuda") for _ in range(LAYERS)),
    ],
}


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    spec = tensor_spec(tensor, 1 if tensor.dim() == 5 and tensor.shape[0] == 2 else 0)
    return replace(spec, tokens_per_page=TOKENS) if tensor.shape[0] == PAGES * TOKENS else spec


def pages_of(tensors: list[torch.Tensor], pages: Any) -> list[torch.Tensor]:
    index = torch.as_tensor(np.asarray(pages), device="cuda")
    tensors = [t.unflatten(0, (PAGES, TOKENS)) if t.shape[0] == PAGES * TOKENS else t for t in tensors]
    return [tensor.index_select(spec_of(tensor).page_dim, index).clone().view(torch.uint8) for tensor in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_come_back(tmp_path: Path, strategy: str, layout: str) -> None:
    tensors = LAYOUTS[layout]()
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, device="cuda") * 50)
    rank = Rank(tmp_path, [spec_of(tensor) for tensor in tensors], 3 * PAGES, gpu_strategy=strategy, gpu_window_mb=1)
    try:
        for seed in range(3):
            pages = np.random.default_rng(seed).permutation(PAGES)
            before = pages_of(tensors, pages)
            torch.cuda.synchronize()
            task = rank.manager.put_async(tokens_of(PAGES, seed), mapping(pages))
            assert rank.manager.wait(task)[task].status is Status.SUCCESS
            for tensor in tensors:
                tensor.zero_()
            torch.cuda.synchronize()
            pages = np.random.default_rng(seed + 50).permutation(PAGES)
            task = rank.manager.get_async(tokens_of(PAGES, seed), mapping(pages))
            assert rank.manager.wait(task)[task].status is Status.SUCCESS
            assert all(torch.equal(a, b) for a, b in zip(pages_of(tensors, pages), before, strict=True))
        check_drained(rank.manager)
    finally:
        rank.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compute_follows_a_load_layer_by_layer(tmp_path: Path, strategy: str) -> None:
    """A stream that follows a load reads the right bytes of each layer; the thread returns long before they arrive."""
    layers, blocks = 16, 1024
    tensors = [torch.randint(-9, 9, (2 * blocks, 65536), dtype=torch.int8, device="cuda") for _ in range(layers)]
    torch.cuda.synchronize()
    rank = Rank(tmp_path, [tensor_spec(tensor) for tensor in tensors], 2 * blocks, gpu_strategy=strategy)
    stream = int(torch.cuda.current_stream().cuda_stream)
    hasher = rank.manager.blocks.hasher()
    hasher.extend(tokens_of(blocks))
    try:
        put = rank.manager.blocks.put_blocks(hasher.keys, 0, np.arange(blocks, dtype=np.int32))
        assert put is not None
        assert rank.manager.wait(put)[put].status is Status.SUCCESS
        until(lambda: bool(rank.client.poll_results()))
        for step in range(1, 6):
            pages = np.random.default_rng(step).permutation(blocks).astype(np.int32) + blocks
            index = torch.as_tensor(pages, device="cuda")
            for tensor in tensors:
                tensor[blocks:] = 0
            torch.cuda.synchronize()
            get = rank.manager.blocks.get_blocks(hasher.keys, 0, pages, fence=step, layerwise=True)
            began = time.perf_counter()
            rank.client.advance_fence(load=step, stream=stream)
            read = []
            for layer, tensor in enumerate(tensors):
                assert rank.client.follow_load(get, layer, 30.0, stream)
                read.append(tensor.index_select(0, index))
            given = time.perf_counter() - began
            torch.cuda.synchronize()
            print(f"{strategy}: given after {given * 1e3:.1f} ms, read after {time.perf_counter() - began:.4f} s")
            assert all(torch.equal(a, b[:blocks]) for a, b in zip(read, tensors, strict=True))
            assert rank.manager.wait(get)[get].status is Status.SUCCESS
            assert result_of(rank.client, get).ok.all()
        check_drained(rank.manager)
    finally:
        rank.close()


class Soak:
    """Sequences whose content follows from (sequence, block, layer); pages are reused as soon as that is allowed."""

    def __init__(self, tmp_path: Path) -> None:
        self.random = random.Random(1)
        self.words = 16384
        self.layers = [torch.zeros(PAGES, self.words, dtype=torch.int32, device="cuda") for _ in range(LAYERS)]
        self.ramp = torch.arange(self.words, dtype=torch.int32, device="cuda")
        self.burden = torch.randn(2048, 2048, device="cuda")
        self.rank = Rank(tmp_path, [tensor_spec(layer) for layer in self.layers], 300)
        self.manager = self.rank.manager
        self.free = list(range(PAGES))
        self.step = 0
        self.pending: list[tuple[int, int, bool, list[int], int]] = []
        self.compared = self.cancelled = self.puts = 0
        self.wrong = torch.zeros(1, dtype=torch.int64, device="cuda")

    def keys(self, sequence: int, length: int) -> Any:
        hasher = self.manager.blocks.hasher()
        hasher.extend(tokens_of(length, sequence))
        return hasher.keys

    def content(self, sequence: int, blocks: Any, layer: int) -> torch.Tensor:
        block = torch.as_tensor(blocks, dtype=torch.int32, device="cuda")[:, None]
        return self.ramp * 40503 + block * 7919 + (sequence * 104729 + layer * 31)

    def busy_compute(self) -> None:
        for _ in range(self.random.randrange(4)):
            self.burden = torch.tanh(self.burden @ self.burden)

    def one(self) -> None:
        self.step += 1
        length = self.random.randint(1, 24)
        sequence = self.random.randrange(40)
        load = self.random.random() < 0.6
        if len(self.free) < length:
            self.settle(self.pending.pop(0))
            return
        pages = [self.free.pop(self.random.randrange(len(self.free))) for _ in range(length)]
        index = torch.as_tensor(pages, device="cuda")
        keys = self.keys(sequence, length)
        stream = torch.cuda.current_stream().cuda_stream
        if load:
            length = self.manager.blocks.lookup(keys).num_ready
            if not length:
                self.free += pages
                return
            task = self.manager.blocks.get_blocks(keys, 0, np.array(pages[:length], np.int32), fence=self.step)
            for layer in self.layers:
                layer[index] = -1                      # compute that still uses the pages, before the load may
        else:
            task = self.manager.blocks.put_blocks(keys, 0, np.array(pages, dtype=np.int32), fence=self.step)
            self.busy_compute()
            for number, layer in enumerate(self.layers):
                layer[index] = self.content(sequence, range(length), number)
            self.puts += 1
        self.rank.client.advance_fence(load=self.step, save=self.step, stream=stream)
        if task is None:
            self.free += pages
            return
        self.pending.append((task, sequence, load, pages, length))
        if self.random.random() < 0.15:                # preempted: cancelled, drained, its pages used at once
            self.manager.cancel(task)
            self.cancelled += 1
            self.settle(self.pending.pop())
        elif len(self.pending) > 6:
            self.settle(self.pending.pop(self.random.randrange(len(self.pending))))

    def settle(self, item: tuple[int, int, bool, list[int], int]) -> None:
        task, sequence, load, pages, count = item
        response = self.manager.wait(task, timeout=20, completely=True)[task]
        assert response.status in (Status.SUCCESS, Status.CANCELLED, Status.FAILED), response
        if load and response.status is Status.SUCCESS:
            index = torch.as_tensor(pages[:count], device="cuda")
            for number, layer in enumerate(self.layers):
                self.wrong += (layer[index] != self.content(sequence, range(count), number)).sum()
            self.compared += count
        self.free += pages

    def close(self) -> None:
        while self.pending:
            self.settle(self.pending.pop())
        check_drained(self.manager)
        self.rank.close()


def test_soak(tmp_path: Path) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "15"))
    soak = Soak(tmp_path)
    end, memory = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end:
            soak.one()
            soak.rank.client.poll_results()
            if soak.step == 2000:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    finally:
        soak.close()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory if memory else 0
    print(f"\nsoak: {soak.step} steps, {soak.puts} puts, {soak.compared} blocks compared, {soak.cancelled} cancelled, "
          f"{int(soak.wrong)} wrong words, {growth} KiB more memory since step 2,000")
    assert int(soak.wrong) == 0
    assert soak.compared > 100
    assert growth < 64 << 10
