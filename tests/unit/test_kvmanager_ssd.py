"""KVManager with an SSD tier: what leaves host memory comes back, with bytes compared; stores that fail or are slow."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.reasons import StopReason
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.kvmanager import KVManager
from flexkv.response import KVResponseStatus as Status
from flexkv.server.client import KVTPClient
from flexkv.transfer.ssd import MakeStore
from tests.harness import LAYERS, TOKENS, Tensors, until, wait_ready
from tests.memory_store import Disk, MemoryStore

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
        hasher = self.manager.hasher()
        hasher.extend(tokens)
        return hasher.keys

    def put(self, num_blocks: int, seed: int) -> None:
        pages = np.arange(num_blocks, dtype=np.int32)
        self.tensors.fill(pages, seed)
        self.contents[seed] = self.tensors.read(pages)
        task = self.manager.put_blocks(self.keys(num_blocks, seed), 0, pages)
        if task is not None:
            assert self.manager.wait(task, completely=True)[task].status is Status.SUCCESS

    def start_get(self, num_blocks: int, seed: int, first_page: int = 32) -> int:
        pages = np.arange(first_page, first_page + num_blocks, dtype=np.int32)
        return self.manager.get_blocks(self.keys(num_blocks, seed), 0, pages)

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
        return self.manager.lookup(self.keys(num_blocks, seed)).num_ready


@contextmanager
def stage(
    tmp_path: Path, disk: Disk | None = None, make_store: MakeStore | None = None, **settings: Any
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
        transfer_config=TransferConfig(),
        make_store=make_store or make_memory_store,
    )
    manager.start()
    tensors = Tensors()
    client = KVTPClient(str(tmp_path / "s"), transfer_config=TransferConfig())
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        wait_ready(manager, HOST_SLOTS)
        if make_store is None:
            until(lambda: "ssd_written_blocks" in manager.stats())
        made = Stage(manager, client, tensors, stores)
        yield made
        if manager.is_ready() and stores:
            check_nothing_is_lost(made)
    finally:
        manager.shutdown()
        client.close()


def check_nothing_is_lost(made: Stage) -> None:
    until(lambda: not made.manager._tasks.unsettled())
    made.settle()
    made.manager.check_integrity()
    made.manager.reset()
    made.manager.check_integrity()
    stats = made.manager.stats()
    assert stats["free_slots"] == stats["num_slots"] == HOST_SLOTS
    assert stats["ssd_free_slots"] == stats["ssd_slots"] == SSD_SLOTS


def test_what_left_host_memory_comes_back_from_ssd(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(6, 1)
        made.flood()
        found = made.manager.lookup(made.keys(6, 1))
        assert (found.num_ready, found.num_to_fetch) == (6, 6)
        made.get(6, 1)
        assert made.store.num_reads == 6
        made.settle()
        assert made.manager.lookup(made.keys(6, 1)).num_to_fetch == 0
        made.get(6, 1)
        assert made.store.num_reads == 6


def test_what_is_on_ssd_is_there_after_a_restart(tmp_path: Path) -> None:
    disk = Disk()
    with stage(tmp_path, disk) as made:
        made.put(6, 1)
        made.put(3, 2)
        contents = made.contents
        made.manager.shutdown()                             # what is queued is written first
        assert len(disk.records) == 9
    with stage(tmp_path, disk) as made:
        made.contents = contents
        assert made.ready(6, 1) == 6
        made.manager.check_integrity()
        made.get(6, 1)
        made.get(3, 2)
        assert made.ready(7, 1) == 6
        assert made.manager.lookup(made.keys(7, 1)).reason is StopReason.NEVER_SEEN


def test_gets_of_the_same_blocks_share_one_read(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.held = True
        first = made.start_get(5, 1, 32)
        second = made.start_get(4, 1, 40)
        assert made.store.num_waiting == 5
        made.store.let_go()
        results = made.manager.wait([first, second])
        assert {result.status for result in results.values()} == {Status.SUCCESS}
        assert set(made.store.reads_of.values()) == {1}
        assert made.tensors.read(range(32, 37)) == made.contents[1]
        assert made.contents[1].startswith(made.tensors.read(range(40, 44)))


def test_a_read_that_fails_takes_only_the_blocks_behind_it_along(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        bad = made.keys(5, 1)[2].tobytes()
        made.store.broken = {slot for slot, record in made.store.disk.records.items() if record.key == bad}
        task = made.start_get(5, 1)
        assert made.manager.wait(task)[task].status is Status.FAILED
        made.settle()
        found = made.manager.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (2, StopReason.FAILED)
        made.manager.check_integrity()
        made.store.broken.clear()
        made.put(5, 1)                                      # the hole is filled
        made.get(5, 1)
        assert made.store.num_reads == 5


def test_blocks_in_host_memory_do_not_wait_for_ssd(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(6, 1)
        made.flood()
        task = made.start_get(2, 1)                         # the first two are in host memory again
        made.manager.wait(task)
        made.settle()
        slow = made.manager.lookup(made.keys(6, 1)).num_to_fetch
        assert slow == 4
        made.store.held = True
        made.tensors.zero()
        task = made.start_get(6, 1)
        graph = made.manager._tasks._tasks[task].graph
        assert graph is not None
        op = graph.ops[0]
        until(lambda: int(op.resolved.sum()) == 6 - slow)
        assert made.store.num_waiting == slow
        made.store.let_go()
        assert made.manager.wait(task)[task].status is Status.SUCCESS
        assert made.tensors.read(range(32, 38)) == made.contents[1]


def test_a_fetch_goes_on_when_its_get_is_cancelled(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.held = True
        task = made.start_get(5, 1)
        made.manager.cancel(task)
        assert made.manager.wait(task, completely=True)[task].status is Status.CANCELLED
        assert made.manager.stats()["blocks_being_fetched"] == 5
        made.manager.check_integrity()
        made.store.let_go()
        made.settle()
        assert made.manager.lookup(made.keys(5, 1)).num_to_fetch == 0
        made.get(5, 1)
        assert made.store.num_reads == 5


def test_a_prefetch_ends_when_the_blocks_are_in_host_memory(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        tokens = np.random.default_rng(1).integers(0, 50_000, 5 * TOKENS)
        made.put(5, 1)
        made.flood()
        made.store.held = True
        task = made.manager.prefetch_async(tokens)
        assert made.manager.try_wait(task) == {}
        made.store.let_go()
        response = made.manager.wait(task)[task]
        assert response.status is Status.SUCCESS
        assert response.return_mask is not None
        assert response.return_mask.all()
        assert made.manager.lookup(made.keys(5, 1)).num_to_fetch == 0


def test_a_full_host_gives_misses_and_no_failures(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        tokens = np.random.default_rng(1).integers(0, 50_000, 10 * TOKENS)
        made.put(10, 1)
        made.flood()
        other = np.random.default_rng(made.fresh).integers(0, 50_000, (HOST_SLOTS - 2) * TOKENS)
        task, mask = made.manager.get_match(other)          # pins them
        assert mask.all()
        held, mask = made.manager.get_match(tokens)
        assert mask.sum() == 2 * TOKENS
        made.manager.cancel([task, held])


def test_nothing_of_before_a_reset_comes_back(tmp_path: Path) -> None:
    disk = Disk()
    with stage(tmp_path, disk) as made:
        made.put(5, 1)
        made.settle()
        made.store.held = True
        made.put(4, 2)                                      # its write is under way at the reset
        until(lambda: made.store.num_waiting == 4)
        made.manager.reset()
        made.store.let_go()
        made.settle()
        assert made.ready(5, 1) == made.ready(4, 2) == 0
        made.manager.check_integrity()
        assert not disk.records


def test_a_tier_that_is_out_of_service_is_a_miss(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.is_usable = False
        found = made.manager.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (0, StopReason.OUT_OF_SERVICE)
        made.put(5, 1)
        made.get(5, 1)
        assert made.store.num_reads == 0
        made.store.is_usable = True
        made.manager.check_integrity()


def test_a_disk_that_is_out_of_service_ends_the_match_and_its_blocks_can_be_put_again(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        third = made.keys(5, 1)[2].tobytes()
        made.store.out = {slot for slot, record in made.store.disk.records.items() if record.key == third}
        found = made.manager.lookup(made.keys(5, 1))
        assert (found.num_ready, found.num_to_fetch, found.reason) == (2, 2, StopReason.OUT_OF_SERVICE)
        made.put(5, 1)
        made.get(5, 1)
        assert made.store.reads_of.get(third, 0) == 0
        made.store.out = set()
        made.manager.check_integrity()


def test_what_is_sooner_computed_is_not_offered(tmp_path: Path) -> None:
    with stage(tmp_path, load_policy="never") as made:
        made.put(5, 1)
        made.flood()
        found = made.manager.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (0, StopReason.TOO_SLOW)


def test_a_sequence_that_is_used_again_is_written(tmp_path: Path) -> None:
    with stage(tmp_path, ssd_admission="second_touch") as made:
        made.put(4, 1)
        made.put(4, 2)
        made.get(4, 2)                                      # loaded
        made.settle()
        assert made.store.num_writes == 4
        made.put(6, 1)                                      # goes on from an earlier one
        made.settle()
        assert made.store.num_writes == 10


def test_without_a_store_all_works_as_before(tmp_path: Path) -> None:
    def no_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        raise OSError(28, "No space left on device")

    with stage(tmp_path, make_store=no_store) as made:
        made.put(4, 1)
        made.get(4, 1)
