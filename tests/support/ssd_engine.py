"""An engine with a real SSD tier. The content of its blocks follows from their key, so that every load is checked."""

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.config import CacheConfig, ModelConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.tp_client import KVTPClient
from flexkv.storage.ssd.tier import SSD
from tests.support.harness import LAYERS, TOKENS, Tensors, until, wait_ready

SHARED = 3
"""Four sequences have so many leading blocks in common."""

MAX_BLOCKS = 24


def page_shape_of(slot_bytes: int) -> tuple[int, ...]:
    """Of pages that fill a slot."""
    return (2, TOKENS, 2, slot_bytes // LAYERS // (2 * TOKENS * 2 * 2))


def length_of(seed: int) -> int:
    """Blocks of a sequence."""
    return SHARED + 1 + seed * 7919 % (MAX_BLOCKS - SHARED)


class Engine:
    """A manager and a rank in this process.

    Parameters
    ----------
    place : Path
        For the socket and, unless the settings say otherwise, two directories of the SSD tier.
    ssd_bytes : int
    slot_bytes : int
    host_slots : int
    device : int, optional
        Of the fake driver, whose memory is the host's.
    settings
        For ``CacheConfig``; ``make_store`` for its SSD tier.
    """

    def __init__(
        self, place: Path, ssd_bytes: int, slot_bytes: int = 4096, host_slots: int = 256, make_store: Any = None,
        device: int | None = None, **settings: Any,
    ) -> None:
        settings = {
            "ssd_admission": "all", "ssd_cache_gb": ssd_bytes / (1 << 30),
            "ssd_cache_dir": f"{place / 'a'};{place / 'b'}", **settings,
        }
        self.host_slots = host_slots
        self.manager = KVManager(
            ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16"),
            CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=host_slots, **settings),
            gpu_register_port=str(place / "s"), tiers=[replace(SSD, make_store=make_store)] if make_store else None,
        )
        self.manager.start()
        tensors = Tensors(2 * MAX_BLOCKS, page_shape_of(slot_bytes), device)
        self._pages = [array.reshape(2 * MAX_BLOCKS, -1).view(np.uint64) for array in tensors.layers]
        self._base = [np.random.default_rng(i).integers(0, 1 << 64, pages.shape[1], dtype=np.uint64)
                      for i, pages in enumerate(self._pages)]
        self._tensors = tensors
        self.client = KVTPClient(str(place / "s"))
        self._host_slots = host_slots
        self.register()

    def register(self) -> None:
        """Register the tensors, also after ``client.suspend``, and wait until the rank has pinned the host slots."""
        self.client.register_tensors(self._tensors.specs(), 10.0, keep_alive=self._tensors)
        wait_ready(self.manager, self._host_slots)

    def __enter__(self) -> "Engine":
        self.wait_warm()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self.settle_reads()
                self.manager.check_integrity()
        finally:
            self.close()

    def close(self) -> None:
        self.manager.shutdown()
        self.client.close()

    def wait_warm(self, timeout_s: float = 300.0) -> None:
        """The SSD tier is open, with the recovered blocks."""
        until(lambda: "ssd_written_blocks" in self.manager.stats(), timeout_s)

    def settle(self, timeout_s: float = 60.0) -> None:
        """Nothing is queued to be written."""
        until(lambda: self.stat("ssd_queued_blocks") + self.stat("ssd_blocks_being_written") == 0, timeout_s)

    def wait_until_usable(self) -> None:
        """All directories are in service."""
        until(lambda: self.stat("ssd_store_directories_usable") == self.stat("ssd_store_directories"), 20.0)

    def settle_reads(self) -> None:
        until(lambda: self.manager.stats().get("blocks_being_fetched", 0) == 0, 60.0)

    def stat(self, name: str) -> int:
        return self.manager.stats()[name]

    @property
    def on_ssd(self) -> int:
        """Blocks that the index has on SSD."""
        return self.stat("ssd_slots") - self.stat("ssd_free_slots")

    def keys(self, seed: int) -> NDArray[np.uint64]:
        tokens = [np.random.default_rng([number, seed // (4 if number == 0 else 1)]).integers(0, 50_000, count * TOKENS)
                  for number, count in enumerate((SHARED, length_of(seed) - SHARED))]
        hasher = self.manager.blocks.hasher()
        hasher.extend(np.concatenate(tokens))
        return hasher.keys

    def put(self, seed: int, num_blocks: int | None = None) -> None:
        """Save the first blocks of a sequence, or all."""
        keys = self.keys(seed)[:num_blocks]
        self.fill(keys)
        task = self.manager.blocks.put_blocks(keys, 0, np.arange(len(keys), dtype=np.int32))
        if task is not None:
            assert self.manager.wait(task, completely=True)[task].status is Status.SUCCESS

    def load(self, seed: int, num_blocks: int, must: bool = True) -> bool:
        """Load the first blocks of a sequence: they have the right bytes, or (unless ``must``) the load failed."""
        keys = self.keys(seed)[:num_blocks]
        pages = np.arange(MAX_BLOCKS, MAX_BLOCKS + len(keys), dtype=np.int32)
        for array in self._pages:
            array[pages] = 0
        task = self.manager.blocks.get_blocks(keys, 0, pages)
        good = self.manager.wait(task, timeout=60.0, completely=True)[task].status is Status.SUCCESS
        assert good or not must, (f"sequence {seed}: {num_blocks} blocks cannot be loaded; "
                                  f"{self.manager.blocks.lookup(keys)}, {self.manager.stats()}")
        for array, base in zip(self._pages, self._base, strict=True):
            assert not good or (array[pages] == base ^ _mixed(keys)).all(), f"wrong KV in sequence {seed}"
        return good

    def read(self, pages: NDArray[np.int32]) -> bytes:
        """The bytes of these pages."""
        return self._tensors.read(pages)

    def offered(self, seed: int) -> int:
        """How many leading blocks of a sequence can be had."""
        return int(self.manager.blocks.lookup(self.keys(seed)).num_ready)

    def load_all(self, seeds: range) -> set[bytes]:
        """Load everything that is offered of these sequences; returns the keys."""
        offered = {seed: self.offered(seed) for seed in seeds}
        loaded: set[bytes] = set()
        for seed, count in offered.items():
            if count:
                self.load(seed, count)
                loaded.update(key.tobytes() for key in self.keys(seed)[:count])
        return loaded

    def fill(self, keys: NDArray[np.uint64]) -> None:
        """Pages 0 and up hold the blocks of these keys."""
        for array, base in zip(self._pages, self._base, strict=True):
            array[: len(keys)] = base ^ _mixed(keys)


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(n, 1) words that no two keys share."""
    return (keys[:, 0] + keys[:, 1] * np.uint64(0x9E3779B97F4A7C15))[:, None]
