"""Late results: for slots that were freed meanwhile, and of plans of before a reset."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from flexkv.cache.plan import PutPlan
from flexkv.cache.reasons import MissReason
from flexkv.cache.tier import HOST

from ...property.model_tree import keys_of


class Clock:
    """Moves on with every look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def engine(num_slots: int = 2, num_ssd: int = 0, direct: bool = False) -> GlobalCacheEngine:
    made = GlobalCacheEngine(num_slots, LRU, 1.0, 0.0, clock=Clock(), lower={"ssd": num_ssd} if num_ssd else None)
    made.grow(num_slots)
    if num_ssd:
        cost = CostModel(1, Clock())
        made.attach(1, TierService(
            SlotAllocator(num_ssd), cost, lambda: True, lambda slots: slots >= 0, loads_directly=lambda: direct
        ))
    return made


def ones(count: int) -> np.ndarray:
    return np.ones(count, dtype=np.bool_)


def lose(cache: GlobalCacheEngine, plan: PutPlan) -> None:
    """The fault that the assertion is for: slots of a plan in flight are freed, so that others get them."""
    move = plan.moves[0]
    move.tree.drop(move.keys, move.by_position(move.dst), HOST)
    cache._host_slots.free(move.dst)


@pytest.mark.parametrize("ok", [True, False])
def test_a_late_write_neither_makes_the_new_block_ready_nor_frees_its_slot(
    ok: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = engine()
    first = cache.begin_put(keys_of((1, 1)), 0, 2)
    lose(cache, first)
    second = cache.begin_put(keys_of((1, 1)), 0, 2)             # the same blocks in the same slots
    assert sorted(second.slots_on(HOST)) == sorted(first.slots_on(HOST))
    with caplog.at_level(logging.ERROR, "flexkv.cache"):
        cache.end_put(first, np.full(2, ok))
    assert "late write of slots [0, 1]" in caplog.text
    assert cache.match(keys_of((1, 1))).num_ready == 0
    assert cache.stats()["free_slots"] == 0
    assert cache.stats()["stale_results"] == 2
    cache.check_integrity()
    cache.end_put(second, ones(2))
    assert cache.match(keys_of((1, 1))).num_ready == 2
    assert cache.stats()["stale_results"] == 2


def test_of_a_late_result_the_blocks_whose_slot_is_still_theirs_count() -> None:
    cache = engine(3)
    plan = cache.begin_put(keys_of((1, 2, 3)), 0, 3)
    move = plan.moves[0]
    last = move.by_position(move.dst, np.array([False, False, True]))
    move.tree.drop(move.keys, last, HOST)
    cache._host_slots.free(move.dst[2:])
    other = cache.begin_put(keys_of((4,)), 0, 1)
    assert other.slots_on(HOST)[0] == move.dst[2]
    cache.end_put(plan, ones(3))
    assert cache.match(keys_of((1, 2, 3))).num_ready == 2
    assert cache.match(keys_of((4,))).num_ready == 0
    cache.end_put(other, ones(1))
    cache.check_integrity()


def test_a_read_of_a_slot_that_became_anothers_is_reported() -> None:
    cache = engine()
    plan = cache.begin_put(keys_of((1, 1)), 0, 2)
    cache.end_put(plan, ones(2))
    get = cache.begin_get(keys_of((1, 1)), 0, 2)
    cache._host_slots.free(get.slots[1:])
    cache._host_slots.allocate(1)
    stale = cache.end_get(get, ones(2))
    assert stale is not None
    assert stale.tolist() == [False, True]
    assert cache.stats()["stale_results"] == 1


def test_a_block_whose_fetch_failed_is_no_stale_read() -> None:
    cache = engine(2, num_ssd=2)
    cache.end_put(put := cache.begin_put(keys_of((1, 1)), 0, 2), ones(2))
    write = cache.begin_write_back(1, keys_of((1, 1)), 2)
    assert write is not None
    cache.end_move(write, ones(2))
    cache._host.evict(cache._tree, 2, 1e6)
    assert put.moves[0].filled is None
    get = cache.begin_get(keys_of((1, 1)), 0, 2)
    cache.end_move(get.moves[0], np.array([True, False]))
    assert cache.end_get(get, np.array([True, False])) is None
    assert cache.stats()["stale_results"] == 0
    cache.check_integrity()


def test_what_a_write_back_read_from_anothers_slot_is_not_on_ssd() -> None:
    cache = engine(2, num_ssd=2)
    cache.end_put(cache.begin_put(keys_of((1, 1)), 0, 2), ones(2))
    write = cache.begin_write_back(1, keys_of((1, 1)), 2)
    assert write is not None
    cache._host_slots.free(write.src[:1])
    cache._host_slots.allocate(1)
    cache.end_move(write, ones(2))
    assert cache.has_slot(1, keys_of((1, 1))).tolist() == [False, True]
    assert cache.stats()["ssd_free_slots"] == 1


def test_a_slot_whose_block_was_found_bad_is_not_filled_anew_while_another_get_reads_it() -> None:
    """Two gets read a bad block; the first finds it. Its only slot is released when the second has ended."""
    cache = engine(2, num_ssd=1, direct=True)
    keys = keys_of((1,))

    def store() -> bool:
        cache.end_put(cache.begin_put(keys, 0, 1), ones(1))
        write = cache.begin_write_back(1, keys, 1)
        if write is not None:
            cache.end_move(write, ones(1))
            cache._host.evict(cache._tree, 2, 1e6)
        return write is not None

    assert store()
    first, second = (cache.begin_get(keys, 0, 1) for _ in range(2))
    cache.end_move(first.moves[0], ~ones(1))
    cache.end_get(first)
    assert cache.stats()["ssd_limbo_slots"] == 1
    assert not store()
    cache.check_integrity()
    cache.end_move(second.moves[0], ~ones(1))
    cache.end_get(second)
    assert cache.stats()["ssd_limbo_slots"] == 0
    assert store()
    cache.check_integrity()


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("get_ends_first", [True, False])
def test_blocks_of_a_read_that_hangs_can_be_saved_again(arrives: bool, get_ends_first: bool) -> None:
    """The slots of the read stay where they are until it has ended, and until the get that waits for it has."""
    cache = engine(4, num_ssd=4)
    keys = keys_of((1, 2))
    cache.end_put(cache.begin_put(keys, 0, 2), ones(2))
    write = cache.begin_write_back(1, keys, 2)
    assert write is not None
    cache.end_move(write, ones(2))
    cache._host.evict(cache._tree, 4, 1e6)
    get = cache.begin_get(keys, 0, 2)
    assert cache.match(keys).num_ready == 2
    cache._lower[0].service = replace(cache._lower[0].service, read_deadline_s=5.0)  # type: ignore[type-var]
    cache.abandon_reads_that_hang()
    assert cache.match(keys).num_ready == 2
    cache._clock.now += 10.0  # type: ignore[attr-defined]
    cache.abandon_reads_that_hang([1])                          # slow, but blocks arrive
    assert cache.match(keys).num_ready == 2
    cache._clock.now += 10.0  # type: ignore[attr-defined]
    cache.abandon_reads_that_hang()
    assert cache.match(keys).reason is MissReason.FAILED
    stats = cache.stats()
    assert (stats["limbo_slots"], stats["ssd_limbo_slots"], stats["blocks_being_fetched"]) == (2, 2, 0)
    again = cache.begin_put(keys, 0, 2)
    assert not set(again.slots_on(HOST)) & set(get.slots)
    cache.end_put(again, ones(2))
    assert cache.match(keys).num_to_fetch == 0
    steps = [lambda: cache.end_move(get.moves[0], np.full(2, arrives)), lambda: cache.end_get(get)]
    for step in reversed(steps) if get_ends_first else steps:
        assert cache.stats()["limbo_slots"] == 2
        cache.check_integrity()
        step()
    assert (cache.stats()["limbo_slots"], cache.stats()["ssd_limbo_slots"]) == (0, 0)
    cache.end_move(get.moves[0], ones(2))                       # once more changes nothing
    cache.check_integrity()
    assert cache.match(keys).num_ready == 2
    assert cache.stats()["free_slots"] == 2


@pytest.mark.parametrize("end", [
    lambda cache, plan: cache.end_put(plan, ones(2)), lambda cache, plan: cache.end_put(plan, ~ones(2)),
])
def test_a_second_result_of_a_plan_is_refused(end: Callable[[GlobalCacheEngine, PutPlan], None]) -> None:
    cache = engine()
    plan = cache.begin_put(keys_of((1, 1)), 0, 2)
    cache.end_put(plan, ones(2))
    end(cache, plan)
    assert cache.match(keys_of((1, 1))).num_ready == 2
    cache.check_integrity()


@pytest.mark.parametrize("ok", [[True, True], [True, False], [False, False]])
@pytest.mark.parametrize("again", [False, True])
def test_a_write_planned_before_a_reset_that_ends_after_it_offers_nothing(ok: list[bool], again: bool) -> None:
    """The retired tree lets go of the SSD slots when the write ends, once; what was written since the reset stays."""
    cache = engine(4, num_ssd=4)
    keys = keys_of((1, 1))
    cache.end_put(cache.begin_put(keys, 0, 2), ones(2))
    write = cache.begin_write_back(1, keys, 2)
    assert write is not None
    cache.reset()
    assert cache.stats()["free_slots"] == 2                     # the write still reads the others
    assert cache.stats()["ssd_free_slots"] == 2
    if again:                                                   # the same sequence, computed anew
        cache.end_put(cache.begin_put(keys, 0, 2), ones(2))
        newer = cache.begin_write_back(1, keys, 2)
        assert newer is not None
        assert not set(newer.dst) & set(write.dst)
        assert not set(newer.src) & set(write.src)
    cache.end_move(write, np.array(ok))
    cache.check_integrity()
    assert not cache._retired
    assert cache.match(keys).num_ready == (2 if again else 0)
    assert cache.stats()["ssd_free_slots"] == (2 if again else 4)
    assert cache.stats()["free_slots"] == (2 if again else 4)
    cache.end_move(write, np.array(ok))                        # once more changes nothing
    cache.check_integrity()
    if again:
        cache.end_move(newer, ones(2))
        cache._host.evict(cache._tree, 4, 1e6)
        assert cache.match(keys).num_to_fetch == 2
    cache.check_integrity()


def test_a_fetch_planned_before_a_reset_that_ends_after_it_offers_nothing() -> None:
    cache = engine(2, num_ssd=2)
    keys = keys_of((1, 1))
    cache.end_put(cache.begin_put(keys, 0, 2), ones(2))
    write = cache.begin_write_back(1, keys, 2)
    assert write is not None
    cache.end_move(write, ones(2))
    cache._host.evict(cache._tree, 2, 1e6)
    get = cache.begin_get(keys, 0, 2)
    assert len(get.moves) == 1
    cache.reset()
    assert cache.stats()["free_slots"] == 0
    cache.end_move(get.moves[0], ones(2))
    assert cache.match(keys).num_ready == 0
    cache.end_get(get, ones(2))
    assert cache.stats()["free_slots"] == 2
    assert cache.stats()["ssd_free_slots"] == 2
    assert cache.stats()["stale_results"] == 0
    assert not cache._retired
