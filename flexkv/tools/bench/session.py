"""A KVManager and ranks in other processes, for benchmarks through KVManager's calls."""

import multiprocessing
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.config import CacheConfig, ModelConfig, TransferConfig, load_config
from flexkv.controller.response import KVResponse, KVResponseStatus
from flexkv.kvmanager import KVManager
from flexkv.rank.regions import TensorSpec
from flexkv.rank.tensors import tensor_spec
from flexkv.rank.tp_client import KVTPClient
from flexkv.server.storage_host import StorageHost

TOKENS_PER_BLOCK = 16
LAYERS = 4


def _layers(
    number: int, num_blocks: int, layer_bytes: int, on_gpu: bool, seed: int
) -> tuple[list[Any], list[TensorSpec]]:
    rng = np.random.default_rng(seed)
    layers: list[Any] = [rng.integers(0, 256, (num_blocks, layer_bytes), dtype=np.uint8) for _ in range(LAYERS)]
    if not on_gpu:
        return layers, [TensorSpec(a.ctypes.data, a.shape, a.strides, 1) for a in layers]
    import torch

    torch.cuda.set_device(number)
    layers = [torch.from_numpy(layer).cuda() for layer in layers]
    torch.cuda.synchronize()
    return layers, [tensor_spec(layer) for layer in layers]


def _rank(
    pipe: Connection, port: str, number: int, num_blocks: int, layer_bytes: int, on_gpu: bool, is_copy: bool
) -> None:
    layers, specs = _layers(number, num_blocks, layer_bytes, on_gpu, 0 if is_copy else number)
    content = [layer.clone() if on_gpu else layer.copy() for layer in layers]
    client = KVTPClient(port, device_id=number)
    client.rank.register_tensors(specs, keep_alive=layers, copies=["all ranks"] * LAYERS if is_copy else None)
    client.wait_connected(30.0)
    pipe.send("registered")
    for question in iter(pipe.recv, "stop"):
        client.poll_results()
        if question == "clear":
            for layer in layers:
                layer[:] = 0
            if on_gpu:
                layers[0].sum().item()                 # waits for the GPU
            pipe.send(None)
        elif question == "compare":
            pipe.send(all(bool((a == b).all()) for a, b in zip(layers, content, strict=True)))
    client.close()


def _storage_host(port: str, settings: dict[str, Any]) -> None:
    StorageHost(load_config(log_level="ERROR", **settings), port).run()


class Session:
    """One sequence, whose KV is in the ranks' pages in order, and was put.

    Attributes
    ----------
    tokens : (num_blocks * TOKENS_PER_BLOCK,) int64
    slots : (num_blocks * TOKENS_PER_BLOCK,) int64
        Token slot of each token in the ranks' pages.
    """

    def __init__(self, manager: KVManager, pipes: list[Connection], num_blocks: int) -> None:
        self.manager = manager
        self.num_blocks = num_blocks
        self._pipes = pipes
        self._rng = np.random.default_rng(1)
        self.tokens = self.other_tokens()
        self.slots = np.arange(len(self.tokens))

    def other_tokens(self) -> NDArray[np.int64]:
        """A new random sequence of the same length."""
        return self._rng.integers(0, 128_000, self.num_blocks * TOKENS_PER_BLOCK)

    def ask(self, question: str) -> list[object]:
        """Send a command to all ranks; returns their replies. ``clear``: zero its pages; ``compare``: whether they are
        unchanged since the start."""
        for pipe in self._pipes:
            pipe.send(question)
        return [pipe.recv() for pipe in self._pipes]

    def put(self, tokens: NDArray[np.int64]) -> float:
        """Save all pages as KV of ``tokens``; returns the microseconds."""
        start = time.perf_counter_ns()
        self.wait(self.manager.put_async(tokens, self.slots))
        return (time.perf_counter_ns() - start) / 1e3

    def wait(self, task_id: int) -> KVResponse:
        """Wait for a task, which must succeed; returns its response."""
        response = self.manager.wait([task_id])[task_id]
        if response.status is not KVResponseStatus.SUCCESS:
            raise AssertionError(f"a task ended with {response.status}")
        return response

    def get(self, num_blocks: int) -> float:
        """Load leading blocks; returns the microseconds from the start of the match to the end of the load."""
        tokens = self.tokens[: num_blocks * TOKENS_PER_BLOCK]
        start = time.perf_counter_ns()
        task_id, mask = self.manager.get_match(tokens)
        self.manager.launch([task_id], [self.slots[: len(tokens)]])
        self.wait(task_id)
        took = (time.perf_counter_ns() - start) / 1e3
        if not mask.all():
            raise AssertionError(f"{mask.sum()} of {len(mask)} tokens were found")
        return took

    def checked_get(self) -> float:
        """Load all blocks into cleared pages, and compare them in the ranks; returns the microseconds of the load."""
        self.ask("clear")
        took = self.get(self.num_blocks)
        if not all(self.ask("compare")):
            raise AssertionError("bytes differ")
        return took


@contextmanager
def session(
    num_blocks: int, layer_bytes: int, on_gpu: bool = False, transfer: TransferConfig | None = None, ranks: int = 1,
    nodes: int = 1, is_copy: bool = False, **cache: Any,
) -> Iterator[Session]:
    """A session whose bytes are compared before and after.

    Parameters
    ----------
    num_blocks, layer_bytes : int
        Blocks of the sequence, and bytes of a block in a layer of one rank.
    on_gpu : bool
        Each rank has the GPU with its number.
    transfer : TransferConfig, optional
    ranks, nodes : int
        The nodes are storage hosts on this machine.
    is_copy : bool
        The KV of all ranks is equal, and stored once.
    cache
        Settings of ``CacheConfig``.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        ports = [f"{directory}/register-{node}.sock" for node in range(nodes)]
        config, transfer = CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, **cache), transfer or TransferConfig()
        link: dict[str, Any] = {}
        if nodes > 1:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = str(probe.getsockname()[1])
            link = {"master_host": "127.0.0.1", "master_ports": port, "node_secret": secrets.token_hex(16)}
        manager = KVManager(
            ModelConfig(num_layers=LAYERS, model_id="bench", tp_size=ranks, nnodes=nodes), config,
            gpu_register_port=ports[0], transfer_config=transfer.replace(**link),
        )
        manager.start()
        stack.callback(manager.shutdown)
        for port in ports[1:]:
            host = context.Process(target=_storage_host, args=(port, {**link, **cache}), daemon=True)
            host.start()
            stack.callback(host.kill)
        pipes, processes = [], []
        for number in range(ranks):
            pipe, theirs = context.Pipe()
            arguments = (theirs, ports[number * nodes // ranks], number, num_blocks, layer_bytes, on_gpu, is_copy)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            stack.callback(processes[-1].join, 10)
            pipes.append(pipe)
        for pipe in pipes:
            if not pipe.poll(60) or pipe.recv() != "registered":
                raise AssertionError("a rank did not register")
        while manager.stats().get("num_slots", 0) < (config.num_cpu_blocks or 1):
            time.sleep(0.01)                       # the pool grows
        found = Session(manager, pipes, num_blocks)
        found.put(found.tokens)
        found.checked_get()
        yield found
        found.checked_get()
        for pipe in pipes:
            pipe.send("stop")
