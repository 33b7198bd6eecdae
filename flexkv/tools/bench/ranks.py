"""Engines with several ranks, on one node and on two: latency of a get, and with GPUs the bandwidth of all ranks."""

import multiprocessing
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from flexkv.config import CacheConfig, ModelConfig, TransferConfig, load_config
from flexkv.kvmanager import KVManager
from flexkv.rank.rank import RankClient
from flexkv.rank.tensors import tensor_spec
from flexkv.server.storage_host import StorageHost
from flexkv.tools.bench.report import Line, line_of

_TOKENS, _LAYERS = 16, 4
_SMALL_BYTES, _LARGE_BYTES = 4096, 1 << 19
"""Bytes of a block in a layer of one rank: for latency, and for bandwidth."""

_SMALL_BLOCKS, _LARGE_BLOCKS = 32, 1024
_COPIES = 8


def _rank(pipe: Connection, port: str, rank: int, num_blocks: int, layer_bytes: int, device: int | None) -> None:
    """A rank: registers random tensors, then clears, compares or copies as it is asked."""
    content: list[Any] = [
        np.random.default_rng([rank, layer]).integers(0, 256, (num_blocks, layer_bytes), dtype=np.uint8)
        for layer in range(_LAYERS)
    ]
    if device is not None:
        import torch

        torch.cuda.set_device(device)
        content = [torch.from_numpy(layer).cuda() for layer in content]
    layers = [layer.clone() if device is not None else layer.copy() for layer in content]
    client = RankClient(port, device_id=device or 0, intra_client_id=rank)
    client.register_tensors([tensor_spec(layer) for layer in layers], 60.0, keep_alive=layers)
    client.wait_connected(60.0)
    pipe.send(None)
    for question in iter(pipe.recv, "stop"):
        client.poll_results()
        if question == "clear":
            for layer in layers:
                layer[:] = 0
            if device is not None:
                torch.cuda.synchronize()
            pipe.send(None)
        elif question == "compare":
            pipe.send(all(bool((a == b).all()) for a, b in zip(layers, content, strict=True)))
        elif question == "memcpy":
            _memcpy(pipe, layers)
    client.close()


def _memcpy(pipe: Connection, layers: list[Any]) -> None:
    """Copy as many bytes as all layers have from pinned memory, several times; sends the seconds of each copy."""
    import torch

    source = [torch.empty(layer.shape, dtype=torch.uint8, pin_memory=True) for layer in layers]
    into = [torch.empty_like(layer) for layer in layers]
    torch.cuda.synchronize()
    pipe.send(None)
    for _ in iter(pipe.recv, "end"):
        for target, pinned in zip(into, source, strict=True):
            target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        pipe.send(None)
    pipe.send(None)


class _Engine:
    """A manager, and its ranks in processes of their own."""

    def __init__(self, manager: KVManager, pipes: list[Connection], num_blocks: int) -> None:
        self.manager, self._pipes, self.num_blocks = manager, pipes, num_blocks
        self.tokens = np.arange(num_blocks * _TOKENS)

    def ask(self, question: str) -> list[Any]:
        """Send a command to all ranks at once; returns their replies."""
        for pipe in self._pipes:
            pipe.send(question)
        return [pipe.recv() for pipe in self._pipes]

    def put(self) -> None:
        """Save all pages of all ranks."""
        self._wait(self.manager.put_async(self.tokens, self.tokens))

    def get(self, num_blocks: int) -> float:
        """Load leading blocks; returns the microseconds from the start of the match to the end of the load."""
        tokens = self.tokens[: num_blocks * _TOKENS]
        start = time.perf_counter_ns()
        task_id, _ = self.manager.get_match(tokens)
        self.manager.launch([task_id], [tokens])
        self._wait(task_id)
        return (time.perf_counter_ns() - start) / 1e3

    def _wait(self, task_id: int) -> None:
        if not self.manager.wait([task_id])[task_id].status.name == "SUCCESS":
            raise AssertionError("a task has failed")

    def check(self) -> None:
        """Load all blocks into cleared pages, and compare them."""
        self.ask("clear")
        self.get(self.num_blocks)
        if not all(self.ask("compare")):
            raise AssertionError("bytes differ")


def _host(port: str, settings: dict[str, Any]) -> None:
    StorageHost(load_config(**settings), port).run()


@contextmanager
def _engine(num_ranks: int, nodes: int, num_blocks: int, layer_bytes: int, on_gpu: bool = False) -> Iterator[_Engine]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        transfer: dict[str, Any] = {"master_host": "127.0.0.1", "master_ports": str(port), "node_secret": "bench"}
        ports = [str(Path(name) / f"node{node}.sock") for node in range(nodes)]
        manager = KVManager(
            ModelConfig(num_layers=_LAYERS, tp_size=num_ranks, nnodes=nodes, model_id="ranks"),
            CacheConfig(tokens_per_block=_TOKENS, num_cpu_blocks=2 * num_blocks), gpu_register_port=ports[0],
            transfer_config=TransferConfig(**transfer),
        )
        stack.callback(manager.shutdown)
        manager.start()
        processes = []
        if nodes > 1:
            settings = {**transfer, "num_cpu_blocks": 2 * num_blocks, "log_level": "ERROR"}
            processes.append(context.Process(target=_host, args=(ports[1], settings), daemon=True))
        pipes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            device = rank if on_gpu else None
            arguments = (theirs, ports[rank * nodes // num_ranks], rank, num_blocks, layer_bytes, device)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            pipes.append(ours)
        for process in processes:
            process.start()
            stack.callback(process.kill)
        for pipe in pipes:
            if not pipe.poll(120):
                raise AssertionError("a rank did not register")
            pipe.recv()
        until = time.monotonic() + 120
        while not manager.is_ready() or manager.stats().get("num_slots", 0) < 2 * num_blocks:
            if time.monotonic() > until:
                raise AssertionError("the pool does not grow")
            time.sleep(0.01)
        engine = _Engine(manager, pipes, num_blocks)
        engine.put()
        engine.check()
        yield engine
        engine.check()


def _bandwidth(num_ranks: int) -> Iterator[Line]:
    """GB/s of a get by all ranks, beside plain copies by all of them at once."""
    with _engine(num_ranks, 1, _LARGE_BLOCKS, _LARGE_BYTES, on_gpu=True) as engine:
        total = num_ranks * _LARGE_BLOCKS * _LARGE_BYTES * _LAYERS
        took = [engine.get(engine.num_blocks) for _ in range(_COPIES)][1:]
        engine.ask("memcpy")
        plain = []
        for _ in range(_COPIES):
            start = time.perf_counter_ns()
            engine.ask("go")
            plain.append((time.perf_counter_ns() - start) / 1e3)
        engine.ask("end")
        ours, ceiling = total / min(took) / 1e3, total / min(plain[1:]) / 1e3
        ratio = round(ours / ceiling, 3)
        yield Line("ranks", f"host to GPU, {num_ranks} GPUs at once", round(ours, 1), "GB/s", round(ceiling, 1), ratio)


def run(n: int = 400, counts: "tuple[tuple[int, int], ...]" = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (2, 2), (16, 2))
        ) -> Iterator[Line]:
    """Measure ``n`` gets of one block, in microseconds, for each (ranks, nodes) of ``counts``; with GPUs also the
    bandwidth of 1, 2, 4 and 8 of them at once, in GB/s of 1e9 bytes."""
    for num_ranks, nodes in counts:
        with _engine(num_ranks, nodes, _SMALL_BLOCKS, _SMALL_BYTES) as engine:
            took = np.array([engine.get(1) for _ in range(n)])[n // 10 :]
        where = "" if nodes == 1 else f" on {nodes} nodes"
        yield line_of("ranks", f"get of 1 block, {num_ranks} rank{'s' * (num_ranks > 1)}{where}", took)
    try:
        import torch

        count = torch.cuda.device_count()
    except ImportError:
        count = 0
    for num_ranks in (1, 2, 4, 8):
        if num_ranks <= count:
            yield from _bandwidth(num_ranks)
