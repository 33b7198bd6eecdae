"""A full index, and blocks that no match reaches: plans become shorter, nothing raises, and nothing leaks."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.config.namespaces import Quota
from flexkv.errors import CapacityError, PinError
from tests.property.model_tree import keys_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Full:
    """A tree that can be made to refuse some of its calls, as a full one does."""

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self.refuses: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name in self.refuses:
            return self._refuse
        return getattr(self._tree, name)

    def _refuse(self, *args: Any) -> None:
        raise CapacityError("the index is full")


class Two:
    """An engine of host and SSD slots, whose index can be made full."""

    def __init__(self, num_host: int = 8, num_ssd: int = 16, quotas: Quotas | None = None) -> None:
        self.cache = GlobalCacheEngine(num_host, LRU, 1.0, 0.0, clock=Clock(), lower={"ssd": num_ssd}, quotas=quotas)
        self.cache.grow(num_host)
        self.num_host, self.num_ssd = num_host, num_ssd
        self.slots = SlotAllocator(num_ssd)
        cost = CostModel(1, Clock())
        self.loads_directly = False
        self.tier = TierService(
            self.slots, cost, lambda: True, lambda slots: slots >= 0,
            loads_directly=lambda: self.loads_directly, saves_directly=lambda: True,
        )
        assert self.cache.attach(1, self.tier)

    def fill_up(self, *names: str) -> Full:
        """From now on these calls of the index find it full."""
        full = Full(self.cache._tree)
        full.refuses = set(names)
        self.cache._tree = full                            # type: ignore[assignment]
        return full

    def put(self, *sequence: int, lost: tuple[int, ...] = (), direct: bool = False, tenant: int = 0) -> int:
        plan = self.cache.begin_put(keys_of(sequence), 0, len(sequence), tenant, direct)
        ok = ~np.isin(plan.blocks, lost)
        self.cache.end_put(plan, ok)
        return int(ok.sum())

    def write(self, *sequence: int, lost: tuple[int, ...] = ()) -> int:
        plan = self.cache.begin_write_back(1, keys_of(sequence), len(sequence))
        if plan is None:
            return 0
        self.cache.end_move(plan, ~np.isin(plan.blocks, lost))
        return len(plan)

    def sink(self, *sequence: int) -> None:
        """To SSD, and away from host memory."""
        assert self.write(*sequence) == len(sequence)
        self.cache._host.evict(self.cache._tree, self.num_host, 1e6)

    def ready(self, *sequence: int) -> int:
        return self.cache.match(keys_of(sequence)).num_ready

    def check_nothing_is_lost(self) -> None:
        if isinstance(self.cache._tree, Full):
            self.cache._tree = self.cache._tree._tree
        self.cache.check_integrity()
        self.cache.reset()
        stats = self.cache.stats()
        assert (stats["free_slots"], stats["ssd_free_slots"]) == (self.num_host, self.num_ssd)


# ---- the five places ------------------------------------------------------------------------------------------------


def test_begin_put() -> None:
    two = Two()
    full = two.fill_up("insert")
    plan = two.cache.begin_put(keys_of((1, 2, 3)), 0, 3)
    assert len(plan.blocks) == 0
    two.cache.end_put(plan, np.zeros(0, dtype=np.bool_))
    assert two.cache.stats()["free_slots"] == 8
    full.refuses.clear()
    assert two.put(1, 2, 3) == 3
    two.check_nothing_is_lost()


def test_direct_put() -> None:
    two = Two()
    full = two.fill_up("insert")
    plan = two.cache.begin_put(keys_of(tuple(range(12))), 0, 12, direct=True)
    assert plan.moves == ()
    two.cache.end_put(plan, np.zeros(len(plan.blocks), dtype=np.bool_))
    full.refuses.clear()
    assert two.put(*range(12), direct=True) == 12
    two.check_nothing_is_lost()


@pytest.mark.parametrize("refused", ["acquire", "touch"])
def test_begin_get(refused: str) -> None:
    two = Two()
    two.put(1, 2, 3)
    full = two.fill_up(refused)
    plan = two.cache.begin_get(keys_of((1, 2, 3)), 0, 3)
    assert (len(plan), plan.reason) == ((0, MissReason.NO_ROOM) if refused == "acquire" else (3, MissReason.FULL_HIT))
    two.cache.end_get(plan)
    full.refuses.clear()
    plan = two.cache.begin_get(keys_of((1, 2, 3)), 0, 3)
    assert len(plan) == 3
    two.cache.end_get(plan)
    two.check_nothing_is_lost()


@pytest.mark.parametrize("direct", [False, True])
def test_a_get_of_blocks_on_ssd_that_cannot_be_acquired(direct: bool) -> None:
    two = Two()
    two.put(1, 2, 3)
    two.sink(1, 2, 3)
    full, two.loads_directly = two.fill_up("acquire"), direct
    plan = two.cache.begin_get(keys_of((1, 2, 3)), 0, 3)
    assert (len(plan), plan.moves, plan.joins) == (0, (), ())
    two.cache.end_get(plan)
    full.refuses.clear()
    two.check_nothing_is_lost()


@pytest.mark.parametrize("refused", ["insert", "second acquire"])
def test_a_fetch(refused: str) -> None:
    two = Two()
    two.put(1, 2, 3)
    two.sink(1, 2, 3)
    full = two.fill_up(*({"insert"} & {refused}))
    if refused == "second acquire":
        acquire, calls = two.cache._tree.acquire, []

        def second(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 3:                            # of the get, of the room that is made, of the fetch
                full._refuse()
            acquire(*args)

        full.acquire = second                              # type: ignore[attr-defined]
    plan = two.cache.begin_get(keys_of((1, 2, 3)), 0, 3)
    assert (len(plan), plan.moves, plan.joins, plan.reason) == (0, (), (), MissReason.NO_ROOM)
    two.cache.end_get(plan)
    assert two.cache.stats()["blocks_being_fetched"] == 0
    two.check_nothing_is_lost()


@pytest.mark.parametrize("refused", ["insert", "second acquire"])
def test_begin_write(refused: str) -> None:
    two = Two()
    two.put(1, 2, 3)
    full = two.fill_up(*({"insert"} & {refused}))
    if refused == "second acquire":
        acquire, calls = two.cache._tree.acquire, []

        def second(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:                            # of the room that is made, of the write
                full._refuse()
            acquire(*args)

        full.acquire = second                              # type: ignore[attr-defined]
    assert two.cache.begin_write_back(1, keys_of((1, 2, 3)), 3) is None
    del full.refuses
    two.check_nothing_is_lost()


def test_a_user_cannot_pin_what_the_index_has_no_room_for() -> None:
    two = Two()
    two.put(1, 2, 3)
    two.fill_up("pin")
    with pytest.raises(PinError, match="no room"):
        two.cache.pin(keys_of((1, 2)), "p")
    assert two.cache.pins() == []
    two.check_nothing_is_lost()


def test_an_ssd_tier_that_comes_into_a_full_index_gives_its_slots_back() -> None:
    cache = GlobalCacheEngine(2, LRU, 1.0, 0.0, clock=Clock(), lower={"ssd": 2})
    cache.grow(2)
    slots = SlotAllocator(40)
    taken = slots.allocate(40)
    assert taken is not None
    tier = TierService(slots, CostModel(1, Clock()), lambda: True, lambda slots: slots >= 0)
    chains = [(keys_of((number, *range(4))), taken[5 * number : 5 * number + 5]) for number in range(8)]
    assert cache.attach(1, tier, chains)
    assert cache.stats()["indexed_blocks"] <= 8
    assert slots.num_free == 40 - cache.stats()["indexed_blocks"]


# ---- holes ----------------------------------------------------------------------------------------------------------


def test_an_index_full_of_holes_takes_new_puts() -> None:
    cache = GlobalCacheEngine(16, LRU, 1.0, 0.0, clock=Clock())
    cache.grow(16)
    for seed in range(12):
        plan = cache.begin_put(keys_of((seed, *range(7))), 0, 8)
        assert len(plan) == 8
        cache.end_put(plan, np.arange(8) == 7)             # the last block alone arrives
        cache.check_integrity()
    plan = cache.begin_put(keys_of(tuple(range(100, 116))), 0, 16)
    assert len(plan) == 16
    cache.end_put(plan, np.ones(16, dtype=np.bool_))
    cache.check_integrity()


def test_a_put_is_cut_to_what_the_index_can_take() -> None:
    cache = GlobalCacheEngine(16, LRU, 1.0, 0.0, clock=Clock())
    cache.grow(16)
    plans = []
    for seed in range(4):                                  # 7 of 8 blocks are lost, and the last one is read
        keys = keys_of((seed, *range(7)))
        plan = cache.begin_put(keys, 0, 8)
        cache.end_put(plan, np.ones(8, dtype=np.bool_))
        get = cache.begin_get(keys, 7, 8)
        tree, lost = cache._tree, np.arange(8) < 7
        slots = tree.slots(keys, 0)
        tree.drop(keys, np.where(lost, slots, -1).astype(np.int32), 0, failed=True)
        cache._host.slots.free(slots[lost])
        plans.append(get)
    assert cache.stats()["indexed_blocks"] == 32
    assert cache.stats()["free_slots"] == 12
    plan = cache.begin_put(keys_of((9, 9)), 0, 2)
    assert len(plan) == 0
    cache.end_put(plan, np.zeros(0, dtype=np.bool_))
    again = cache.begin_put(keys_of((0, *range(7))), 0, 8)      # the holes themselves can be filled
    assert again.blocks.tolist() == list(range(7))
    cache.end_put(again, np.ones(7, dtype=np.bool_))
    for get in plans:
        cache.end_get(get)
    assert cache.match(keys_of((0, *range(7)))).num_ready == 8
    plan = cache.begin_put(keys_of((9, 9)), 0, 2)
    assert len(plan) == 2
    cache.end_put(plan, np.ones(2, dtype=np.bool_))
    assert cache.match(keys_of((0, *range(7)))).num_ready == 8      # what can be reached has stayed
    cache.check_integrity()
    cache.reset()
    assert cache.stats()["free_slots"] == 16


def test_what_no_match_reaches_goes_before_what_was_used_longest_ago() -> None:
    two = Two(num_host=8)
    two.put(1, 1)                                          # oldest
    two.put(2, 2, 2, 2, lost=(1,))                         # two blocks behind the lost one
    two.put(2, 9)
    assert two.cache.stats()["free_slots"] == 2
    two.put(3, 3, 3, 3)
    assert [two.ready(1, 1), two.ready(2), two.ready(2, 9), two.ready(3, 3, 3, 3)] == [2, 1, 2, 4]
    two.check_nothing_is_lost()


def test_what_lies_behind_a_block_that_ssd_lost_is_freed_first_on_both_tiers() -> None:
    two = Two(num_host=8, num_ssd=8)
    two.put(0, 1, 2, 3)
    two.sink(0, 1, 2, 3)
    two.put(7, 7)
    two.sink(7, 7)                                         # least recently used but for what is out of reach
    get = two.cache.begin_get(keys_of((0, 1, 2, 3)), 0, 4)
    two.cache.end_move(get.moves[0], np.array([True, False, True, True]))
    two.cache.end_get(get)
    two.cache._host.evict(two.cache._tree, 1, 1e6)
    assert two.ready(0, 1, 2, 3) == 1
    two.put(*range(20, 25))
    assert two.write(*range(20, 25)) == 5
    assert two.ready(7, 7) == 2
    assert two.ready(*range(20, 25)) == 5
    two.check_nothing_is_lost()


def test_what_eviction_from_host_memory_cuts_off_on_ssd_is_freed_first() -> None:
    two = Two(num_host=8, num_ssd=6)
    two.put(0, 1, 2, 3)
    two.write(0, 1, 2, 3, lost=(1,))                       # block 1 is in host memory alone
    two.cache._host.evict(two.cache._tree, 8, 1e6)
    assert two.ready(0, 1, 2, 3) == 1
    assert two.cache.stats()["ssd_free_slots"] == 3        # blocks 0, 2 and 3
    two.put(7, 7, 7, 7, 7)
    assert two.write(7, 7, 7, 7, 7) == 5
    assert two.ready(0, 1) == 1
    two.check_nothing_is_lost()


def test_a_hole_that_is_filled_again_brings_back_what_is_behind_it() -> None:
    two = Two(num_host=8)
    two.put(2, 2, 2, 2, lost=(1,))
    assert two.put(2, 2, 2, 2) == 1
    assert two.ready(2, 2, 2, 2) == 4
    two.put(3, 3, 3, 3)
    two.put(4)
    assert two.ready(2, 2, 2, 2) == 3                      # by age, from its end
    two.check_nothing_is_lost()


def test_a_tenant_over_its_limit_loses_first_what_is_out_of_reach() -> None:
    two = Two(8, 16, Quotas({"a": Quota(limit=0.5)}))
    two.put(1, 1, tenant=1)
    two.put(2, 2, lost=(0,), tenant=1)
    two.put(3, 3, tenant=0)
    assert two.put(4, tenant=1) == 1
    assert two.put(5, tenant=1) == 1                        # of 4 blocks one is out of reach
    assert (two.ready(1, 1), two.ready(3, 3), two.ready(4), two.ready(5)) == (2, 2, 1, 1)
    two.check_nothing_is_lost()


def test_blocks_out_of_reach_that_are_pinned_or_written_stay_until_they_are_not() -> None:
    two = Two(num_host=6)
    two.put(0, 1, 2, 3, 4)
    keys = keys_of((0, 1, 2, 3, 4))
    get = two.cache.begin_get(keys, 3, 4)
    tree, slots = two.cache._tree, two.cache._tree.slots(keys, 0)
    tree.drop(keys, np.where(np.arange(5) == 1, slots, -1).astype(np.int32), 0)
    two.cache._host.slots.free(slots[1:2])
    assert two.put(9, 9, 9, 9) == 4                        # two were free; blocks 2 and 4 went
    two.cache.check_integrity()
    held: NDArray[np.int32] = two.cache._tree.slots(keys, 0)
    assert (held >= 0).tolist() == [True, False, False, True, False]
    two.cache.end_get(get)
    assert two.put(8) == 1
    assert two.ready(9, 9, 9, 9) == 4
    assert two.ready(0) == 1
    two.check_nothing_is_lost()


def test_many_holders_of_one_block() -> None:
    cache = GlobalCacheEngine(4, partial(LRU), 1.0, 0.0, clock=Clock())
    cache.grow(4)
    plan = cache.begin_put(keys_of((1,)), 0, 1)
    cache.end_put(plan, np.ones(1, dtype=np.bool_))
    keys = keys_of((1,))
    plans = [cache.begin_get(keys, 0, 1) for _ in range(65_540)]
    assert all(len(plan) == 1 for plan in plans)
    for get in plans:
        cache.end_get(get)
    cache.check_integrity()
    cache.reset()
    assert cache.stats()["free_slots"] == 4
