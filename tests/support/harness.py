"""A KVManager with ranks, in this process or in others, for tests that move real bytes."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.engine_blocks import EngineBlocks
from flexkv.controller.space import Space
from flexkv.kvmanager import KVManager
from flexkv.protocol.registration import Hello, SegmentClaim, SegmentKind
from flexkv.rank.regions import TensorSpec
from flexkv.rank.results import OpResult
from flexkv.rank.tp_client import KVTPClient
from flexkv.server.engine_client import EngineClient

TOKENS = 4
LAYERS = 3
PAGES = 64
PAGE_SHAPE = (2, TOKENS, 2, 64)


class Tensors:
    """KV of a rank: one array a layer, page first."""

    def __init__(
        self, num_pages: int = PAGES, page_shape: tuple[int, ...] = PAGE_SHAPE, device: int | None = None
    ) -> None:
        self.device = device
        self.layers = [np.zeros((num_pages, *page_shape), dtype=np.int16) for _ in range(LAYERS)]

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(a.ctypes.data, a.shape, tuple(s // a.itemsize for s in a.strides), a.itemsize,
                       device=self.device)
            for a in self.layers
        ]

    def fill(self, pages: Any, seed: int) -> None:
        """Content that depends on the block's position and the seed only."""
        for position, page in enumerate(pages):
            for layer, array in enumerate(self.layers):
                rng = np.random.default_rng([seed, position, layer])
                array[page] = rng.integers(-30000, 30000, array.shape[1:], dtype=np.int16)

    def read(self, pages: Any) -> bytes:
        return b"".join(array[page].tobytes() for page in pages for array in self.layers)

    def zero(self) -> None:
        for array in self.layers:
            array[:] = 0


def hello_of(rank: int = 0, segment_bytes: int = 1024, num_pages: tuple[int, ...] = (10,), **other: Any) -> Hello:
    """The HELLO of a rank that stores a segment of its own."""
    claim = SegmentClaim(SegmentKind.SHARD, segment_bytes, bytes(16))
    return Hello(**{"dp_client_id": 0, "pp_rank": 0, "rank": rank, "pid": 1, "num_pages": num_pages,
                    "segments": (claim,), **other})


class Failed:
    """Pages that were not moved, of each task that ended on a rank."""

    def __init__(self, client: KVTPClient) -> None:
        self._client = client

    def pages(self) -> list[list[int]]:
        return [result.failed_pages.tolist() for result in self._client.poll_results()]


def _serve(
    pipe: Connection, port: str, rank: int, shape: tuple[int, tuple[int, ...]], copies: list[str | None] | None
) -> None:
    tensors = Tensors(*shape)
    client = KVTPClient(port, intra_client_id=rank)
    client.rank.register_tensors(tensors.specs(), 20.0, keep_alive=tensors, copies=copies)
    targets = {"tensors": tensors, "client": client, "failed": Failed(client)}
    while True:
        try:
            target, name, args = pipe.recv()
        except EOFError:
            break
        value = getattr(targets[target], name)
        pipe.send(value(*args) if callable(value) else value)
    client.close()


class RankProcess:
    """A rank in a separate process, driven by commands."""

    def __init__(self, port: str, rank: int = 0, num_pages: int = PAGES,
                 page_shape: tuple[int, ...] = PAGE_SHAPE, copies: list[str | None] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, port, rank, (num_pages, page_shape), copies)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, target: str, name: str, *args: Any) -> Any:
        self._pipe.send((target, name, args))
        assert self._pipe.poll(20), "the rank does not answer"
        return self._pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number is signal.SIGSTOP:                # its threads stop one by one, on their own processors
            tasks = Path(f"/proc/{self.process.pid}/task")
            until(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                              for task in tasks.iterdir()))

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self._pipe.close()


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Look until it is so; fail after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def result_of(client: KVTPClient, task: int) -> OpResult:
    """What the rank is told of a task, which may come a little after the controller knows it."""
    results: dict[int, OpResult] = {}

    def told() -> bool:
        results.update((result.task_id, result) for result in client.poll_results())
        return task in results

    until(told)
    return results[task]


def make_manager(
    port: Path, num_slots: int = 48, ranks: int = 1, cache: dict[str, Any] | None = None, **transfer: Any
) -> KVManager:
    manager = KVManager(
        ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16", tp_size=ranks),
        CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=num_slots, **(cache or {})),
        gpu_register_port=str(port),
        transfer_config=TransferConfig(**transfer),
    )
    manager.start()
    return manager


def controller_of(manager: KVManager) -> EngineBlocks:
    """The blocks of a manager at their controller, or at a daemon in this process, for tests that look into them."""
    if isinstance(manager.blocks, EngineClient):
        from .daemon import blocks_of

        return blocks_of(manager.blocks)
    assert isinstance(manager.blocks, EngineBlocks)
    return manager.blocks


def space_of(manager: KVManager) -> Space:
    """Index, tasks and tiers of a manager."""
    return controller_of(manager)._space


def wait_ready(manager: KVManager, num_slots: int = 48) -> None:
    until(lambda: manager.is_ready() and manager.stats()["num_slots"] == num_slots, 20.0)


@contextmanager
def local(
    tmp_path: Path, num_slots: int = 48, tensors: Tensors | None = None, cache: dict[str, Any] | None = None,
    **transfer: Any,
) -> Iterator[tuple[KVManager, KVTPClient, Tensors]]:
    """Manager and rank in this process; checks at the end that nothing leaked."""
    manager, tensors = make_manager(tmp_path / "s", num_slots, cache=cache, **transfer), tensors or Tensors()
    client = KVTPClient(str(tmp_path / "s"), transfer_config=TransferConfig(**transfer))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        wait_ready(manager, num_slots)
        yield manager, client, tensors
        check_drained(manager)
    finally:
        manager.shutdown()
        client.close()


@contextmanager
def rank_of(tmp_path: Path, tensors: Tensors) -> Iterator[KVTPClient]:
    client = KVTPClient(str(tmp_path / "s"))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def remote(tmp_path: Path, num_slots: int = 48, ranks: int = 1, **transfer: Any) -> Iterator[Any]:
    """Manager here, ranks in processes of their own."""
    manager = make_manager(tmp_path / "s", num_slots, ranks, **transfer)
    processes = [RankProcess(str(tmp_path / "s"), rank) for rank in range(ranks)]
    try:
        wait_ready(manager, num_slots)
        yield (manager, *processes)
        check_drained(manager)
    finally:
        manager.shutdown()
        for process in processes:
            process.kill()


def check_drained(manager: KVManager) -> None:
    """Nothing is pinned, reserved or under way, and every slot is free or indexed."""
    until(lambda: not controller_of(manager).tasks.unsettled())
    manager.check_integrity()
    manager.reset()
    stats = manager.stats()
    assert stats["free_slots"] == stats["num_slots"]
    manager.check_integrity()


def mapping(pages: Any) -> np.ndarray:
    """Token slots of pages."""
    return (np.asarray(pages, dtype=np.int64)[:, None] * TOKENS + np.arange(TOKENS)).ravel()


def tokens_of(num_blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, num_blocks * TOKENS)
