"""Quotas: shares of tenants, the tenant that yields, and the reasons reported for blocks evicted by a quota."""

import math

import numpy as np
import pytest

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.config.namespaces import Quota
from flexkv.errors import ConfigError
from tests.property.model_tree import Prefix, keys_of


class Cache:
    """An engine with quotas, and a clock that stands still."""

    def __init__(self, num_slots: int, num_ssd_slots: int = 0, threshold: float = 1.0, **quotas: Quota) -> None:
        self.now = 0.0
        self.quotas = Quotas({"" if name == "default" else name: quota for name, quota in quotas.items()})
        self.engine = GlobalCacheEngine(
            num_slots, LRU, threshold, 0.0, clock=lambda: self.now, quotas=self.quotas,
            lower={"ssd": num_ssd_slots} if num_ssd_slots else None,
        )
        self.engine.grow(num_slots)
        self.cost = CostModel(1, lambda: self.now)
        self.ssd = TierService(
            SlotAllocator(num_ssd_slots), self.cost, lambda: True,
            lambda slots: np.ones(len(slots), dtype=np.bool_)
        )

    def put(self, name: str, *sequence: int) -> int:
        plan = self.engine.begin_put(keys_of(sequence), 0, len(sequence), self.quotas.tenant([name]))
        self.engine.end_put(plan, np.ones(len(plan), dtype=np.bool_))
        return len(plan)

    def get(self, name: str, *sequence: int) -> int:
        plan = self.engine.begin_get(keys_of(sequence), 0, len(sequence), tenant=self.quotas.tenant([name]))
        for move in plan.moves:
            self.engine.end_move(move, np.ones(len(move), dtype=np.bool_))
        self.engine.end_get(plan)
        return len(plan)

    def has(self, name: str, *sequence: int) -> tuple[int, MissReason]:
        found = self.engine.match(keys_of(sequence), tenant=self.quotas.tenant([name]))
        return found.num_ready, found.reason

    def blocks(self, name: str) -> int:
        return self.engine.stats()[f"namespace_{name}_blocks"]


def run(first: int, count: int) -> Prefix:
    return tuple([first, *range(count - 1)])


def test_a_request_belongs_to_the_first_name_that_has_a_quota() -> None:
    quotas = Quotas({"a": Quota(), "b": Quota()})
    assert quotas.names() == ["", "a", "b"]
    tenants = [quotas.tenant(names) for names in (["salt", "b"], ["b", "a"], ["a"], ["c"], [""], [], None)]
    assert tenants == [2, 2, 1, 0, 0, 0, 0]
    assert quotas.limit(1, 10) == 10
    assert Quotas({"a": Quota(guaranteed=0.29, limit=0.29)}).limit(1, 100) == 29       # 0.29 * 100 < 29
    with pytest.raises(ConfigError):
        Quotas({"a": Quota(guaranteed=2)})


def test_a_flood_takes_what_is_free_and_gives_it_back() -> None:
    cache = Cache(10, calm=Quota(guaranteed=0.4), flood=Quota())
    assert cache.put("calm", *run(1, 6)) == 6
    for i in range(20):
        cache.put("flood", *run(100 + i, 3))
    assert cache.has("calm", *run(1, 6)) == (6, MissReason.FULL_HIT)           # the flood has borrowed most
    for i in range(20):
        cache.put("flood", *run(200 + i, 7))
    assert cache.has("calm", *run(1, 6))[0] == cache.blocks("calm") == 4       # what is guaranteed to it
    assert cache.has("calm", *run(1, 6)) == (4, MissReason.EVICTED)
    assert cache.blocks("flood") == 6
    assert cache.put("calm", *run(1, 6)) == 2
    assert cache.put("calm", *run(2, 4)) == 4                   # its own are the oldest of what is borrowed
    assert 4 <= cache.blocks("calm") <= 10 - cache.blocks("flood")
    cache.engine.check_integrity()


def test_space_that_is_borrowed_comes_back_when_asked_for() -> None:
    cache = Cache(10, owner=Quota(guaranteed=0.6), flood=Quota())
    assert cache.put("flood", *run(1, 10)) == 10
    assert cache.put("owner", *run(2, 6)) == 6
    assert (cache.blocks("owner"), cache.blocks("flood")) == (6, 4)


def test_the_lowest_priority_gives_way_first_and_then_who_borrowed_most() -> None:
    cache = Cache(12, low=Quota(0.1, priority=-1), one=Quota(priority=1), two=Quota(priority=1), owner=Quota(0.5))
    for name, first, count in (("one", 1, 4), ("two", 2, 5), ("low", 3, 3)):
        assert cache.put(name, *run(first, count)) == count
    assert cache.put("owner", *run(4, 3)) == 3
    assert [cache.blocks(name) for name in ("low", "one", "two")] == [1, 4, 4]
    assert cache.put("owner", *run(5, 3)) == 3
    assert [cache.blocks(name) for name in ("low", "one", "two")] == [1, 4, 1] or cache.blocks("one") == 1
    assert cache.blocks("owner") == 6


def test_a_limit_is_never_exceeded_and_is_told() -> None:
    cache = Cache(10, hard=Quota(limit=0.3))
    assert cache.put("hard", *run(1, 5)) == 3
    assert cache.has("hard", *run(1, 5)) == (3, MissReason.OVER_QUOTA)
    assert cache.put("hard", *run(2, 2)) == 2
    assert cache.has("hard", *run(1, 5)) == (1, MissReason.OVER_QUOTA)         # what went for it
    assert cache.blocks("hard") == 3
    assert cache.engine.stats()["free_slots"] == 7


def test_all_others_can_have_a_limit_alone() -> None:
    cache = Cache(10, default=Quota(limit=0.5))
    assert cache.put("anyone", *run(1, 4)) == 4
    assert cache.put("anyone", *run(2, 4)) == 4
    assert cache.engine.stats()["free_slots"] == 5


def test_what_is_kept_no_longer_is_not_offered_and_is_swept() -> None:
    cache = Cache(10, short=Quota(ttl_s=10), other=Quota())
    cache.put("short", *run(1, 3))
    cache.put("other", *run(2, 3))
    cache.now = 8.0
    assert cache.get("short", *run(1, 1)) == 1
    cache.now = 12.0
    assert cache.has("short", *run(1, 3)) == (1, MissReason.EXPIRED)
    assert cache.engine.match(keys_of(run(1, 3)), tenant=1).evicted_at == pytest.approx(10.0, abs=1.0)
    assert cache.engine.evict_ahead() == 2
    assert cache.has("short", *run(1, 3)) == (1, MissReason.EXPIRED)
    cache.now = 100.0
    assert cache.has("short", *run(1, 3)) == (0, MissReason.EXPIRED)
    assert cache.has("other", *run(2, 3)) == (3, MissReason.FULL_HIT)
    cache.engine.evict_ahead()
    assert cache.engine.stats()["expired_blocks"] == 3
    assert cache.blocks("short") == 0


def test_a_put_of_what_is_out_of_date_makes_it_new() -> None:
    cache = Cache(10, short=Quota(ttl_s=10))
    cache.put("short", *run(1, 3))
    cache.now = 50.0
    assert cache.has("short", *run(1, 3)) == (0, MissReason.EXPIRED)
    assert cache.put("short", *run(1, 3)) == 0                  # it is there, and was just computed
    assert cache.has("short", *run(1, 3)) == (3, MissReason.FULL_HIT)


def test_what_was_found_on_disk_is_others_until_it_is_used() -> None:
    cache = Cache(10, 20, short=Quota(limit=0.1, ttl_s=10), other=Quota())
    keys, slots = keys_of(run(1, 4)), cache.ssd.slots.allocate(4)
    assert slots is not None
    assert cache.engine.attach(1, cache.ssd, [(keys, slots)])
    assert cache.engine.stats()["ssd_namespace_default_blocks"] == 4
    assert cache.get("short", *run(1, 4)) == 1                  # all that its limit on the host allows
    assert cache.engine.stats()["ssd_namespace_short_blocks"] == 1
    assert cache.has("short", *run(1, 4)) == (4, MissReason.FULL_HIT)
    cache.now = 100.0
    assert cache.has("short", *run(1, 4)) == (0, MissReason.EXPIRED)           # by the time of who asks


def test_what_comes_to_exceed_a_limit_is_trimmed() -> None:
    cache = Cache(10, 20, short=Quota(limit=0.1), other=Quota())
    keys, slots = keys_of(run(1, 4)), cache.ssd.slots.allocate(4)
    assert slots is not None
    assert cache.engine.attach(1, cache.ssd, [(keys, slots)])
    assert cache.put("short", *run(1, 5)) == 1                  # a use of what was on disk
    assert cache.engine.stats()["ssd_namespace_short_blocks"] == 4
    cache.engine.evict_ahead()
    assert cache.engine.stats()["ssd_namespace_short_blocks"] == 2
    cache.engine.check_integrity()


def test_what_left_the_host_and_was_not_on_ssd_is_told() -> None:
    cache = Cache(2, 8)
    cache.engine.attach(1, cache.ssd)
    cache.put("", 1, 1)
    cache.put("", 2)
    assert cache.has("", 1, 1) == (1, MissReason.NOT_ADMITTED)
    plan = cache.engine.begin_write_back(1, keys_of((2,)), 1)
    assert plan is not None
    cache.engine.end_move(plan, np.ones(1, dtype=np.bool_))
    cache.put("", 3, 3)
    assert cache.has("", 2) == (1, MissReason.FULL_HIT)
    cache.engine._lower[0].evict(cache.engine._tree, 1, cache.now)
    assert cache.has("", 2) == (0, MissReason.EVICTED)
    assert math.isfinite(cache.engine.match(keys_of((2,))).evicted_at)
