"""Quotas, TTL and pins: random requests of several namespaces on two tiers, against the guarantee of each."""

import math
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import POLICIES
from flexkv.cache.lower_tier import TierService, absent_blocks
from flexkv.cache.plan import GetPlan, PutPlan
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.cache.tier import HOST
from flexkv.config.namespaces import Quota
from flexkv.errors import PinError

from .examples import EXAMPLES
from .model_tree import Prefix, keys_of

SSD = 1
NUM_HOST = 10
NUM_SSD = 14
QUOTAS = {
    "": Quota(guaranteed=0.1, limit=0.8, ttl_s=40.5),
    "soft": Quota(guaranteed=0.4, priority=2),
    "hard": Quota(guaranteed=0.2, limit=0.4, priority=1, ttl_s=15.5),
    "guest": Quota(),
}
GROUPS = range(len(QUOTAS))
TTL_S = [quota.ttl_s for quota in QUOTAS.values()]
PRIORITY = [quota.priority for quota in QUOTAS.values()]
CAPACITY = {HOST: NUM_HOST, SSD: NUM_SSD}
MAX_PINNED = 6
# Of each namespace a few that share prefixes, and of each some that are enough to flood a tier.
ENDS = [(0, 0), (0, 0, 0, 0), (0, 1, 1), (1,), (1, 1, 1, 1, 1, 1), (2, 2, 2), (3, 3, 3, 3)]
SEQUENCES = st.tuples(st.sampled_from(GROUPS), st.sampled_from(ENDS)).map(lambda pair: (pair[0], *pair[1]))
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([
            "put", "put", "put", "put", "get", "get", "write", "write", "begin_put", "end_put", "begin_get", "end_get",
            "pin", "pin", "unpin", "ahead", "wait", "reset",
        ]),
        SEQUENCES,
        st.integers(0, 63),
    ),
    min_size=10, max_size=40,
)


def ones(count: int) -> NDArray[np.bool_]:
    return np.ones(count, dtype=np.bool_)


@dataclass
class Checked:
    """The engine, and what is known of each block: when it was used last, and whether it is pinned."""

    policy: str
    now: float = 100.0
    used_at: dict[Prefix, float] = field(default_factory=dict)
    pins: dict[str, Prefix] = field(default_factory=dict)
    puts: list[PutPlan] = field(default_factory=list)
    gets: list[GetPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.quotas = Quotas(QUOTAS)
        self.engine = GlobalCacheEngine(
            NUM_HOST, POLICIES[self.policy], 0.9, 0.0, clock=lambda: self.now, lower={"ssd": NUM_SSD},
            quotas=self.quotas, max_pinned_share=MAX_PINNED / NUM_HOST,
        )
        self.engine.grow(NUM_HOST)
        cost = CostModel(1, lambda: self.now)
        usable = TierService(SlotAllocator(NUM_SSD), cost, lambda: True, lambda slots: ones(len(slots)))
        assert self.engine.attach(1, usable)

    def used(self) -> dict[int, list[int]]:
        """Blocks of each tenant on each tier."""
        tree = self.engine._tree
        return {tier: tree.eviction_queues(tier).blocks().sum(axis=1).tolist() for tier in CAPACITY}

    def use(self, sequence: Prefix, count: int) -> None:
        for length in range(1, count + 1):
            self.used_at[sequence[:length]] = self.now

    def is_pinned(self, block: Prefix) -> bool:
        return any(pinned[: len(block)] == block for pinned in self.pins.values())

    # ---- requests ---------------------------------------------------------------------------------------------

    def begin_put(self, sequence: Prefix, seed: int) -> None:
        tenant, keys = sequence[0], keys_of(sequence)
        before, idle = self.used(), not self.puts and not self.gets
        wanted = len(absent_blocks(self.engine._tree, self.engine._lower, keys))
        plan = self.engine.begin_put(keys, 0, len(keys), tenant)
        self.use(sequence, len(plan.keys))
        self.puts.append(plan)
        self.check_given_way(before, tenant)
        after = self.used()
        guaranteed = self.quotas.guaranteed(tenant, NUM_HOST)
        if idle:                            # nothing is read or written: what was promised is there, whatever is pinned
            assert after[HOST][tenant] >= min(guaranteed, before[HOST][tenant] + wanted)
            self.check_priority(before[HOST], after[HOST], tenant)

    def check_given_way(self, before: dict[int, list[int]], requester: int) -> None:
        """No tenant fell below its guarantee by the request of another."""
        for tier, counts in self.used().items():
            for tenant in GROUPS:
                guaranteed = self.quotas.guaranteed(tenant, CAPACITY[tier])
                if tenant != requester:
                    assert counts[tenant] >= min(before[tier][tenant], guaranteed)

    def check_priority(self, before: list[int], after: list[int], requester: int) -> None:
        """The tenant that yielded had the lowest priority of the tenants that had borrowed evictable blocks."""
        gave = [tenant for tenant in GROUPS if tenant != requester and after[tenant] < before[tenant]]
        pinned = self.engine._pins.blocks
        for tenant in gave:
            for other in set(GROUPS) - {requester}:
                if PRIORITY[other] < PRIORITY[tenant]:
                    assert after[other] <= max(self.quotas.guaranteed(other, NUM_HOST), pinned[other])

    def end_put(self, sequence: Prefix, seed: int) -> None:
        if self.puts:
            plan = self.puts.pop(seed % len(self.puts))
            self.engine.end_put(plan, ones(len(plan)))

    def put(self, sequence: Prefix, seed: int) -> None:
        self.begin_put(sequence, seed)
        plan = self.puts.pop()
        self.engine.end_put(plan, ones(len(plan)))
        if not self.puts:                                   # also what was out of date: it has just been computed
            assert self.engine.match(keys_of(sequence), tenant=sequence[0]).num_ready >= len(plan.keys)

    def begin_get(self, sequence: Prefix, seed: int) -> None:
        tenant, keys, before = sequence[0], keys_of(sequence), self.used()
        plan = self.engine.begin_get(keys, seed % 2, len(keys), tenant=tenant)
        self.check_fresh(sequence, plan.stop)
        self.use(sequence, plan.stop)
        for move in plan.moves:
            self.engine.end_move(move, ones(len(move)))
        self.gets.append(plan)
        self.check_given_way(before, tenant)

    def end_get(self, sequence: Prefix, seed: int) -> None:
        if self.gets:
            self.engine.end_get(self.gets.pop(seed % len(self.gets)))

    def get(self, sequence: Prefix, seed: int) -> None:
        self.begin_get(sequence, seed)
        self.engine.end_get(self.gets.pop())

    def write(self, sequence: Prefix, seed: int) -> None:
        before = self.used()
        plan = self.engine.begin_write_back(1, keys_of(sequence), 1 + seed % 4)
        if plan is not None:
            self.engine.end_move(plan, ones(len(plan)))
        self.check_given_way(before, sequence[0])

    # ---- the rest ---------------------------------------------------------------------------------------------

    def pin(self, sequence: Prefix, seed: int) -> None:
        before, name = self.engine.stats(), f"pin {seed % 5}"
        try:
            pin = self.engine.pin(keys_of(sequence), name, sequence[0])
        except PinError:
            assert self.engine.stats() == before
            assert [pin.name for pin in self.engine.pins()] == list(self.pins)
        else:
            assert name not in self.pins
            self.check_fresh(sequence, pin.num_blocks)
            self.use(sequence, pin.num_blocks)
            self.pins[name] = sequence[: pin.num_blocks]

    def unpin(self, sequence: Prefix, seed: int) -> None:
        name = f"pin {seed % 5}"
        if name in self.pins:
            assert self.engine.unpin(name).num_blocks == len(self.pins.pop(name))

    def ahead(self, sequence: Prefix, seed: int) -> None:
        before, expired = self.used(), self.expired()
        self.engine.evict_ahead()
        gone = self.expired()
        for tier, counts in self.used().items():
            lost = gone[tier] - expired[tier]
            promised = [
                min(have, self.quotas.guaranteed(tenant, CAPACITY[tier])) for tenant, have in enumerate(before[tier])
            ]
            assert sum(max(0, most - have) for most, have in zip(promised, counts, strict=True)) <= lost

    def expired(self) -> dict[int, int]:
        stats = self.engine.stats()
        return {HOST: stats["expired_blocks"], SSD: stats["ssd_expired_blocks"]}

    def wait(self, sequence: Prefix, seed: int) -> None:
        self.now += seed

    def reset(self, sequence: Prefix, seed: int) -> None:
        if seed < 8:                                        # seldom
            self.engine.reset()
            self.pins.clear()
            self.used_at.clear()
            assert self.engine.pins() == []

    # ---- what must hold ---------------------------------------------------------------------------------------

    def check_fresh(self, sequence: Prefix, count: int) -> None:
        """Blocks that are offered were used not too long ago, or are pinned."""
        for length in range(1, count + 1):
            block = sequence[:length]
            assert self.is_pinned(block) or self.now - self.used_at[block] <= TTL_S[block[0]]

    def check(self) -> None:
        self.engine.check_integrity()
        for tier, counts in self.used().items():
            for tenant, count in enumerate(counts):
                assert count <= self.quotas.limit(tenant, CAPACITY[tier])
        for tenant in GROUPS:
            for end in ENDS:
                sequence = (tenant, *end)
                found = self.engine.match(keys_of(sequence), tenant=tenant)
                self.check_fresh(sequence, found.num_ready)
                if found.reason is MissReason.EXPIRED:
                    assert not self.is_pinned(sequence[: found.num_ready + 1])
                    assert math.isfinite(found.evicted_at)
                    assert found.evicted_at <= self.now + 1
        pinned = {sequence[:length] for sequence in self.pins.values() for length in range(1, len(sequence) + 1)}
        assert self.engine.stats()["pinned_blocks"] == len(pinned) <= MAX_PINNED
        for sequence in self.pins.values():
            assert self.engine.match(keys_of(sequence), tenant=sequence[0]).num_ready == len(sequence)

    def finish(self) -> None:
        """All expired blocks are swept, except pinned ones; no slot is lost."""
        while self.puts:
            self.end_put((), 0)
        while self.gets:
            self.end_get((), 0)
        self.now += 1000
        for _ in range(len(ENDS)):                          # each sweep frees ends, and the next what came before them
            self.engine.evict_ahead()
        for counts in self.used().values():
            for tenant in GROUPS:
                if math.isfinite(TTL_S[tenant]):
                    assert counts[tenant] <= self.engine._pins.blocks[tenant]
        self.check()
        for name in list(self.pins):
            self.engine.unpin(name)
            del self.pins[name]
        self.engine.reset()
        stats = self.engine.stats()
        assert (stats["free_slots"], stats["ssd_free_slots"]) == (NUM_HOST, NUM_SSD)


@settings(max_examples=max(10, EXAMPLES // 10), deadline=None)
@given(st.sampled_from(sorted(POLICIES)), OPERATIONS)
def test_everyone_has_what_was_promised(policy: str, operations: list[tuple[str, Prefix, int]]) -> None:
    checked = Checked(policy)
    for name, sequence, seed in operations:
        getattr(checked, name)(sequence, seed)
        checked.check()
    checked.finish()
