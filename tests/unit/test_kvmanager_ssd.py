"""KVManager with an SSD tier: evicted blocks are loaded, with bytes compared; failing and slow stores."""

from pathlib import Path

import numpy as np
import pytest

from flexkv.cache.reasons import MissReason
from flexkv.config import CacheConfig, TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from tests.support.harness import TOKENS, controller_of, until
from tests.support.memory_store import Disk, MemoryStore
from tests.support.ssd_stage import HOST_SLOTS, SLOT_BYTES, stage


def test_what_left_host_memory_comes_back_from_ssd(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(6, 1)
        made.flood()
        found = made.manager.blocks.lookup(made.keys(6, 1))
        assert (found.num_ready, found.num_to_fetch) == (6, 6)
        made.get(6, 1)
        assert made.store.num_reads == 6
        made.settle()
        assert made.manager.blocks.lookup(made.keys(6, 1)).num_to_fetch == 0
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
        assert made.manager.blocks.lookup(made.keys(7, 1)).reason is MissReason.NEVER_SEEN


def test_gets_of_the_same_blocks_share_one_read(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.held = True
        first = made.start_get(5, 1, 32)
        second = made.start_get(4, 1, 40)
        assert made.store.num_waiting == 5
        made.store.release()
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
        found = made.manager.blocks.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (2, MissReason.FAILED)
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
        slow = made.manager.blocks.lookup(made.keys(6, 1)).num_to_fetch
        assert slow == 4
        made.store.held = True
        made.tensors.zero()
        task = made.start_get(6, 1)
        graph = controller_of(made.manager).tasks._tasks[task].graph
        assert graph is not None
        op = graph.ops[0]
        until(lambda: int(op.resolved.sum()) == 6 - slow)
        assert made.store.num_waiting == slow
        made.store.release()
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
        made.store.release()
        made.settle()
        assert made.manager.blocks.lookup(made.keys(5, 1)).num_to_fetch == 0
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
        made.store.release()
        response = made.manager.wait(task)[task]
        assert response.status is Status.SUCCESS
        assert response.return_mask is not None
        assert response.return_mask.all()
        assert made.manager.blocks.lookup(made.keys(5, 1)).num_to_fetch == 0


def test_prefetches_of_many_leave_room_to_those_that_run(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(4, 1)
        made.put(3, 2)
        made.flood()
        made.store.held = True
        first = made.manager.blocks.prefetch_blocks(made.keys(4, 1))               # a quarter of the host tier
        assert first is not None
        assert made.manager.blocks.prefetch_blocks(made.keys(3, 2)) is None
        tokens = np.random.default_rng(2).integers(0, 50_000, 3 * TOKENS)
        refused = made.manager.prefetch_async(tokens)
        response = made.manager.wait(refused)[refused]
        assert response.status is Status.SUCCESS
        assert response.return_mask is not None
        assert not response.return_mask.any()
        assert made.store.num_waiting == 4
        running = made.start_get(3, 2, 40)                                  # a load is not held back
        assert made.store.num_waiting == 7
        made.store.release()
        results = made.manager.wait([first, running])
        assert {result.status for result in results.values()} == {Status.SUCCESS}
        assert made.tensors.read(range(40, 43)) == made.contents[2]
        made.settle()
        again = made.manager.blocks.prefetch_blocks(made.keys(3, 2))
        assert again is not None
        made.manager.wait(again)


def test_a_prefetch_leaves_alone_what_comes_before_its_start(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(8, 1)
        made.settle()
        made.flood()
        before = made.store.num_reads
        task = made.manager.blocks.prefetch_blocks(made.keys(8, 1), 5)
        assert made.manager.wait(task)[task].status is Status.SUCCESS
        assert made.store.num_reads == before + 3


def test_a_layerwise_load_takes_only_what_is_in_host_memory(tmp_path: Path) -> None:
    """Compute follows the last load of a step: one that waits for SSD must not be passed by it, so it fails at once."""
    with stage(tmp_path) as made:
        made.put(8, 1)
        made.settle()
        made.flood()
        task = made.manager.blocks.get_blocks(made.keys(8, 1), 0, np.arange(32, 40, dtype=np.int32), layerwise=True)
        assert made.manager.wait(task)[task].status is Status.FAILED
        assert made.manager.stats()["blocks_being_fetched"] == 0
        made.get(8, 1)


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
        made.store.release()
        made.settle()
        assert made.ready(5, 1) == made.ready(4, 2) == 0
        made.manager.check_integrity()
        assert not disk.records


def test_a_tier_that_is_out_of_service_is_a_miss(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(5, 1)
        made.flood()
        made.store.is_usable = False
        found = made.manager.blocks.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (0, MissReason.OUT_OF_SERVICE)
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
        found = made.manager.blocks.lookup(made.keys(5, 1))
        assert (found.num_ready, found.num_to_fetch, found.reason) == (2, 2, MissReason.OUT_OF_SERVICE)
        made.put(5, 1)
        made.get(5, 1)
        assert made.store.reads_of.get(third, 0) == 0
        made.store.out = set()
        made.manager.check_integrity()


def test_what_is_sooner_computed_is_not_offered(tmp_path: Path) -> None:
    with stage(tmp_path, load_policy="never") as made:
        made.put(5, 1)
        made.flood()
        found = made.manager.blocks.lookup(made.keys(5, 1))
        assert (found.num_ready, found.reason) == (0, MissReason.TOO_SLOW)


@pytest.mark.parametrize("configured", [0.0, 1e-3])
def test_the_prefill_rate_of_the_adapter_counts_unless_one_is_set(tmp_path: Path, configured: float) -> None:
    with stage(tmp_path, prefill_tokens_per_s=configured) as made:
        made.put(5, 1)
        made.flood()
        made.manager.wait(made.start_get(1, 1))             # so that the speed of reads is known
        made.settle()
        assert made.ready(5, 1) == 5
        made.manager.blocks.set_prefill_rate(1e12)
        assert made.ready(5, 1) == (1 if configured == 0 else 5)
        made.manager.blocks.set_prefill_rate(1e-3)
        assert made.ready(5, 1) == 5


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_match_in_host_memory_only(tmp_path: Path, layerwise: bool) -> None:
    """With ``cpu_only``, and always where layers are signalled one by one."""
    config = TransferConfig(enable_layerwise_transfer=layerwise)
    with stage(tmp_path, transfer_config=config) as made:
        tokens = np.random.default_rng(1).integers(0, 50_000, 5 * TOKENS)
        made.put(5, 1)
        made.flood()
        made.manager.wait(made.start_get(2, 1))
        made.settle()
        task, mask = made.manager.get_match(tokens, cpu_only=not layerwise)
        assert mask.sum() == 2 * TOKENS
        assert made.store.num_reads == 2
        made.manager.cancel(task)
        made.store.held = True
        prefetch = made.manager.prefetch_async(tokens)
        task, mask = made.manager.get_match(tokens, cpu_only=not layerwise)
        assert mask.sum() == 2 * TOKENS                     # nor what is only on its way
        made.manager.cancel(task)
        made.store.release()
        assert made.manager.wait(prefetch)[prefetch].status is Status.SUCCESS
        made.settle()
        task, mask = made.manager.get_match(tokens, cpu_only=not layerwise)
        assert mask.all()
        made.flood()                                        # the match holds them
        made.store.broken = set(made.store.disk.records)
        made.tensors.zero()
        made.manager.launch([task], [np.arange(32 * TOKENS, 37 * TOKENS)])
        assert made.manager.wait(task)[task].status is Status.SUCCESS
        assert made.tensors.read(range(32, 37)) == made.contents[1]


def test_a_sequence_of_half_the_host_tier_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv.controller.tier_startup._BATCH_BYTES", SLOT_BYTES)
    with stage(tmp_path) as made:
        made.store.held = True                              # so that nothing leaves the queue but one batch
        made.put(HOST_SLOTS // 2, 1)
        made.store.release()
        made.settle()
        assert made.store.num_writes == HOST_SLOTS // 2
        assert made.manager.stats()["ssd_dropped_writes"] == 0


def test_a_sequence_that_is_used_again_is_written(tmp_path: Path) -> None:
    with stage(tmp_path, ssd_admission="second_touch") as made:
        for seed in range(10, 19):                          # until no slot is free
            made.put(HOST_SLOTS // 2, seed)
            made.settle()
        filled = made.store.num_writes
        made.put(4, 1)
        made.put(4, 2)
        made.settle()
        assert made.store.num_writes == filled
        made.get(4, 2)                                      # loaded
        made.settle()
        assert made.store.num_writes == filled + 4
        made.put(6, 1)                                      # goes on from an earlier one
        made.settle()
        assert made.store.num_writes == filled + 10


def test_without_a_store_all_works_as_before(tmp_path: Path) -> None:
    def no_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> MemoryStore:
        raise OSError(28, "No space left on device")

    with stage(tmp_path, make_store=no_store) as made:
        made.put(4, 1)
        made.get(4, 1)


def test_a_disk_that_hangs_leaves_room_in_host_memory(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        made.put(6, 1)
        made.flood()
        made.store.held = True
        for seed in range(2, 8):
            made.put(HOST_SLOTS // 2, seed)                  # each is saved, though what is written holds its slots
            assert made.manager.stats()["ssd_blocks_being_written"] <= HOST_SLOTS // 4
            assert made.ready(HOST_SLOTS // 2, seed) == HOST_SLOTS // 2
        assert made.manager.stats()["ssd_blocks_being_written"] > 0
        made.store.release()
        made.store.held = False
        made.get(6, 1)
