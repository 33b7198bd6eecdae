"""Engines that share the daemon: latency beside a cache in the engine's process, and requests a second."""

import itertools
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv.config import CacheConfig, FlexKVConfig, ModelConfig, TransferConfig
from flexkv.kvmanager import KVManager
from flexkv.rank.regions import TensorSpec
from flexkv.rank.tp_client import KVTPClient
from flexkv.server.daemon import Daemon
from flexkv.tools.bench.report import Line, line_of
from flexkv.tools.bench.session import session

LAYER_BYTES = 16384                   # bytes of a block in a layer: 64 KiB a block in total
NUM_BLOCKS = 128
_TOKENS_PER_BLOCK = 16
_LOOKUPS = 8
"""Lookups of 128 blocks beside each get of one block and each put of one new block: an engine asks for each waiting
request in each step."""


def _serve(path: str, num_slots: int) -> None:
    daemon = Daemon(FlexKVConfig(cache=CacheConfig(num_cpu_blocks=num_slots)), path)
    signal.signal(signal.SIGTERM, lambda number, frame: daemon.stop())
    daemon.run()


@contextmanager
def daemon_process(directory: Path, num_slots: int) -> Iterator[TransferConfig]:
    """A daemon in a process of its own; gives the settings of its engines."""
    path = directory / "server.sock"
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(str(path), num_slots))
    process.start()
    try:
        yield TransferConfig(server_recv_port=str(path), server_launch_mode="external")
    finally:
        process.terminate()
        process.join(10)


def _client(pipe: Connection, transfer: TransferConfig, port: str, seed: int, seconds: float) -> None:
    """An engine with one rank in its process: mixed requests for a time; sends their durations in microseconds."""
    layers = [np.zeros((NUM_BLOCKS, LAYER_BYTES // 4), dtype=np.uint8) for _ in range(4)]
    manager = KVManager(
        ModelConfig(num_layers=4, model_id="mixed"), CacheConfig(tokens_per_block=_TOKENS_PER_BLOCK),
        gpu_register_port=port, transfer_config=transfer,
    )
    manager.start()
    client = KVTPClient(port, transfer_config=transfer)
    client.register_tensors([TensorSpec(a.ctypes.data, a.shape, a.strides, 1) for a in layers], keep_alive=layers)
    manager.wait_ready(30.0)
    blocks, rng = manager.blocks, np.random.default_rng(seed)
    tokens = np.arange(NUM_BLOCKS * _TOKENS_PER_BLOCK)
    keys = blocks.keys(tokens)
    pages = np.arange(NUM_BLOCKS, dtype=np.int32)
    task = blocks.put_blocks(keys, 0, pages)               # of all clients, one saves them
    if task is not None:
        blocks.wait(task)
    pipe.send("ready")
    pipe.recv()
    took: list[float] = []
    until = time.perf_counter() + seconds
    for turn in itertools.count():
        start = time.perf_counter()
        if start >= until:
            break
        if turn % (_LOOKUPS + 2) < _LOOKUPS:
            blocks.lookup(keys)
        elif turn % (_LOOKUPS + 2) == _LOOKUPS:
            blocks.wait(blocks.get_blocks(keys[:1], 0, pages[:1]))
        else:
            new = rng.integers(1, 1 << 63, (1, 2), dtype=np.uint64)
            if (task := blocks.put_blocks(new, 0, pages[1:2])) is not None:
                blocks.wait(task)
        took.append(time.perf_counter() - start)
    pipe.send(np.array(took) * 1e6)
    pipe.recv()
    manager.shutdown()
    client.close()


def mixed(transfer: TransferConfig, directory: Path, clients: int, seconds: float) -> NDArray[np.float64]:
    """Durations in microseconds of the requests of all clients, (n,)."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(clients):
        ours, theirs = context.Pipe()
        port = str(directory / f"rank-{clients}-{number}.sock")
        processes.append(context.Process(target=_client, args=(theirs, transfer, port, number, seconds), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        for message in ("start", "end"):
            results = []
            for pipe in pipes:
                if not pipe.poll(60 + seconds):
                    raise AssertionError("a client does not answer")
                results.append(pipe.recv())
            for pipe in pipes:
                pipe.send(message)
        return np.concatenate(results)
    finally:
        for process in processes:
            process.join(10)


def run(n: int = 2000, seconds: float = 3.0, counts: Sequence[int] = (1, 2, 4, 8)) -> Iterator[Line]:
    """Measure gets of one block of 64 KiB, in process and through the daemon; and mixed requests of ``counts``
    engines."""
    with session(NUM_BLOCKS, LAYER_BYTES, num_cpu_blocks=2 * NUM_BLOCKS) as loaded:
        near = np.array([loaded.get(1) for _ in range(n)])[n // 10 :]
    with tempfile.TemporaryDirectory() as name, daemon_process(Path(name), 4096) as transfer:
        with session(NUM_BLOCKS, LAYER_BYTES, transfer=transfer) as loaded:
            far = np.array([loaded.get(1) for _ in range(n)])[n // 10 :]
        yield line_of("daemon", "get of 1 block of 64 KiB (ceiling: in process)", far, float(np.median(near)))
        for clients in counts:
            took = mixed(transfer, Path(name), clients, seconds)
            yield line_of("daemon", f"mixed requests of {clients} engines", took)
            yield Line("daemon", f"mixed requests of {clients} engines: rate", round(len(took) / seconds), "1/s")
