"""Two tiers below host memory: an SSD, here a dict, and a folder of files. Adding the second took its store alone."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.config import CacheConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.storage.ssd.tier import SSD
from flexkv.storage.store import Store, TierKind
from tests.support.folder_store import FolderStore
from tests.support.harness import TOKENS, controller_of, space_of, until
from tests.support.memory_store import Disk, MemoryStore
from tests.support.ssd_stage import HOST_SLOTS, SLOT_BYTES, Stage, stage


def folder_tier(folder: Path, num_slots: int) -> TierKind:
    def make(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> Store:
        return FolderStore(folder, num_slots, slot_bytes, memory)

    return TierKind(
        name="remote", label="remote folder", num_bytes=lambda config: num_slots * SLOT_BYTES, make_store=make,
        writes_all=lambda config: True, write_bytes_per_s=lambda config: 0.0,
    )


@contextmanager
def two_tiers(tmp_path: Path, ssd_slots: int = 64, disk: Disk | None = None, **settings: Any) -> Iterator[Stage]:
    folder = tmp_path / "remote"
    folder.mkdir(exist_ok=True)
    stores: list[MemoryStore] = []

    def make_memory_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        stores.append(MemoryStore(ssd_slots, slot_bytes, memory, disk))
        return stores[-1]

    ssd = replace(SSD, make_store=make_memory_store, num_bytes=lambda config: ssd_slots * SLOT_BYTES)
    with stage(tmp_path, tiers=[ssd, folder_tier(folder, 256)], **settings) as made:
        until(lambda: {"ssd_written_blocks", "remote_written_blocks"} <= made.manager.stats().keys())
        made.stores = stores
        yield made
        settle(made)
        made.manager.check_integrity()


def settle(made: Stage) -> None:
    made.settle()
    names = "remote_blocks_being_written", "remote_queued_blocks"
    until(lambda: all(made.manager.stats()[name] == 0 for name in names))


def flood(made: Stage, count: int = 2) -> None:
    for _ in range(count):
        settle(made)
        made.fresh += 1
        made.put(HOST_SLOTS - 2, made.fresh)
    settle(made)


def test_blocks_are_written_to_both_and_come_back_from_the_first(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as made:
        made.put(5, 1)
        settle(made)
        stats = made.manager.stats()
        assert stats["ssd_written_blocks"] == stats["remote_written_blocks"] == 5
        flood(made)
        reads = made.store.num_reads
        made.get(5, 1)
        assert made.store.num_reads == reads + 5


def test_blocks_that_left_the_first_lower_tier_come_from_the_second(tmp_path: Path) -> None:
    with two_tiers(tmp_path, ssd_slots=16) as made:
        made.put(5, 1)
        flood(made, 3)                                      # 42 more blocks: the SSD tier has none of the first left
        reads = made.store.num_reads
        made.get(5, 1)
        assert made.store.num_reads == reads


def test_one_load_reads_from_both(tmp_path: Path) -> None:
    """The end of a sequence is evicted from the first lower tier before its beginning."""
    with two_tiers(tmp_path, ssd_slots=16, eviction_policy="lru") as made:
        made.put(12, 1)
        flood(made, 1)
        reads = made.store.num_reads
        made.get(12, 1)
        assert 0 < made.store.num_reads - reads < 12


def test_what_is_on_the_second_alone_is_there_after_a_restart(tmp_path: Path) -> None:
    with two_tiers(tmp_path, ssd_slots=16) as made:
        made.put(5, 1)
        flood(made, 3)
        contents = made.contents
    with two_tiers(tmp_path, ssd_slots=16) as made:
        made.contents = contents
        assert made.ready(5, 1) == 5
        made.get(5, 1)


def test_the_second_serves_while_the_first_cannot_be_opened(tmp_path: Path) -> None:
    def no_store(*args: Any) -> MemoryStore:
        raise OSError(28, "No space left on device")

    (tmp_path / "remote").mkdir()
    with stage(tmp_path, tiers=[replace(SSD, make_store=no_store), folder_tier(tmp_path / "remote", 256)]) as made:
        until(lambda: "remote_written_blocks" in made.manager.stats())
        made.put(5, 1)
        for _ in range(3):
            until(lambda: made.manager.stats()["remote_queued_blocks"] == 0)
            until(lambda: made.manager.stats()["remote_blocks_being_written"] == 0)
            made.fresh += 1
            made.put(HOST_SLOTS - 2, made.fresh)
        until(lambda: made.manager.stats()["remote_queued_blocks"] == 0)
        until(lambda: made.manager.stats()["remote_blocks_being_written"] == 0)
        made.get(5, 1)


def test_the_second_serves_blocks_of_a_first_that_goes_offline(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as made:
        made.put(5, 1)
        flood(made)
        made.store.usable = lambda: False                   # type: ignore[method-assign]
        reads = made.store.num_reads
        assert made.ready(5, 1) == 5
        made.get(5, 1)
        assert made.store.num_reads == reads


def test_a_block_that_is_being_written_to_the_second_is_not_read_from_there(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as made:
        index = space_of(made.manager).index
        assert index is not None
        made.put(5, 1)
        flood(made)
        keys = made.keys(5, 1)
        slots = index._tree.slots(keys, 2)
        index._lower[1].checksums[slots[3]] = 0             # as while a write is under way
        made.store.usable = lambda: False                   # type: ignore[method-assign]
        assert made.ready(5, 1) == 3


def test_a_first_that_hangs_leaves_the_second_time_to_write_at_shutdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv.controller.lower_tier.DRAIN_S", 2.0)
    stores: list[MemoryStore] = []

    def make_memory_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        stores.append(MemoryStore(64, slot_bytes, memory))
        return stores[-1]

    folder = replace(folder_tier(tmp_path, 256), write_bytes_per_s=lambda config: SLOT_BYTES / 10.0)
    ssd = replace(SSD, make_store=make_memory_store, num_bytes=lambda config: 64 * SLOT_BYTES)
    with stage(tmp_path, tiers=[ssd, folder]) as made:
        until(lambda: {"ssd_written_blocks", "remote_written_blocks"} <= made.manager.stats().keys())
        stores[0].held = True
        made.put(12, 1)
        until(lambda: made.manager.stats()["remote_written_blocks"] == 4)      # then the rate limit requires a pause
        made.manager.shutdown()
    assert len(list(tmp_path.glob("*.kv"))) == 12


def test_a_block_written_during_a_reset_is_not_offered_by_a_second_tier_that_is_cleared_later(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as made:
        begun, go_on = threading.Event(), threading.Event()
        clear = made.store.clear

        def clear_slowly() -> None:
            begun.set()
            assert go_on.wait(20.0)
            clear()

        made.store.clear = clear_slowly                     # type: ignore[method-assign]
        reset = threading.Thread(target=made.manager.reset)
        reset.start()
        try:
            assert begun.wait(20.0)
            made.put(5, 1)
            time.sleep(0.5)                                 # time for a write to the second tier
        finally:
            go_on.set()
            reset.join()
        keys, index = made.keys(5, 1), space_of(made.manager).index
        assert index is not None
        settle(made)
        on_second = index.has_slot(2, keys)
        files = [(tmp_path / "remote" / f"{key.tobytes().hex()}.kv").exists() for key in keys]
        assert on_second.tolist() == files


def test_a_slow_promotion_from_which_blocks_arrive_is_not_abandoned(tmp_path: Path) -> None:
    with stage(tmp_path, ssd_deadline_s=1.0) as made:                 # abandoned after 2 s
        made.put(6, 1)
        made.flood()
        made.store.held = True
        task = made.start_get(6, 1)
        until(lambda: made.store.num_waiting == 6)
        for _ in range(5):
            time.sleep(0.8)
            made.store.release(1)
        stats = made.manager.stats()
        assert (stats["limbo_slots"], stats["blocks_being_fetched"]) == (0, 6)
        made.store.release()
        assert made.manager.wait(task)[task].status is Status.SUCCESS


@pytest.mark.parametrize("seed", range(4))
def test_random_puts_and_gets_return_the_bytes_that_were_put(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    with two_tiers(tmp_path, ssd_slots=24, eviction_policy=["lru", "adaptive"][seed % 2]) as made:
        lengths: dict[int, int] = {}
        for _ in range(60):
            number = int(random.integers(0, 12))
            settle(made)                                    # a write-back holds host slots that a load may need
            if number not in lengths:
                lengths[number] = int(random.integers(1, HOST_SLOTS - 2))
                made.put(lengths[number], number)
            elif made.ready(lengths[number], number) == lengths[number]:
                made.get(lengths[number], number)
            else:
                made.put(lengths[number], number)
            if random.random() < 0.05:
                made.manager.reset()
                lengths.clear()


# ---- checksums ------------------------------------------------------------------------------------------------------


@contextmanager
def altered_block(tmp_path: Path) -> Iterator[Stage]:
    """Three blocks, of which the second has changed in host memory. The first lower tier computed the checksum; the
    second, which opens later, finds other bytes."""
    go_on = threading.Event()
    folder = folder_tier(tmp_path, 256)

    def make_late(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> Store:
        assert go_on.wait(20.0)
        return folder.make_store(config, slot_bytes, domain, memory)

    def make_memory_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        return MemoryStore(64, slot_bytes, memory)

    tiers = [
        replace(SSD, make_store=make_memory_store, num_bytes=lambda config: 64 * SLOT_BYTES),
        replace(folder, make_store=make_late),
    ]
    try:
        with stage(tmp_path, tiers=tiers) as made:
            until(lambda: "ssd_written_blocks" in made.manager.stats())
            made.put(3, 1)
            until(lambda: made.manager.stats()["ssd_written_blocks"] == 3)
            index = space_of(made.manager).index
            assert index is not None
            slot = int(index._tree.slots(made.keys(3, 1), 0)[1])
            pool = controller_of(made.manager)._cache.listener.host_pool
            assert pool is not None
            memoryview(pool.memory).cast("B")[slot * SLOT_BYTES + 100] ^= 1        # type: ignore[arg-type]
            go_on.set()
            until(lambda: made.manager.stats().get("altered_blocks") == 1)
            yield made
            made.manager.check_integrity()
    finally:
        go_on.set()


def test_bytes_that_changed_in_host_memory_do_not_reach_another_tier(tmp_path: Path) -> None:
    with altered_block(tmp_path) as made:
        index, keys = space_of(made.manager).index, made.keys(3, 1)
        assert index is not None
        assert made.manager.stats()["limbo_slots"] == 1              # the slot is not used again
        assert index._tree.slots(keys, 0)[1] == -1
        settle(made)
        until(lambda: made.manager.stats()["remote_limbo_slots"] == 0)
        made.get(3, 1)                                                # from the SSD, with the right bytes


def test_bytes_that_changed_in_host_memory_are_not_offered_after_a_restart(tmp_path: Path) -> None:
    """The second tier has written them before their checksum was compared."""
    with altered_block(tmp_path):
        pass
    with stage(tmp_path, tiers=[folder_tier(tmp_path, 256)]) as made:
        until(lambda: "remote_written_blocks" in made.manager.stats())
        assert made.ready(3, 1) == 1


@pytest.mark.parametrize("restart", [False, True])
def test_a_block_that_is_not_the_one_that_was_written_is_a_miss(tmp_path: Path, restart: bool) -> None:
    """The store holds other bytes under the same key, and believes them."""
    disk, copy = Disk(), Disk()
    with stage(tmp_path, disk) as made:
        made.put(3, 1)
        made.flood()
        copy.records.update(disk.records)
        if not restart:
            replace_one(made, disk)
            check_miss(made)
    if restart:                                 # the index takes the checksums from the store when it finds the blocks
        with stage(tmp_path, copy) as made:
            replace_one(made, copy)
            check_miss(made)


def replace_one(made: Stage, disk: Disk, num_blocks: int = 3) -> None:
    key = made.keys(num_blocks, 1)[1].tobytes()
    slot = next(slot for slot, record in disk.records.items() if record.key == key)
    record = disk.records[slot]
    disk.records[slot] = replace(record, content=bytes([record.content[0] ^ 1]) + record.content[1:])


def check_miss(made: Stage) -> None:
    task = made.start_get(3, 1)
    response = made.manager.wait(task)[task]
    assert response.status is Status.FAILED
    assert response.return_mask is None or not response.return_mask[TOKENS : 2 * TOKENS].any()
    made.settle()
    assert made.ready(3, 1) == 1
    assert made.manager.stats()["ssd_altered_blocks"] == 1


def test_a_get_that_ends_before_the_promotion_does_not_deliver_another_block(tmp_path: Path) -> None:
    disk = Disk()
    with stage(tmp_path, disk) as made:
        made.put(4, 1)
        made.flood()
        replace_one(made, disk, 4)
        made.store.held = True
        first = made.start_get(4, 1, 40)
        until(lambda: made.store.num_waiting == 4)
        made.store.release(3)                                         # the last block of the promotion is not read yet
        keys, pages = made.keys(4, 1)[:3], np.arange(32, 35, dtype=np.int32)
        second = made.manager.blocks.get_blocks(keys, 0, pages)
        response = made.manager.wait(second)[second]
        made.store.release()
        assert response.status is Status.FAILED
        assert response.return_mask is None or not response.return_mask[TOKENS : 2 * TOKENS].any()
        assert made.manager.wait(first)[first].status is Status.FAILED
        made.settle()
        stats = made.manager.stats()
        assert stats["ssd_altered_blocks"] == 1
        assert stats["stale_results"] == 0
