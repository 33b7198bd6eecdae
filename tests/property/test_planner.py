"""The control plane against a dict, for random sequences of gets and puts that end well, badly, or after a reset."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.plan import GetPlan, PutPlan
from flexkv.cache.tier import HOST

from .examples import EXAMPLES
from .model_tree import Prefix, keys_of

NUM_SLOTS = 12
SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin_put", "begin_put", "end_put", "end_put", "begin_get", "end_get", "evict", "reset",
                         "grow", "withdraw"]),
        SEQUENCES,
        st.integers(0, 63),
    ),
    max_size=30,
)


class Checked:
    """The engine, with what each slot holds: the bytes a data plane would have written there."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = GlobalCacheEngine(NUM_SLOTS, LRU, 0.9, 0.2, clock=self.clock)
        self.engine.grow(NUM_SLOTS)
        self.bound = NUM_SLOTS
        self.content: dict[int, tuple[int, Prefix]] = {}        # slot -> (epoch, prefix)
        self.epoch = 0
        self.puts: list[tuple[PutPlan, Prefix, int]] = []
        self.gets: list[tuple[GetPlan, Prefix, int]] = []

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def in_use(self) -> set[int]:
        slots = [slot for plan, _, _ in self.puts for slot in plan.slots_on(HOST).tolist()]
        return set(slots + [slot for plan, _, _ in self.gets for slot in plan.slots.tolist()])

    def begin_put(self, sequence: Prefix, seed: int) -> None:
        start = seed % 3 if seed % 2 else 0
        busy = self.in_use()
        plan = self.engine.begin_put(keys_of(sequence), min(start, len(sequence)), len(sequence))
        assert (plan.slots_on(HOST) < self.bound).all()
        assert not busy & set(plan.slots_on(HOST).tolist())              # no slot is reused while something touches it
        assert all(block >= min(start, len(sequence)) for block in plan.blocks)
        for block, slot in zip(plan.blocks.tolist(), plan.slots_on(HOST).tolist(), strict=True):
            self.content[slot] = (self.epoch, sequence[: block + 1])
        self.puts.append((plan, sequence, self.epoch))

    def end_put(self, sequence: Prefix, seed: int) -> None:
        if self.puts:
            plan, _, _ = self.puts.pop(seed % len(self.puts))
            written = np.array([seed >> (i % 6) & 1 == 0 for i in range(len(plan))], dtype=np.bool_)
            for slot in plan.slots_on(HOST)[~written].tolist():
                self.content[slot] = (-1, ())                   # garbage
            self.engine.end_put(plan, written)

    def begin_get(self, sequence: Prefix, seed: int) -> None:
        offered = self.engine.match(keys_of(sequence)).num_ready
        plan = self.engine.begin_get(keys_of(sequence), seed % 3, len(sequence))
        assert plan.stop == offered
        self.gets.append((plan, sequence, self.epoch))
        self.check_bytes(self.gets[-1])

    def end_get(self, sequence: Prefix, seed: int) -> None:
        if self.gets:
            get = self.gets.pop(seed % len(self.gets))
            self.check_bytes(get)                               # nobody wrote there meanwhile
            self.engine.end_get(get[0])

    def check_bytes(self, get: tuple[GetPlan, Prefix, int]) -> None:
        plan, sequence, epoch = get
        for block, slot in zip(range(plan.start, plan.stop), plan.slots.tolist(), strict=True):
            assert self.content[slot] == (epoch, sequence[: block + 1])

    def evict(self, sequence: Prefix, seed: int) -> None:
        self.engine.evict_ahead()

    def reset(self, sequence: Prefix, seed: int) -> None:
        if seed < 8:                                            # seldom
            self.epoch += 1
            self.engine.reset()
            assert self.engine.match(keys_of(sequence)).num_ready == 0

    def grow(self, sequence: Prefix, seed: int) -> None:
        self.bound = min(NUM_SLOTS, self.bound + seed % 5)
        self.engine.grow(self.bound)
        self.engine.check_integrity()

    def withdraw(self, sequence: Prefix, seed: int) -> None:
        """Shrink: nothing in use is touched, and when it is over, the memory of the slots is given away."""
        self.bound = min(self.bound, seed % NUM_SLOTS)
        busy = {slot for slot in self.in_use() if slot >= self.bound}
        is_over = self.engine.withdraw(self.bound)
        assert is_over == (not busy)
        if is_over:
            self.content = {slot: (-1, ()) if slot >= self.bound else at for slot, at in self.content.items()}
        assert self.engine.stats()["num_slots"] == self.bound + len(busy)
        self.engine.check_integrity()

    def finish(self) -> None:
        self.engine.check_integrity()
        while self.puts:
            self.end_put((), 0)
        while self.gets:
            self.end_get((), 0)
        self.engine.check_integrity()
        self.engine.reset()
        assert self.engine.stats()["free_slots"] == self.bound
        assert self.engine.withdraw(self.bound)
        assert self.engine.stats()["num_slots"] == self.bound
        self.engine.check_integrity()


@settings(max_examples=EXAMPLES, deadline=None)
@given(OPERATIONS)
def test_planner_never_offers_wrong_blocks(operations: list[tuple[str, Prefix, int]]) -> None:
    checked = Checked()
    for name, sequence, seed in operations:
        getattr(checked, name)(sequence, seed)
    checked.finish()
