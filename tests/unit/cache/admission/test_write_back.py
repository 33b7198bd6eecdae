"""Blocks that are written to SSD: evidence, free slots, backpressure, fairness, batches, the rate."""

import math

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.admission.write_back import WriteBack
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from flexkv.cache.quotas import Quotas
from flexkv.config.namespaces import Quota
from tests.property.model_tree import keys_of

SLOTS = 64


class World:
    """An index with an SSD tier, its writer, and the time."""

    def __init__(
        self, ssd_slots: int = SLOTS, quotas: Quotas | None = None, start_threshold: float = 1.0,
        evict_ratio: float = 0.0, **limits: float,
    ) -> None:
        self.now = 100.0
        self.cache = GlobalCacheEngine(
            SLOTS, LRU, start_threshold, evict_ratio, clock=self.clock, lower={"ssd": ssd_slots}, quotas=quotas
        )
        self.cache.grow(SLOTS)
        cost = CostModel(1, self.clock)
        self.is_usable = True
        tier = TierService(SlotAllocator(ssd_slots), cost, lambda: self.is_usable, lambda slots: slots >= 0)
        assert self.cache.attach(1, tier)
        settings = {"write_all": False, "batch_blocks": 8, "max_in_flight_blocks": 16, "max_queued_blocks": 32,
                    "blocks_per_s": 0.0, **limits}
        self.writer = WriteBack(self.cache, 1, clock=self.clock, **settings)  # type: ignore[arg-type]

    def clock(self) -> float:
        return self.now

    def put(self, sequence: tuple[int, ...], start: int = 0, tenant: int = 0) -> bool:
        plan = self.cache.begin_put(keys_of(sequence), start, len(sequence), tenant)
        self.cache.end_put(plan, np.ones(len(plan), dtype=np.bool_))
        return self.writer.put(plan)

    def get(self, sequence: tuple[int, ...]) -> bool:
        plan = self.cache.begin_get(keys_of(sequence), 0, len(sequence))
        self.cache.end_get(plan)
        return self.writer.hit(plan.keys)

    def write(self, ok: bool = True) -> list[int]:
        """Write all that may be written now; the sizes of the writes."""
        sizes = []
        while (plan := self.writer.next()) is not None:
            sizes.append(len(plan))
            self.writer.ended(plan, np.full(len(plan), ok))
        return sizes

    def on_ssd(self, sequence: tuple[int, ...]) -> NDArray[np.bool_]:
        return self.cache.has_slot(1, keys_of(sequence))


FULL = 8


def full_world() -> World:
    """Its SSD tier has ``FULL`` slots, and none is free."""
    world = World(ssd_slots=FULL)
    world.put((99,) * FULL)
    assert world.write() == [FULL]
    return world


def test_what_was_seen_once_is_not_written() -> None:
    world = full_world()
    assert not world.put((1, 2, 3))
    assert world.write() == []
    assert world.writer.pause() == math.inf


def test_what_was_loaded_is_written_once() -> None:
    world = full_world()
    world.put((1, 2, 3))
    assert world.get((1, 2, 3))
    assert world.write() == [3]
    assert world.on_ssd((1, 2, 3)).all()
    assert not world.get((1, 2, 3))
    assert world.writer.stats()["written_blocks"] == FULL + 3


def test_what_was_put_again_is_written_with_what_follows() -> None:
    world = full_world()
    world.put((1, 2, 3))
    assert world.put((1, 2, 3, 4, 5))
    assert world.write() == [5]
    assert world.put((1, 2, 3, 4, 5, 6), start=5)               # as the same request goes on
    assert world.write() == [1]


def test_a_sequence_that_grows_is_one_entry_of_the_queue() -> None:
    world = full_world()
    world.put((1, 2))
    assert world.put((1, 2, 3))
    for end in range(4, 9):
        sequence = tuple(range(1, end + 1))
        assert world.put(sequence, start=end - 1)               # follows on what is queued
    assert world.writer.stats()["queued_blocks"] == 8
    assert world.write() == [8]


def test_a_request_that_was_never_seen_before_leaves_no_evidence_by_its_parts() -> None:
    world = full_world()
    assert not world.put((1, 2))
    assert not world.put((1, 2, 3, 4), start=2)


def test_while_slots_are_free_everything_is_written() -> None:
    world = World(ssd_slots=8)
    assert world.put((1, 2, 3))
    assert world.put((2,) * 7)
    assert world.write() == [3, 5]                               # as much as there is room for
    assert not world.put((3,) * 4)
    assert world.on_ssd((1, 2, 3)).all()
    assert world.writer.stats()["dropped_writes"] == 0       # it was not to be written


def test_slots_that_are_kept_free_ahead_of_need_are_not_filled_with_what_has_no_evidence() -> None:
    world = World(ssd_slots=10, start_threshold=0.8)
    assert world.put((1,) * 10)
    assert world.write() == [8]
    assert world.cache.evict_ahead() == 0


def test_what_a_batch_of_evictions_freed_is_not_filled_with_what_has_no_evidence() -> None:
    world = World(ssd_slots=20, start_threshold=0.8, evict_ratio=0.2)
    assert world.put((1,) * 20)
    assert world.write() == [8, 4]
    world.put((2,) * 5)
    assert world.get((2,) * 5)
    assert world.write() == [5]
    assert world.cache.evict_ahead() == 4
    assert not world.put((3,) * 4)


def test_beyond_its_limit_a_namespace_has_no_free_slots() -> None:
    world = World(ssd_slots=16, quotas=Quotas({"a": Quota(limit=0.25)}))
    assert world.put((1,) * 8, tenant=1)
    assert world.write() == [4]
    assert not world.put((2,) * 8, tenant=1)


def test_all_means_all() -> None:
    world = World(write_all=True)
    assert world.put((1, 2, 3))
    assert world.write() == [3]


def test_long_sequences_go_in_batches_of_adjacent_slots() -> None:
    world = World(write_all=True)
    world.put(tuple(range(1, 21)))
    plans = []
    while (plan := world.writer.next()) is not None:
        assert (np.diff(plan.dst) == 1).all()
        plans.append(plan)
    assert [len(plan) for plan in plans] == [8, 8]              # as much as may be under way
    assert world.writer.pause() == math.inf
    for plan in plans:
        world.writer.ended(plan, np.ones(len(plan), dtype=np.bool_))
    assert world.write() == [4]
    assert world.writer.idle
    world.cache.check_integrity()


def test_parents_are_the_blocks_before() -> None:
    world = World(write_all=True)
    world.put((1, 2, 3))
    plan = world.writer.next()
    assert plan is not None
    keys = keys_of((1, 2, 3))
    assert plan.parents.tolist() == [[0, 0], keys[0].tolist(), keys[1].tolist()]


def test_too_much_is_left_out_and_counted() -> None:
    world = World(write_all=True, max_queued_blocks=10)
    assert world.put((1,) * 8)
    assert world.put((2,) * 6)
    assert not world.put((3,) * 2)
    assert world.writer.stats()["dropped_writes"] == 6
    assert world.write() == [8, 2]
    assert world.on_ssd((2,) * 6).tolist() == [True, True, False, False, False, False]


def test_the_rate_is_kept_unless_there_is_a_hurry() -> None:
    world = World(write_all=True, blocks_per_s=4.0)
    world.put(tuple(range(1, 13)))
    assert world.write() == [8]
    assert world.writer.pause() == 2.0
    world.now += 1.9
    assert world.write() == []
    world.now += 0.2
    assert world.write() == [4]
    world.put((2, 2))
    assert world.writer.next() is None
    assert world.writer.next(flush=True) is not None


def test_what_could_not_be_written_is_absent_and_its_slots_are_free() -> None:
    world = World(write_all=True)
    world.put((1, 2, 3))
    assert world.write(ok=False) == [3]
    assert not world.on_ssd((1, 2, 3)).any()
    assert world.cache.stats()["ssd_free_slots"] == SLOTS
    world.cache.check_integrity()
    assert world.get((1, 2, 3))                                  # may be tried again


def test_a_full_tier_evicts_what_was_used_longest_ago() -> None:
    world = World(ssd_slots=8, write_all=True)
    for first in (1, 2, 3):
        world.now += 1
        world.put((first,) * 4)
        assert world.write() == [4]
    assert not world.on_ssd((1,) * 4).any()
    assert world.on_ssd((3,) * 4).all()
    world.cache.check_integrity()


def test_what_finds_no_room_on_ssd_is_counted() -> None:
    world = World(ssd_slots=8, write_all=True)
    world.put((1,) * 8)
    plan = world.writer.next()
    assert plan is not None                                      # being written, so that nothing can be evicted
    world.put((2,) * 3)
    assert world.writer.next() is None
    assert world.writer.stats()["dropped_writes"] == 3
    world.writer.ended(plan, np.ones(len(plan), dtype=np.bool_))
    assert world.writer.stats()["dropped_writes"] == 3


def test_what_waits_while_the_tier_goes_out_of_service_is_counted() -> None:
    world = World(write_all=True)
    world.put((1, 2, 3))
    world.is_usable = False
    assert world.write() == []
    assert world.writer.stats()["dropped_writes"] == 3
    assert world.writer.idle


def test_forgetting_the_queue() -> None:
    world = World(write_all=True)
    world.put((1, 2, 3))
    world.writer.clear()
    assert world.write() == []
    assert world.writer.idle


# ---- fairness -------------------------------------------------------------------------------------------------------


def namespaces(**limits: float) -> World:
    return World(write_all=True, quotas=Quotas({"flood": Quota(), "other": Quota()}), **limits)


def test_a_flood_of_one_namespace_leaves_the_others_their_part_of_the_queue() -> None:
    world = namespaces(max_queued_blocks=16)
    for first in range(1, 6):
        world.put((first,) * 4, tenant=1)
    assert world.writer.stats()["queued_blocks"] == 16
    assert world.put((90,) * 10, tenant=2)
    stats = world.writer.stats()
    assert stats["queued_blocks"] == 16                      # bounded in all
    assert stats["dropped_writes"] == 4 + 8 + 2
    assert not world.put((6,) * 4, tenant=1)
    assert sorted(world.write()) == [4, 4, 8]
    assert world.on_ssd((90,) * 10).tolist() == [True] * 8 + [False] * 2
    assert world.on_ssd((1,) * 4).all()                          # of the flood the oldest stay
    assert world.on_ssd((2,) * 4).all()


def test_a_namespace_does_not_wait_for_the_backlog_of_another() -> None:
    world = namespaces(max_queued_blocks=32, blocks_per_s=4.0)
    for first in range(1, 8):
        world.put((first,) * 4, tenant=1)
    world.put((90,) * 4, tenant=2)
    assert world.write() == [4]
    world.now += 1.0
    world.put((8,) * 4, tenant=1)
    assert world.write() == [4]
    assert world.on_ssd((90,) * 4).all()                         # the second turn, not the eighth


def test_a_flood_that_never_ends_does_not_starve_anyone() -> None:
    world = namespaces(max_queued_blocks=16, blocks_per_s=4.0)
    for turn in range(12):
        for first in range(4):
            world.put((4 * turn + first + 1,) * 4, tenant=1)
        world.put((200 + turn,) * 4, tenant=2)
        for _ in range(2):                                       # less than half of what is asked for can be written
            world.now += 1.0
            world.write()
    done = sum(world.on_ssd((200 + turn,) * 4).all() for turn in range(6, 12))
    assert done >= 5                                             # but for what still waits
    world.cache.check_integrity()
