"""A daemon in this process, and engines that use it."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flexkv.config import CacheConfig, FlexKVConfig, ModelConfig, TransferConfig
from flexkv.controller.blocks import Blocks
from flexkv.controller.engine_blocks import EngineBlocks
from flexkv.kvmanager import KVManager
from flexkv.rank.tp_client import KVTPClient
from flexkv.server import connect as connecting
from flexkv.server.daemon import Daemon
from flexkv.server.engine_client import EngineClient
from flexkv.server.session import Session
from flexkv.storage.store import TierKind

from .harness import LAYERS, PAGE_SHAPE, TOKENS, Tensors

_running: dict[Path, Daemon] = {}
_numbers = itertools.count()

SLOT_BYTES = -(-LAYERS * math.prod(PAGE_SHAPE) * 2 // 4096) * 4096
"""Bytes of a slot of ``Tensors``, in whole pages."""


@contextmanager
def running(
    path: Path, num_slots: int = 48, cache: dict[str, Any] | None = None, extent_slots: int = 4,
    extent_bytes: int = 0, **transfer: Any
) -> Iterator[Daemon]:
    """A daemon on a thread. Extents are of ``extent_slots`` slots of ``Tensors``, or of ``extent_bytes``."""
    config = FlexKVConfig(
        cache=CacheConfig(**{"num_cpu_blocks": num_slots, **(cache or {})}), transfer=TransferConfig(**transfer)
    )
    daemon = Daemon(config, str(path), extent_bytes=extent_bytes or extent_slots * SLOT_BYTES)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    _running[path] = daemon
    try:
        yield daemon
    finally:
        daemon.stop()
        thread.join(30.0)
        assert not thread.is_alive()
        del _running[path]


def sessions_of(daemon: Daemon) -> list[Session]:
    return [session for pool in list(daemon._pools.values()) for session in list(pool.sessions)]


def blocks_of(client: EngineClient) -> EngineBlocks:
    """The blocks of an engine, at the daemon's end."""
    [found] = [session for session in sessions_of(_running[client._path])
               if session.hello.register_port == client._hello.register_port]
    return found._blocks


def make_engine(path: Path, port: Path, model: dict[str, Any] | None = None, **transfer: Any) -> KVManager:
    """An engine of a daemon at ``path``."""
    manager = KVManager(
        ModelConfig(**{**{"num_layers": LAYERS, "num_kv_heads": 2, "head_size": 64, "dtype": "float16"},
                       **(model or {})}),
        CacheConfig(tokens_per_block=TOKENS),
        gpu_register_port=str(port),
        transfer_config=TransferConfig(server_recv_port=str(path), server_launch_mode="external", **transfer),
    )
    manager.start()
    return manager


@contextmanager
def engine(path: Path, port: Path, **options: Any) -> Iterator[tuple[KVManager, KVTPClient, Tensors]]:
    """An engine of a daemon with one rank, ready."""
    manager, tensors = make_engine(path, port, **options), Tensors()
    client = KVTPClient(str(port), transfer_config=TransferConfig(server_recv_port=str(path)))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        manager.wait_ready(20.0)
        yield manager, client, tensors
    finally:
        manager.shutdown()
        client.close()


class DaemonPerManager:
    """In place of ``connect``: gives each manager a daemon of its own, in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()

    def connect(
        self, model: ModelConfig, cache: CacheConfig, transfer: TransferConfig, dp_client_id: int = 0,
        gpu_register_port: str = "", *, tiers: Sequence[TierKind] | None = None, note: str = "",
    ) -> Blocks:
        path = self._directory / f"server-{next(_numbers)}"
        daemon = Daemon(FlexKVConfig(cache=cache, transfer=transfer), str(path))
        thread = threading.Thread(target=daemon.run)
        thread.start()
        _running[path] = daemon
        self._stack.callback(self._end, path, thread)
        transfer = transfer.replace(server_recv_port=str(path), server_launch_mode="external")
        return connecting.connect(model, cache, transfer, dp_client_id, gpu_register_port, note=note)

    def _end(self, path: Path, thread: threading.Thread) -> None:
        _running.pop(path).stop()
        thread.join(30.0)
        assert not thread.is_alive()

    def close(self) -> None:
        self._stack.close()
