"""The SSD tier's way into and out of service: resets at bad moments, stores that open late, fail, or lose results."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexkv.cache.plan import Move
from flexkv.cache.reasons import MissReason
from flexkv.config import CacheConfig
from flexkv.controller import tiering
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import StorageError
from flexkv.storage.recovered import Recovered
from tests.support.harness import controller_of, space_of, until
from tests.support.memory_store import Disk, MemoryStore
from tests.support.ssd_stage import SLOT_BYTES, Stage, stage


def written(tmp_path: Path) -> Disk:
    """A disk with five blocks of sequence 1."""
    disk, copy = Disk(), Disk()
    with stage(tmp_path, disk) as made:
        made.put(5, 1)
        made.settle()
        copy.records.update(disk.records)
    return copy


@contextmanager
def stage_that_was_reset(tmp_path: Path, disk: Disk) -> Iterator[Stage]:
    """The reset came before any rank had registered, when there was neither an index nor a store."""
    init = tiering.Tiering.__init__

    def init_and_reset(self: tiering.Tiering, *args: Any) -> None:
        init(self, *args)
        self.reset()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiering.Tiering, "__init__", init_and_reset)
        with stage(tmp_path, disk) as made:
            yield made


def test_a_write_that_is_planned_before_a_reset_is_forgotten_by_it(tmp_path: Path) -> None:
    disk = Disk()
    with stage(tmp_path, disk) as made:
        writer = space_of(made.manager).tiering._tiers[0]._writer    # type: ignore[union-attr]
        assert writer is not None
        plan_of, resets = writer.next, list[threading.Thread]()

        def next_and_reset(flush: bool = False) -> Move | None:
            plan = plan_of(flush)
            if plan is not None and not resets:
                reset = threading.Thread(target=made.manager.reset)
                reset.start()
                resets.append(reset)
                reset.join(0.5)                             # it waits until the write is known
            return plan

        writer.next = next_and_reset                        # type: ignore[method-assign]
        made.put(5, 1)
        until(lambda: bool(resets))
        resets[0].join()
        made.settle()
        assert made.ready(5, 1) == 0
        assert not disk.records


@pytest.mark.parametrize("at", ["recover", "register"])
def test_nothing_of_before_a_reset_is_there_if_the_store_opens_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    disk = written(tmp_path)
    managers: list[tiering.GlobalCacheEngine | tiering.Tiering] = []
    grow = tiering.Tiering.grow

    def remember(self: tiering.Tiering, cache: tiering.GlobalCacheEngine, *rest: Any) -> None:
        managers.extend([cache, self])
        grow(self, cache, *rest)

    def reset() -> None:
        while managers:
            managers.pop(0).reset()                         # as the manager does it

    class ResetStore(MemoryStore):
        def recover(self) -> Recovered:
            found = super().recover()
            if at == "recover":
                reset()
            return found

        def register(self, upto_bytes: int) -> None:
            if at == "register":
                reset()

    monkeypatch.setattr(tiering.Tiering, "grow", remember)
    monkeypatch.setattr("tests.support.ssd_stage.MemoryStore", ResetStore)
    with stage(tmp_path, disk) as made:
        assert made.ready(5, 1) == 0
        assert not disk.records
        made.manager.check_integrity()
        made.put(5, 1)
        made.flood()
        made.get(5, 1)


def test_a_reset_that_came_before_the_store_holds(tmp_path: Path) -> None:
    disk = written(tmp_path)
    with stage_that_was_reset(tmp_path, disk) as made:
        assert made.ready(5, 1) == 0
        assert not disk.records


def test_disks_that_cannot_be_cleared_are_out_of_service_until_they_can(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.settle()
        made.store.clear_fails = True
        made.manager.reset()
        made.put(5, 2)
        made.settle()
        assert made.store.num_writes == 5                   # those of before
        assert made.manager.stats()["ssd_dropped_writes"] == 5
        made.store.clear_fails = False
        made.manager.reset()
        assert not made.store.disk.records
        made.put(5, 2)
        made.flood()
        made.get(5, 2)


def test_what_cannot_be_cleared_at_the_start_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = written(tmp_path)
    monkeypatch.setattr(MemoryStore, "clear_fails", True)
    with stage_that_was_reset(tmp_path, disk) as made:
        found = made.manager.blocks.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (0, MissReason.NEVER_SEEN)
        made.put(5, 2)
        made.settle()
        assert made.store.num_writes == 0
        made.manager.check_integrity()
        made.store.clear_fails = False
        made.manager.reset()
        assert not disk.records


def test_a_shutdown_does_not_wait_for_ever_for_a_store_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flexkv.controller.lower_tier.DRAIN_S", 0.1)
    go_on, opened = threading.Event(), list[MemoryStore]()

    def make_late(config: CacheConfig, slot_bytes: int, domain: bytes, memory: Any) -> MemoryStore:
        go_on.wait()
        memory[:SLOT_BYTES] = b"\x01" * SLOT_BYTES          # it is still mapped
        opened.append(MemoryStore(config.ssd_bytes // slot_bytes, slot_bytes, memory))
        return opened[0]

    with stage(tmp_path, make_store=make_late) as made:
        thread = space_of(made.manager).tiering._tiers[0]._thread    # type: ignore[union-attr]
        assert thread is not None
        made.put(4, 1)
        made.get(4, 1)
    assert "has not opened" in caplog.text
    go_on.set()
    thread.join(10.0)
    assert opened[0].closed
    assert not thread.is_alive()


@contextmanager
def stage_whose_store_waits(tmp_path: Path, **settings: Any) -> Iterator[tuple[Stage, threading.Event]]:
    """The store opens when the event is set."""
    go_on, stores = threading.Event(), list[MemoryStore]()

    def make_late(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        assert go_on.wait(20.0)
        stores.append(MemoryStore(config.ssd_bytes // slot_bytes, slot_bytes, memory))
        return stores[0]

    try:
        with stage(tmp_path, make_store=make_late, **settings) as made:
            made.stores = stores
            yield made, go_on
    finally:
        go_on.set()


@pytest.mark.parametrize("admission", ["all", "second_touch"])
def test_all_that_was_put_before_the_store_is_open_is_written_to_it(tmp_path: Path, admission: str) -> None:
    with stage_whose_store_waits(tmp_path, ssd_admission=admission) as (made, go_on):
        made.put(3, 1)
        made.put(7, 1)                                      # goes on from the first
        for seed in range(2, 6):
            made.put(2, seed)                               # 15 of 16 host slots: more than the queue takes at a time
        assert made.manager.stats()["ssd_store_directories_usable"] == 0
        go_on.set()
        until(lambda: len(made.stores) == 1 and len(made.store.disk.records) == 15)
        made.settle()
        assert made.manager.stats()["ssd_dropped_writes"] == 0
        made.flood()
        for seed, count in ((1, 7), (2, 2), (5, 2)):
            made.get(count, seed)


@pytest.mark.parametrize("opened_after", range(0, 14, 2))
def test_puts_that_end_while_the_store_opens_are_written_too(tmp_path: Path, opened_after: int) -> None:
    with stage_whose_store_waits(tmp_path) as (made, go_on):
        for seed in range(14):
            if seed == opened_after:
                go_on.set()
            made.put(1, seed)
        until(lambda: len(made.stores) == 1 and len(made.store.disk.records) == 14)
        made.settle()
        made.flood()
        for seed in range(14):
            made.get(1, seed)


def test_what_was_evicted_before_the_store_is_open_is_not_written(tmp_path: Path) -> None:
    with stage_whose_store_waits(tmp_path) as (made, go_on):
        for seed in range(1, 5):
            made.put(8, seed)
        go_on.set()
        until(lambda: "ssd_written_blocks" in made.manager.stats())
        made.settle()
        assert made.ready(8, 4) == 8
        assert len(made.store.disk.records) <= 16
        made.flood()
        made.get(8, 4)


def test_nothing_of_before_a_reset_is_written_when_the_store_opens_after_it(tmp_path: Path) -> None:
    with stage_whose_store_waits(tmp_path) as (made, go_on):
        made.put(5, 1)
        made.get(5, 1)
        made.manager.reset()
        made.put(3, 2)
        go_on.set()
        until(lambda: "ssd_written_blocks" in made.manager.stats())
        made.settle()
        assert made.store.num_writes == 3


def test_a_shutdown_writes_what_was_put_before_the_store_was_open(tmp_path: Path) -> None:
    with stage_whose_store_waits(tmp_path) as (made, go_on):
        for seed in range(1, 4):
            made.put(5, seed)
        go_on.set()
    assert len(made.store.disk.records) == 15


@pytest.mark.parametrize("num_blocks", range(1, 9))
def test_a_shutdown_ends_with_the_last_write(tmp_path: Path, num_blocks: int) -> None:
    """Also if the queue is found empty later: a write of as many blocks as there is room for may not be the last one of
    its sequence."""
    with stage(tmp_path, ssd_write_mb_per_s=0.001) as made:
        made.put(1, 1)
        until(lambda: len(made.store.disk.records) == 1)
        made.put(num_blocks, 2)                             # waits for the rate, until the shutdown
        assert made.manager.stats()["ssd_queued_blocks"] == num_blocks
        before = time.monotonic()
        made.manager.shutdown()
        assert time.monotonic() - before < 5.0
        assert len(made.store.disk.records) == 1 + num_blocks


def test_a_shutdown_does_not_wait_for_blocks_that_have_gone(tmp_path: Path) -> None:
    with stage(tmp_path, ssd_write_mb_per_s=0.001) as made:
        made.put(1, 1)
        until(lambda: len(made.store.disk.records) == 1)
        made.put(5, 2)
        assert made.manager.stats()["ssd_queued_blocks"] == 5
        assert space_of(made.manager).index is not None
        space_of(made.manager).index.reset()                         # the index alone: the queue has them yet
        before = time.monotonic()
        made.manager.shutdown()
        assert time.monotonic() - before < 5.0
        assert len(made.store.disk.records) == 1


def test_out_of_service_what_is_queued_is_not_written_again_and_again(tmp_path: Path) -> None:
    with stage(tmp_path, ssd_write_mb_per_s=0.001) as made:
        made.put(1, 1)
        until(lambda: len(made.store.disk.records) == 1)
        made.put(5, 2)
        controller_of(made.manager)._cache.transfer._take_out_of_service()
        tiering, used = space_of(made.manager).tiering, next(controller_of(made.manager)._cache.transfer.task_ids)
        assert tiering is not None
        tiering._tiers[0]._flush = True                     # no limit of the rate
        asked = threading.Event()
        run_background_work = tiering.run_background_work

        def keep() -> float:
            pause = run_background_work()
            asked.set()
            return pause

        tiering.run_background_work = keep                  # type: ignore[method-assign]
        controller_of(made.manager)._cache.transfer.wake()
        assert asked.wait(5.0)
        assert next(controller_of(made.manager)._cache.transfer.task_ids) - used < 10
        before = time.monotonic()
        made.manager.shutdown()
        assert time.monotonic() - before < 5.0


def test_a_shutdown_says_how_many_blocks_a_hanging_disk_has_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flexkv.controller.lower_tier.DRAIN_S", 0.2)
    with stage(tmp_path) as made:
        made.store.held = True
        made.put(5, 1)
        made.put(3, 2)
        before = time.monotonic()
        made.manager.shutdown()
        made.manager.shutdown()
        assert time.monotonic() - before < 4.0              # refused writes are not planned again and again
        assert caplog.text.count("not all was written to SSD within 0.2 s: 8 blocks are not there") == 1


def test_a_store_that_cannot_be_opened_is_counted_as_out_of_service(tmp_path: Path) -> None:
    def broken(*args: Any) -> MemoryStore:
        raise StorageError("no room")

    directories = f"{tmp_path}/a;{tmp_path}/b"
    with stage(tmp_path, make_store=broken, ssd_cache_dir=directories) as made:
        made.put(5, 1)
        made.get(5, 1)
        tier = space_of(made.manager).tiering
        assert tier is not None
        until(lambda: tier._tiers[0]._early is None)                  # nothing more is kept for it
        made.put(5, 2)
        stats = made.manager.stats()
        assert (stats["ssd_store_directories"], stats["ssd_store_directories_usable"]) == (2, 0)


def test_a_store_that_loses_its_results_is_given_up_and_nothing_waits_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise KeyError("job 7")

    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.held = True
        loads = [made.start_get(5, 1), made.start_get(3, 1, 40)]
        made.store.results = broken                         # type: ignore[assignment, method-assign]
        assert {result.status for result in made.manager.wait(loads, 10.0).values()} == {Status.FAILED}
        assert "is not used any more" in caplog.text
        assert made.store.closed
        made.settle()
        made.put(5, 1)                                      # host memory serves on
        made.get(5, 1)
        made.settle()
        made.manager.check_integrity()


def test_a_store_that_cannot_be_closed_keeps_the_slots_it_may_still_write_to(tmp_path: Path) -> None:
    def broken(*args: Any) -> None:
        raise StorageError("the kernel has them")

    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.held = True
        load = made.start_get(5, 1)
        made.store.results, close = broken, made.store.close     # type: ignore[assignment, method-assign]
        made.store.close = broken                           # type: ignore[method-assign]
        made.manager.try_wait(load)
        assert made.manager.stats()["blocks_being_fetched"] == 5
        made.store.close = close                            # type: ignore[method-assign]
        made.manager.shutdown()
