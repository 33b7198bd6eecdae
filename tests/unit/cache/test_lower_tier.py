"""The index with two tiers below host memory."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from tests.property.model_tree import keys_of
from tests.unit.cache.test_engine import Clock, put

Checksums = Callable[[NDArray[np.int32]], NDArray[np.uint64]]


def all_equal(checksum: int) -> Checksums:
    return lambda slots: np.full(len(slots), checksum, dtype=np.uint64)


def attach(cache: GlobalCacheEngine, tier: int, checksums: Checksums, direct: bool = False) -> None:
    cache.attach(tier, TierService(
        SlotAllocator(16), CostModel(1, Clock()), lambda: True, lambda slots: slots >= 0,
        loads_directly=lambda: direct, checksums=checksums,
    ))


def engine(first: Checksums, second: Checksums, direct: bool = False) -> GlobalCacheEngine:
    """Four host slots; only the first lower tier loads directly, if ``direct``."""
    cache = GlobalCacheEngine(4, LRU, 1.0, 0.0, clock=Clock(), lower={"a": 16, "b": 16})
    cache.grow(4)
    attach(cache, 1, first, direct)
    attach(cache, 2, second)
    return cache


def write_back(cache: GlobalCacheEngine, tier: int, written: list[bool]) -> None:
    move = cache.begin_write_back(tier, keys_of((1, 1)), len(written))
    assert move is not None
    cache.end_move(move, np.array(written))


def test_a_plan_that_ends_early_has_no_direct_read_behind_its_end() -> None:
    """The first block needs a host slot, and all host slots are in use; the second can be read directly."""
    cache = engine(all_equal(7), all_equal(7), direct=True)
    put(cache, 1, 1)
    write_back(cache, 2, [True])
    write_back(cache, 1, [False, True])
    put(cache, 2, 2, 2, 2)
    in_use = cache.begin_get(keys_of((2, 2, 2, 2)), 0, 4)
    assert len(in_use) == 4
    plan = cache.begin_get(keys_of((1, 1)), 0, 2)
    assert plan.stop == 0
    assert plan.moves == ()
    cache.end_get(plan)
    cache.end_get(in_use)
    plan = cache.begin_get(keys_of((1, 1)), 0, 2)                   # with room: one move from each tier
    assert plan.stop == 2
    assert [move.source for move in plan.moves] == [2, 1]
    for move in plan.moves:
        cache.end_move(move, np.array([True]))
    cache.end_get(plan)
    cache.check_integrity()


def test_a_store_that_was_cleared_after_a_read_has_not_altered_the_blocks() -> None:
    checksum = [7]
    cache = engine(lambda slots: all_equal(checksum[0])(slots), all_equal(7))
    put(cache, 1, 1)
    write_back(cache, 1, [True, True])
    put(cache, 2, 2, 2, 2)
    plan = cache.begin_get(keys_of((1, 1)), 0, 2)
    cache.reset()
    checksum[0] = 0
    cache.end_move(plan.moves[0], np.array([True, True]))
    cache.end_get(plan)
    assert cache.stats()["a_altered_blocks"] == 0
    cache.check_integrity()


def test_bytes_that_changed_between_two_writes_under_way_reach_one_tier_only() -> None:
    """No checksum was known when the writes began. The slots on the second tier wait until they were erased."""
    cache = engine(all_equal(7), all_equal(8))
    keys = keys_of((1, 1))
    put(cache, 1, 1)
    first, second = cache.begin_write_back(1, keys, 2), cache.begin_write_back(2, keys, 2)
    assert first is not None
    assert second is not None
    cache.end_move(first, np.array([True, True]))
    cache.end_move(second, np.array([True, True]))
    assert cache.has_slot(1, keys).all()
    assert not cache.has_slot(2, keys).any()
    assert cache.stats()["altered_blocks"] == 2
    assert cache.stats()["b_free_slots"] == 14
    assert second.to_erase.tolist() == second.dst.tolist()
    cache.check_integrity()
    cache.erased(second)
    assert cache.stats()["b_free_slots"] == 16
    cache.check_integrity()


def test_a_known_checksum_is_kept_when_a_store_has_none() -> None:
    cache = engine(all_equal(7), all_equal(0))
    put(cache, 1, 1)
    for tier in (1, 2):
        write_back(cache, tier, [True, True])
    plan = cache.begin_get(keys_of((1, 1)), 0, 2)
    assert cache._host.checksums[plan.slots].tolist() == [7, 7]
    cache.end_get(plan)
