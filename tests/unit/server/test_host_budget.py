"""The budget of a daemon's pools, against pools that the test moves: it is never exceeded, and shares settle."""

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.errors import CapacityError
from flexkv.server.host_budget import EXTENT_BYTES, PART_BYTES, HostBudget, Share

PAGE = mmap.PAGESIZE


class Pool:
    """A pool whose ranks follow when the test says so."""

    def __init__(self, budget: HostBudget, name: str = "", slot_bytes: int = PAGE) -> None:
        self.slots = 0
        self.missing = 0                             # slots that were asked for when memory ran out
        self.is_growing = False
        self.has_engines = True
        self.moved_blocks = self.evicted = self.num_free = 0
        self.target: int | None = None
        self.follows = self.yields = True
        self.share: Share = budget.open(name)
        self.share.pool = self
        self.max_slots, _, self.fixed_slots = self.share.begin(slot_bytes)

    @property
    def resizing(self) -> "Pool":
        return self

    @property
    def is_shrinking(self) -> bool:
        return self.target is not None

    @property
    def may_shrink(self) -> bool:
        return not self.is_growing and not self.is_shrinking

    @property
    def slots_with_memory(self) -> int:
        return self.slots - self.missing

    def grow(self, num_slots: int) -> None:
        assert self.slots < num_slots <= self.max_slots
        assert self.target is None
        self.slots = num_slots

    def shrink(self, num_slots: int) -> None:
        assert self.fixed_slots <= num_slots < self.slots
        assert self.target is None
        self.target = num_slots

    def step(self) -> None:
        if self.target is not None and self.follows:
            self.slots = self.target if self.yields else self.slots
            self.target, self.missing = None, self.missing * (not self.yields)

    def evicted_and_free(self) -> tuple[int, int]:
        return self.evicted, self.num_free

    def work(self, blocks: int) -> None:
        """Move blocks, and evict others for them."""
        self.moved_blocks += blocks
        self.evicted += blocks


class Node:
    def __init__(self, num_pages: int, extent: int = 4) -> None:
        self.now = 0.0
        self.budget = HostBudget(num_pages * PAGE, None, extent * PAGE, lambda: self.now)

    def turns(self, number: int, *pools: tuple[Pool, int]) -> None:
        for _ in range(number):
            for pool, blocks in pools:
                pool.work(blocks)
            self.now += 0.5
            self.budget.balance()


def two_pools() -> tuple[Node, Pool, Pool]:
    """Two pools of equal use that have divided the budget."""
    node = Node(96)
    one, two = Pool(node.budget), Pool(node.budget)
    node.turns(100, (one, 10), (two, 10))
    return node, one, two


def test_a_pool_grows_while_it_needs_slots_and_memory_is_unassigned() -> None:
    node = Node(100)
    pool = Pool(node.budget)
    first = pool.slots
    assert 0 < first < 100
    pool.num_free = first
    node.turns(5)
    assert pool.slots == first                       # enough is free
    pool.num_free = 1
    node.turns(30)
    assert pool.slots == 100 == pool.max_slots       # the last extent is not a whole one, if all is taken
    assert node.budget.held_bytes == 100 * PAGE


def test_a_new_pool_takes_memory_of_the_one_that_is_used_least() -> None:
    node = Node(96)
    busy, idle = Pool(node.budget), Pool(node.budget)
    node.turns(60, (busy, 10), (idle, 10))
    before = busy.slots, idle.slots
    assert sum(before) == 96
    busy.num_free = 96                               # it needs no more
    node.turns(200, (busy, 10))
    third = Pool(node.budget)
    assert third.slots == 0
    node.turns(3)
    assert third.slots == 4
    assert (busy.slots, idle.slots) == (before[0], before[1] - 4)


def test_memory_follows_use_and_two_equal_pools_leave_each_other_alone() -> None:
    node, one, two = two_pools()
    settled = one.slots, two.slots
    node.turns(200, (one, 10), (two, 10))
    assert (one.slots, two.slots) == settled
    node.turns(600, (one, 40), (two, 1))
    assert one.slots > 72
    assert two.slots >= 4                            # with an engine, an extent is kept
    node.turns(1200, (one, 1), (two, 40))
    assert two.slots > 72


def test_a_pool_without_engines_yields_all_and_first() -> None:
    node, one, two = two_pools()
    two.has_engines = False
    node.turns(100, (one, 1))
    assert (one.slots, two.slots) == (96, 0)
    assert two.share.is_spent
    node.budget.close(two.share)
    assert node.budget.held_bytes == 96 * PAGE


def test_a_guarantee_is_reserved_before_the_pool_exists_and_after_it() -> None:
    node = Node(96)
    node.budget.reserve("kept", 38 * PAGE)           # 40 in whole extents
    one = Pool(node.budget)
    node.turns(100, (one, 10))
    assert one.slots == 56                           # in whole extents
    kept = Pool(node.budget, "kept")
    assert kept.slots == kept.fixed_slots == 40
    kept.has_engines = False
    node.turns(100, (one, 10))
    assert (one.slots, kept.slots) == (56, 40)
    node.budget.close(kept.share)
    node.turns(100, (one, 10))
    assert one.slots == 56


def test_a_pool_that_does_not_shrink_keeps_its_memory_and_others_are_asked() -> None:
    node, stopped, other = two_pools()
    stopped.follows = False
    node.turns(200, (other, 10))
    assert stopped.is_shrinking
    held = stopped.slots
    third = Pool(node.budget)
    node.turns(20, (other, 10))
    assert third.slots > 0
    assert stopped.slots == held
    stopped.follows, stopped.yields = True, False
    node.turns(1)
    assert stopped.slots == stopped.share.slots == held            # it has given up, and has what it had


def test_a_pool_whose_memory_has_run_out_keeps_whole_extents_and_grows_later() -> None:
    node = Node(96)
    pool = Pool(node.budget)
    node.turns(3, (pool, 10))
    pool.missing = 6                                 # less than two extents
    expected = pool.slots - 8
    node.turns(1, (pool, 10))
    assert pool.target == expected
    node.turns(1, (pool, 10))
    assert pool.slots == pool.share.slots == expected
    node.turns(10, (pool, 10))                       # 5 s
    assert pool.slots == expected
    node.turns(20, (pool, 10))
    assert pool.slots > expected


def test_a_guarantee_for_which_memory_has_run_out_is_not_given_back() -> None:
    node = Node(96)
    node.budget.reserve("kept", 40 * PAGE)
    pool = Pool(node.budget, "kept")
    slots = pool.slots
    pool.missing = slots - 34
    node.turns(50, (pool, 10))
    assert (pool.slots, pool.target) == (slots, None)


def test_extents_consist_of_parts_that_ranks_pin() -> None:
    budget = HostBudget(1 << 36)
    for slot_bytes in (4096, 300 << 10, 5 << 20, 40 << 20, 100 << 20):
        pool = Pool(budget, slot_bytes=slot_bytes)
        part = max(1, PART_BYTES // slot_bytes)
        assert pool.share.extent_slots % part == 0
        assert pool.share.extent_slots * slot_bytes >= EXTENT_BYTES
    small = Pool(HostBudget(100 << 20), slot_bytes=4096)
    assert small.share.extent_slots == PART_BYTES // 4096


def test_blocks_of_the_first_pool_make_the_budget() -> None:
    budget = HostBudget(1 << 40, 24, 4 * PAGE)
    assert Pool(budget, slot_bytes=2 * PAGE).max_slots == 24
    assert Pool(budget).max_slots == 48
    with pytest.raises(CapacityError, match="cpu_cache_gb"):
        Pool(budget, slot_bytes=1000 * PAGE)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["open", "work", "free", "leave", "come", "stop", "go", "refuse", "close"]),
              st.integers(0, 7)),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), ACTIONS)
def test_the_budget_is_never_exceeded(num_pages: int, actions: list[tuple[str, int]]) -> None:
    node = Node(num_pages)
    node.budget.reserve("kept", num_pages // 3 * PAGE)
    pools: list[Pool] = []
    for name, n in actions:
        pool = pools[n % len(pools)] if pools else None
        if name == "open" and len(pools) < 5:
            pools.append(Pool(node.budget, "kept" if n == 0 else "", PAGE * (1 + n % 2) if num_pages > 1 else PAGE))
        elif pool is None:
            continue
        elif name == "work":
            pool.num_free = 0
            node.turns(n, (pool, 5))
        elif name == "free":
            pool.num_free = n * 10
        elif name in ("leave", "come"):
            pool.has_engines = name == "come"
        elif name in ("stop", "go"):
            pool.follows, pool.yields = name == "go", True
        elif name == "refuse":
            pool.yields = False
        elif name == "close" and not pool.slots:
            pools.remove(pool)
            node.budget.close(pool.share)
        node.turns(1)
        used = sum(max(pool.share.bytes_of(pool.slots), pool.share.guaranteed_bytes) for pool in pools)
        assert used <= node.budget.held_bytes <= num_pages * PAGE
        assert all(pool.slots == pool.share.slots >= pool.fixed_slots for pool in pools)
