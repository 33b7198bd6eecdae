"""A KVManager whose SSD is a dict, with a rank in this process, for tests of what goes between the tiers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.tp_client import KVTPClient
from flexkv.storage.ssd.tier import SSD
from flexkv.storage.store import MakeStore, TierKind
from tests.support.harness import LAYERS, TOKENS, Tensors, controller_of, until, wait_ready
from tests.support.memory_store import Disk, MemoryStore

SLOT_BYTES = 8192
HOST_SLOTS = 16
SSD_SLOTS = 64


@dataclass
class Stage:
    """A manager whose SSD is a dict, with a rank in this process."""

    manager: KVManager
    client: KVTPClient
    tensors: Tensors
    stores: list[MemoryStore]
    fresh: int = 1000
    contents: dict[int, bytes] = field(default_factory=dict)

    @property
    def store(self) -> MemoryStore:
        return self.stores[0]

    def keys(self, num_blocks: int, seed: int) -> NDArray[np.uint64]:
        tokens = np.random.default_rng(seed).integers(0, 50_000, num_blocks * TOKENS)
        hasher = self.manager.blocks.hasher()
        hasher.extend(tokens)
        return hasher.keys

    def put(self, num_blocks: int, seed: int) -> None:
        pages = np.arange(num_blocks, dtype=np.int32)
        self.tensors.fill(pages, seed)
        self.contents[seed] = self.tensors.read(pages)
        task = self.manager.blocks.put_blocks(self.keys(num_blocks, seed), 0, pages)
        if task is not None:
            assert self.manager.wait(task, completely=True)[task].status is Status.SUCCESS

    def start_get(self, num_blocks: int, seed: int, first_page: int = 32) -> int:
        pages = np.arange(first_page, first_page + num_blocks, dtype=np.int32)
        return self.manager.blocks.get_blocks(self.keys(num_blocks, seed), 0, pages)

    def get(self, num_blocks: int, seed: int) -> None:
        """Load, and compare the bytes."""
        self.tensors.zero()
        task = self.start_get(num_blocks, seed)
        assert self.manager.wait(task)[task].status is Status.SUCCESS
        assert self.tensors.read(range(32, 32 + num_blocks)) == self.contents[seed]

    def settle(self) -> None:
        """Nothing is read from or written to SSD any more."""
        until(lambda: all(
            self.manager.stats()[name] == 0
            for name in ("blocks_being_fetched", "ssd_blocks_being_written", "ssd_queued_blocks")
        ))

    def flood(self) -> None:
        """Push everything out of host memory."""
        self.settle()
        for _ in range(2):
            self.fresh += 1
            self.put(HOST_SLOTS - 2, self.fresh)
            self.settle()

    def ready(self, num_blocks: int, seed: int) -> int:
        return self.manager.blocks.lookup(self.keys(num_blocks, seed)).num_ready


@contextmanager
def stage(
    tmp_path: Path, disk: Disk | None = None, make_store: MakeStore | None = None,
    transfer_config: TransferConfig | None = None, tiers: list[TierKind] | None = None, **settings: Any,
) -> Iterator[Stage]:
    stores: list[MemoryStore] = []

    def make_memory_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        assert slot_bytes == SLOT_BYTES
        stores.append(MemoryStore(config.ssd_bytes // slot_bytes, slot_bytes, memory, disk))
        return stores[-1]

    settings = {"ssd_admission": "all", **settings}
    manager = KVManager(
        ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16"),
        CacheConfig(
            tokens_per_block=TOKENS, num_cpu_blocks=HOST_SLOTS, ssd_cache_gb=SSD_SLOTS * SLOT_BYTES / (1 << 30),
            **settings,
        ),
        gpu_register_port=str(tmp_path / "s"),
        transfer_config=transfer_config or TransferConfig(),
        tiers=tiers or [replace(SSD, make_store=make_store or make_memory_store)],
    )
    manager.start()
    tensors = Tensors()
    client = KVTPClient(str(tmp_path / "s"), transfer_config=TransferConfig())
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        wait_ready(manager, HOST_SLOTS)
        if make_store is None and tiers is None:
            until(lambda: "ssd_written_blocks" in manager.stats())
        made = Stage(manager, client, tensors, stores)
        yield made
        if manager.is_ready() and stores:
            check_nothing_is_lost(made)
    finally:
        manager.shutdown()
        client.close()


def check_nothing_is_lost(made: Stage) -> None:
    until(lambda: not controller_of(made.manager).tasks.unsettled())
    made.settle()
    made.manager.check_integrity()
    made.manager.reset()
    made.manager.check_integrity()
    stats = made.manager.stats()
    assert stats["free_slots"] == stats["num_slots"] == HOST_SLOTS
    assert stats["ssd_free_slots"] == stats["ssd_slots"] == SSD_SLOTS
