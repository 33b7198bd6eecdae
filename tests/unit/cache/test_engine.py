"""The control plane: eviction ahead of need, the order of eviction, reasons, prefixes that went away."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU, policy_class
from flexkv.cache.lower_tier import TierService
from flexkv.cache.reasons import MissReason
from flexkv.cache.tier import HOST
from flexkv.errors import CapacityError, ConfigError
from tests.property.model_tree import keys_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def engine(num_slots: int, reward: float = 0.0, threshold: float = 1.0, ratio: float = 0.0) -> GlobalCacheEngine:
    made = GlobalCacheEngine(num_slots, partial(LRU, hit_reward_seconds=reward), threshold, ratio, clock=Clock())
    made.grow(num_slots)
    return made


def put(cache: GlobalCacheEngine, *sequence: int) -> int:
    plan = cache.begin_put(keys_of(sequence), 0, len(sequence))
    cache.end_put(plan, np.ones(len(plan), dtype=np.bool_))
    return len(plan)


def get(cache: GlobalCacheEngine, *sequence: int) -> int:
    plan = cache.begin_get(keys_of(sequence), 0, len(sequence))
    cache.end_get(plan)
    return len(plan)


def test_least_recently_used_goes_first() -> None:
    cache = engine(4)
    put(cache, 1, 1)
    put(cache, 2, 2)
    assert get(cache, 1, 1) == 2
    put(cache, 3)
    assert cache.match(keys_of((2, 2))).num_ready == 1      # from its end
    assert cache.match(keys_of((2, 2))).reason is MissReason.EVICTED
    put(cache, 4, 4)
    assert cache.match(keys_of((2,))).num_ready == 0
    assert cache.match(keys_of((1, 1))).num_ready == 1


def test_hits_buy_time() -> None:
    for reward, survivor in ((0.0, 2), (100.0, 1)):
        cache = engine(2, reward)
        put(cache, 1)
        for _ in range(3):
            get(cache, 1)
        put(cache, 2)
        put(cache, 3)
        assert cache.match(keys_of((survivor,))).num_ready == 1


def test_requests_do_not_wait_for_a_batch_that_grows_with_the_tier() -> None:
    cache, rng = engine(20_000, threshold=0.9, ratio=0.5), np.random.default_rng(0)

    def put_new(count: int) -> int:
        plan = cache.begin_put(rng.integers(1 << 63, size=(count, 2), dtype=np.uint64), 0, count)
        cache.end_put(plan, np.ones(len(plan), dtype=np.bool_))
        return len(plan)

    assert put_new(19_000) == 19_000
    assert [cache.evict_ahead() for _ in range(2)] == [4096, 0]
    assert put_new(5_097) == 5_097                                          # one more than are free
    assert cache.stats()["free_slots"] == 4095


def test_eviction_ahead_of_need_frees_a_batch_at_the_watermark() -> None:
    cache = engine(100, threshold=0.8, ratio=0.1)
    for i in range(80):
        put(cache, i)
    assert cache.evict_ahead() == 0
    put(cache, 99)
    assert cache.evict_ahead() == 10
    assert cache.stats()["free_slots"] == 29
    cache.check_integrity()


def test_reasons() -> None:
    cache = engine(10)
    assert cache.match(keys_of((1, 2))).reason is MissReason.NEVER_SEEN
    plan = cache.begin_put(keys_of((1, 2)), 0, 2)
    assert cache.match(keys_of((1, 2))).reason is MissReason.NOT_READY
    cache.end_put(plan, np.array([True, False]))
    found = cache.match(keys_of((1, 2)))
    assert (found.num_ready, found.reason) == (1, MissReason.FAILED)
    put(cache, 1, 2)
    assert cache.match(keys_of((1, 2))).reason is MissReason.FULL_HIT
    assert cache.match(keys_of((1, 2, 3))).reason is MissReason.NEVER_SEEN


def test_a_put_does_not_follow_on_a_hole() -> None:
    cache = engine(4)
    keys = keys_of((1, 2, 3, 4))
    plan = cache.begin_put(keys, 2, 4)
    assert len(plan) == 0
    cache.end_put(plan, np.zeros(0, dtype=np.bool_))
    assert put(cache, 1, 2) == 2
    plan = cache.begin_put(keys, 2, 4)
    assert plan.blocks.tolist() == [2, 3]
    cache.end_put(plan, np.ones(2, dtype=np.bool_))


def test_policies_are_named() -> None:
    assert policy_class("lru") is LRU
    with pytest.raises(ConfigError, match=r"one of .*lru"):
        policy_class("random")


def test_what_is_being_written_is_not_ranked() -> None:
    tree = RadixTree(10_000, 3)
    for i in range(2000):
        slots = np.array([-1 if i >= 250 else 2 * i, 2 * i + 1], dtype=np.int32)
        tree.insert(keys_of((i % 250, i // 250)), slots, 0, i)
    queues = tree.eviction_queues(0)
    events = queues.drain()
    assert events["length"].sum() == tree.num_blocks == tree.resident(0) == 2250
    assert tree.resident(1) == 0
    queues.place(events)
    assert not queues.has_evictable(0)
    tree.set_ready(keys_of((3, 0)), np.array([6, 7], dtype=np.int32), 0)
    assert queues.of_tenant(0)[1] == 3
    del tree
    assert queues.num_waiting == 0


def test_the_index_has_a_limit_and_says_so() -> None:
    tree = RadixTree(3)
    slots = np.arange(4, dtype=np.int32)
    with pytest.raises(CapacityError):
        tree.insert(keys_of((1, 2, 3, 4)), slots, 0, 0.0)
    assert tree.num_blocks == 0
    tree.insert(keys_of((1, 2, 3)), slots[:3], 0, 0.0)
    with pytest.raises(ValueError, match="tier 1"):
        tree.discard(1)
    with pytest.raises(ValueError, match="num_tiers"):
        RadixTree(3, 9)


def test_one_walk_answers_for_all_tiers() -> None:
    tree = RadixTree(100, 3)
    keys = keys_of((1, 2, 3, 4))
    tree.insert(keys, np.arange(4, dtype=np.int32), 1, 0.0)
    tree.set_ready(keys, np.arange(4, dtype=np.int32), 1)
    host = np.array([10, -1, 12, -1], dtype=np.int32)
    tree.insert(keys, host, 0, 0.0)
    tree.set_ready(keys, np.array([10, -1, -1, -1], dtype=np.int32), 0)
    match = tree.match(keys)
    assert match.tiers.tolist() == [0, 1, 1, 1]
    assert match.slots.tolist() == [10, 1, 2, 3]
    assert tree.drop(keys, np.array([-1, 1, -1, -1], dtype=np.int32), 1) == 1
    assert tree.match(keys).num_ready == 1
    assert [len(slots) for slots in tree.check_integrity()] == [2, 3, 0]


def test_what_is_pinned_keeps_nothing_else_from_being_evicted() -> None:
    cache = engine(8)
    for sequence in range(1, 9):
        put(cache, sequence)
    plans = [cache.begin_get(keys_of((sequence,)), 0, 1) for sequence in range(1, 4)]
    for sequence in range(4, 9):
        assert get(cache, sequence) == 1                    # so that those that are held were used longest ago
    assert put(cache, 9, 9, 9) == 3
    assert [cache.match(keys_of((sequence,))).num_ready for sequence in range(1, 10)] == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    for plan in plans:
        cache.end_get(plan)
    cache.check_integrity()


class Disk:
    """An engine of 8 host and 10 SSD slots, and the SSD tier that is to come into service, full."""

    def __init__(self) -> None:
        self.cache = GlobalCacheEngine(8, LRU, 0.65, 0.2, clock=Clock(), lower={"ssd": 10})
        self.cache.grow(8)
        self.is_usable = True
        self.slots = SlotAllocator(10)
        self.slots.allocate(10)
        cost = CostModel(1, Clock())
        self.tier = TierService(
            self.slots, cost, lambda: self.is_usable, lambda slots: slots >= 0, saves_directly=lambda: True
        )

    def ready(self, *sequence: int) -> int:
        return self.cache.match(keys_of(sequence)).num_ready


Chain = tuple[NDArray[np.uint64], NDArray[np.int32]]


def chain(sequence: tuple[int, ...], *slots: int) -> Chain:
    return keys_of(sequence), np.array(slots, dtype=np.int32)


def test_eviction_while_a_full_ssd_comes_into_service_leaves_out_what_lost_its_prefix() -> None:
    disk = Disk()

    def chains() -> Iterator[Chain]:
        yield chain((1, 2, 3), 0, 1, 2)
        while disk.ready(1, 2, 3):
            assert disk.cache.evict_ahead()                  # a request ends
        yield chain((1, 2, 4), -1, -1, 3)
        yield chain((1, 2, 4, 5), -1, -1, -1, 4)
        yield chain((7, 8), 5, 6)

    assert disk.cache.attach(1, disk.tier, chains())
    assert disk.ready(1, 2, 4) == 0
    assert disk.ready(7, 8) == 2
    disk.cache.free(1, np.array([7, 8, 9], dtype=np.int32))
    disk.cache.check_integrity()
    assert disk.slots.num_free == 8


@pytest.mark.parametrize("when", ["before", "between"])
def test_nothing_of_before_a_reset_comes_into_service(when: str) -> None:
    disk = Disk()

    def chains() -> Iterator[Chain]:
        yield chain((1, 2), 0, 1)
        disk.cache.reset()
        yield chain((7, 8), 2, 3)

    if when == "before":
        disk.cache.reset()
    assert not disk.cache.attach(1, disk.tier, chains())
    assert disk.ready(1, 2) == disk.ready(7, 8) == 0


def test_a_tier_that_is_out_of_service_loses_nothing_to_eviction_ahead_of_need() -> None:
    disk = Disk()
    assert disk.cache.attach(1, disk.tier, [chain(tuple(range(10)), *range(10))])
    disk.is_usable = False
    assert disk.cache.evict_ahead() == 0
    disk.is_usable = True
    assert disk.ready(*range(10)) == 10
    assert disk.cache.evict_ahead() == 2


@pytest.mark.parametrize("length", [9, 10, 12])
def test_a_put_larger_than_the_host_tier_has_its_first_blocks_on_ssd(length: int) -> None:
    """Nothing of it hangs on blocks in host memory, which may go before they are written."""
    disk = Disk()
    disk.slots.free(np.arange(10, dtype=np.int32))
    assert disk.cache.attach(1, disk.tier)
    for other in range(8):
        put(disk.cache, other)
    sequence = tuple(range(100, 100 + length))
    plan = disk.cache.begin_put(keys_of(sequence), 0, length, direct=True)
    direct, rest = plan.to(1), plan.to(HOST)
    assert direct is not None
    assert direct.blocks.tolist() == list(range(min(10, length)))
    assert plan.blocks.tolist() == list(range(length))
    assert (plan.slots_on(HOST)[:10] == -1).all()
    if rest is not None:
        assert rest.blocks.tolist() == list(range(10, length))
        assert plan.slots_on(HOST)[10:].tolist() == rest.dst.tolist()
    disk.cache.end_put(plan, np.ones(length, dtype=np.bool_))
    assert disk.ready(*sequence) == length
    assert sum(disk.ready(other) for other in range(8)) == 8 - max(0, length - 10)      # no more went than had to
    for other in range(8):
        put(disk.cache, other)
    assert disk.ready(*sequence) == min(10, length)
    disk.cache.check_integrity()


@pytest.mark.parametrize("num_later", [2, 8])
def test_a_put_straight_to_ssd_may_evict_later_blocks_of_its_own_sequence(num_later: int) -> None:
    """All of them, or some: those are absent then too, and come before the end of the sequence."""
    disk = Disk()
    disk.slots.free(np.arange(10, dtype=np.int32))
    assert disk.cache.attach(1, disk.tier)
    length = 3 + num_later + 1
    keys = keys_of(tuple(range(100, 100 + length)))
    first = disk.cache.begin_put(keys, 0, 3)
    pending = [disk.cache.begin_put(keys_of((other,)), 0, 1) for other in range(5)]     # the host tier is full
    later = disk.cache.begin_put(keys, 0, length - 1, direct=True)
    assert later.blocks.tolist() == list(range(3, length - 1))
    disk.cache.end_put(later, np.ones(num_later, dtype=np.bool_))
    for other in range(60, 62):
        disk.cache.end_put(disk.cache.begin_put(keys_of((other,)), 0, 1, direct=True), np.ones(1, dtype=np.bool_))
    if num_later == 2:
        pending.append(disk.cache.begin_put(keys_of(tuple(range(70, 76))), 0, 6, direct=True))
    assert disk.slots.num_free == 0
    disk.cache.end_put(first, np.zeros(3, dtype=np.bool_))
    pending += [disk.cache.begin_put(keys_of((other,)), 0, 1) for other in range(5, 8)]
    plan = disk.cache.begin_put(keys, 0, length, direct=True)     # for its first three blocks and its last
    assert [(move.target, move.blocks.tolist()) for move in plan.moves] == [(1, [0, 1, 2, 3])]
    disk.cache.end_put(plan, np.ones(4, dtype=np.bool_))
    assert disk.ready(*range(100, 100 + length)) == 4
    for each in pending:
        disk.cache.end_put(each, np.ones(len(each.blocks), dtype=np.bool_))
    disk.cache.check_integrity()


def test_of_a_put_what_was_not_written_is_not_there() -> None:
    disk = Disk()
    disk.slots.free(np.arange(10, dtype=np.int32))
    assert disk.cache.attach(1, disk.tier)
    sequence = tuple(range(100, 112))
    for lost in range(12):
        plan = disk.cache.begin_put(keys_of(sequence), 0, 12, direct=True)
        assert len(plan.blocks) == 12
        disk.cache.end_put(plan, np.arange(12) != lost)
        assert disk.ready(*sequence) == lost
        disk.cache.reset()
        disk.cache.check_integrity()
