"""A get through KVManager, from match to bytes in the engine's pages, with the device agent in another process."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from flexkv._core.block_table import TensorSpec
from flexkv.bench.report import Line, line_of
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.kvmanager import KVManager
from flexkv.response import KVResponseStatus
from flexkv.server.client import KVTPClient

TOKENS_PER_BLOCK = 16
NUM_BLOCKS = 2048
LAYERS = 4
LAYER_BYTES = 16384                   # of a block and layer: 64 KiB a block in all
TINY_LAYER_BYTES = 16                 # a block of 64 bytes: what is left is what a get costs without its copy


def _rank(pipe: Connection, port: str, layer_bytes: int) -> None:
    layers = [np.zeros((NUM_BLOCKS, layer_bytes), dtype=np.uint8) for _ in range(LAYERS)]
    rng = np.random.default_rng(0)
    for layer in layers:
        layer[:] = rng.integers(0, 256, layer.shape, dtype=np.uint8)
    content = [layer.copy() for layer in layers]
    client = KVTPClient(port)
    client.register_tensors([TensorSpec(a.ctypes.data, a.shape, a.strides, 1) for a in layers], keep_alive=layers)
    client.wait_connected(30.0)
    pipe.send("registered")
    for question in iter(pipe.recv, "stop"):
        client.poll_results()
        if question == "clear":
            for layer in layers:
                layer[:] = 0
            pipe.send(None)
        elif question == "compare":
            pipe.send(all((a == b).all() for a, b in zip(layers, content, strict=True)))
    client.close()


class _Session:
    def __init__(self, manager: KVManager, pipe: Connection) -> None:
        self.manager = manager
        self.pipe = pipe
        self.tokens = np.random.default_rng(1).integers(0, 128_000, NUM_BLOCKS * TOKENS_PER_BLOCK)
        self.slots = np.arange(len(self.tokens))

    def ask(self, question: str) -> object:
        self.pipe.send(question)
        return self.pipe.recv()

    def get(self, num_blocks: int) -> float:
        """Microseconds from match to bytes in place."""
        tokens = self.tokens[: num_blocks * TOKENS_PER_BLOCK]
        start = time.perf_counter_ns()
        task_id, mask = self.manager.get_match(tokens)
        self.manager.launch([task_id], [self.slots[: len(tokens)]])
        response = self.manager.wait([task_id])[task_id]
        took = (time.perf_counter_ns() - start) / 1e3
        if response.status is not KVResponseStatus.SUCCESS or not mask.all():
            raise AssertionError(f"the get ended with {response.status}")
        return took

    def check(self) -> None:
        """Load everything into cleared pages, and have the rank compare."""
        self.ask("clear")
        self.get(NUM_BLOCKS)
        if self.ask("compare") is not True:
            raise AssertionError("bytes differ")

    def times(self, num_blocks: int, n: int) -> NDArray[np.float64]:
        """(n,) microseconds of gets."""
        return np.array([self.get(num_blocks) for _ in range(n + n // 10)])[n // 10 :]


@contextmanager
def _session(layer_bytes: int) -> Iterator[_Session]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        port = f"{directory}/register.sock"
        manager = KVManager(
            ModelConfig(num_layers=LAYERS, model_id="bench"),
            CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=2 * NUM_BLOCKS),
            gpu_register_port=port, transfer_config=TransferConfig(),
        )
        manager.start()
        pipe, theirs = context.Pipe()
        rank = context.Process(target=_rank, args=(theirs, port, layer_bytes), daemon=True)
        rank.start()
        try:
            if not pipe.poll(60) or pipe.recv() != "registered":
                raise AssertionError("the rank did not register")
            while manager.stats().get("num_slots", 0) < 2 * NUM_BLOCKS:
                time.sleep(0.01)                       # the pool grows
            session = _Session(manager, pipe)
            manager.wait([manager.put_async(session.tokens, session.slots)])
            session.check()
            yield session
            session.check()
            pipe.send("stop")
        finally:
            manager.shutdown()
            rank.join(10)


def run(n: int = 2000) -> Iterator[Line]:
    """One block of 64 KiB, and 2,048 of them, that are in host memory already."""
    few = max(10, n // 20)
    with _session(LAYER_BYTES) as session:
        yield line_of("api", "get of 1 block of 64 KiB: match, launch, wait", session.times(1, n))
        yield line_of("api", "get of 2,048 blocks of 64 KiB", session.times(NUM_BLOCKS, few))
    with _session(TINY_LAYER_BYTES) as session:
        yield line_of("api", "get of 2,048 blocks, less the copy (64 bytes each)", session.times(NUM_BLOCKS, n))
