"""Host and SSD together: random gets, puts, fetches, write-backs, moves straight between SSD and GPU, failures,
evictions and resets against what each slot holds."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.load_or_compute import LoadOrCompute
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.plan import IN_PLACE, DirectPlan, FetchPlan, GetPlan, PutPlan, WritePlan
from flexkv.cache.tier import SSD, SsdTier
from flexkv.storage.recovered import Recovered

from .examples import EXAMPLES
from .model_tree import Prefix, keys_of

NUM_HOST = 6
NUM_SSD = 10
# Few of them, which share prefixes, and many operations: most meet what earlier ones left.
SEQUENCES = st.sampled_from([(0, 0, 0, 0, 0), (0, 0, 0), (0, 0, 1, 1), (0, 1), (1, 1, 1, 1)])
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([
            "put", "sink", "sink", "sink", "begin_put", "end_put", "begin_get", "begin_get", "direct_get", "direct_get",
            "direct_put", "end_get", "end_get", "arrive",
            "arrive", "end_fetch", "end_fetch", "write", "write", "begin_write", "end_write", "evict", "evict", "reset",
            "break", "restart", "late", "late",
        ]),
        SEQUENCES,
        st.integers(0, 63),
    ),
    min_size=15, max_size=50,
)

Content = tuple[int, Prefix]
GARBAGE: Content = (-1, ())


@dataclass(eq=False)
class Fetch:
    """A fetch under way."""

    plan: FetchPlan
    arrived: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    losses: list[int]


@dataclass(eq=False)
class Get:
    """A get, and the fetches that some of its blocks wait for."""

    plan: GetPlan
    sequence: Prefix
    epoch: int
    waits: list[tuple[Fetch, NDArray[np.intp], NDArray[np.intp]]]
    losses: list[int]

    def whole(self) -> NDArray[np.bool_]:
        """Blocks that may be read."""
        ok = np.ones(len(self.plan), dtype=np.bool_)
        for fetch, mine, theirs in self.waits:
            ok[mine] = fetch.arrived[theirs]
        return ok


@dataclass
class Checked:
    """The engine, and what each slot holds: the bytes a data plane would have moved there."""

    now: float = 0.0
    epoch: int = 0
    host: dict[int, Content] = field(default_factory=dict)
    ssd: dict[int, Content] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)     # how often the block of an SSD slot was found bad
    usable: bool = True
    half_out: int = -1                      # which of two disks is out of service
    puts: list[tuple[PutPlan, Prefix]] = field(default_factory=list)
    gets: list[Get] = field(default_factory=list)
    fetches: dict[int, Fetch] = field(default_factory=dict)
    writes: list[WritePlan] = field(default_factory=list)
    over: list[PutPlan | GetPlan | FetchPlan | WritePlan] = field(default_factory=list)     # have had their result

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.engine = GlobalCacheEngine(NUM_HOST, LRU, 0.9, 0.2, clock=self.clock, num_ssd_slots=NUM_SSD)
        self.engine.grow(NUM_HOST)
        self.slots = SlotAllocator(NUM_SSD)
        self.load_or_compute = LoadOrCompute("always", 1, 1, 0.0, self.clock)

    def attach(self, found: list[tuple[NDArray[np.uint64], NDArray[np.int32]]]) -> None:
        tier = SsdTier(self.slots, self.load_or_compute, lambda: self.usable, lambda slots: slots % 2 != self.half_out)
        assert self.engine.attach_ssd(tier, found)

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    # ---- what is in use ---------------------------------------------------------------------------------------

    def host_in_use(self) -> set[int]:
        used = [slot for plan, _ in self.puts for slot in plan.slots.tolist()]
        used += [slot for fetch in self.fetches.values() for slot in fetch.plan.host_slots.tolist()]
        used += [slot for plan in self.writes for slot in plan.host_slots.tolist()]
        for get in self.gets:                               # a block whose fetch has failed is read by nobody
            used += get.plan.slots[get.whole()].tolist()
        return set(used) - {IN_PLACE}

    def ssd_in_use(self) -> set[int]:
        """But for slots whose block was found bad: the store refuses who still reads there."""
        used = [slot for plan in self.writes for slot in plan.ssd_slots.tolist()]
        used += [slot for plan, _ in self.puts if plan.direct is not None for slot in plan.direct.ssd_slots.tolist()]
        readers = [(fetch.plan, fetch.losses) for fetch in self.fetches.values()]
        for plan, losses in readers + [(get.plan.direct, get.losses) for get in self.gets if get.plan.direct]:
            used += plan.ssd_slots[self.still(plan, losses)].tolist()
        return set(used)

    def losses_of(self, plan: FetchPlan | DirectPlan | None) -> list[int]:
        return [] if plan is None else [self.losses.get(slot, 0) for slot in plan.ssd_slots.tolist()]

    def still(self, plan: FetchPlan | DirectPlan, losses: list[int]) -> NDArray[np.bool_]:
        """Blocks whose slot was not found bad since."""
        return np.array(self.losses_of(plan), dtype=np.int64) == np.array(losses, dtype=np.int64)

    def lose(self, slots: NDArray[np.int32]) -> None:
        for slot in slots.tolist():
            self.losses[slot] = self.losses.get(slot, 0) + 1

    # ---- puts -------------------------------------------------------------------------------------------------

    def direct_put(self, sequence: Prefix, seed: int) -> None:
        """Where there are too few host slots, as while gets hold them, the first blocks go straight to SSD."""
        self.begin_put(sequence, seed, direct=True)

    def begin_put(self, sequence: Prefix, seed: int, direct: bool = False) -> None:
        start = min(seed % 3 if seed % 2 else 0, len(sequence))
        busy, busy_ssd = self.host_in_use(), self.ssd_in_use()
        plan = self.engine.begin_put(keys_of(sequence), start, len(sequence), direct=direct)
        if plan.direct is not None:
            assert direct
            assert not busy_ssd & set(plan.direct.ssd_slots.tolist())
            for block, slot in zip(plan.direct.blocks.tolist(), plan.direct.ssd_slots.tolist(), strict=True):
                self.ssd[slot] = (self.epoch, sequence[: block + 1])
        assert not busy & set(plan.slots.tolist())          # no slot is reused while something touches it
        assert all(block >= start for block in plan.blocks)
        for block, slot in zip(plan.blocks.tolist(), plan.slots.tolist(), strict=True):
            self.host[slot] = (self.epoch, sequence[: block + 1])
        self.puts.append((plan, sequence))

    def end_put(self, sequence: Prefix, seed: int) -> None:
        if self.puts:
            plan, _ = self.puts.pop(seed % len(self.puts))
            written = np.array([seed >> (i % 6) & 1 == 0 for i in range(len(plan.all_blocks))], dtype=np.bool_)
            for slot in plan.slots[~written[plan.where(plan)]].tolist():
                self.host[slot] = GARBAGE
            if plan.direct is not None:
                for slot in plan.direct.ssd_slots[~written[plan.where(plan.direct)]].tolist():
                    self.ssd[slot] = GARBAGE
            self.engine.end_put(plan, written)
            self.over.append(plan)

    def put(self, sequence: Prefix, seed: int) -> None:
        self.begin_put(sequence, 0)
        plan, _ = self.puts.pop()
        self.engine.end_put(plan, np.ones(len(plan.all_blocks), dtype=np.bool_))

    # ---- gets and fetches -------------------------------------------------------------------------------------

    def direct_get(self, sequence: Prefix, seed: int) -> None:
        """What is on SSD alone goes straight to the GPU, and gets no host slot."""
        self.begin_get(sequence, seed, direct=True)

    def begin_get(self, sequence: Prefix, seed: int, direct: bool = False) -> None:
        keys = keys_of(sequence)
        start = min(seed % 3, len(sequence))
        offered = self.engine.match(keys, start)
        busy, before = self.host_in_use(), set(self.fetches)
        plan = self.engine.begin_get(keys, start, len(sequence), direct=direct)
        assert (plan.fetch if direct else plan.direct) is None
        assert plan.stop <= offered.num_ready
        if plan.reason.name != "NO_ROOM":
            assert plan.stop == offered.num_ready
        if plan.fetch is not None:
            assert plan.fetch.fetch_id not in before
            assert (plan.fetch.ssd_slots % 2 != self.half_out).all()
            assert not busy & set(plan.fetch.host_slots.tolist())
            assert not {f.plan.host_slots[i] for f in self.fetches.values() for i in range(len(f.plan))} & set(
                plan.fetch.host_slots.tolist())
            none = np.zeros(len(plan.fetch), dtype=np.bool_)
            self.fetches[plan.fetch.fetch_id] = Fetch(plan.fetch, none, none.copy(), self.losses_of(plan.fetch))
            for slot in plan.fetch.host_slots.tolist():
                self.host[slot] = GARBAGE
        waits = [(self.fetches[join.fetch_id], join.mine, join.theirs) for join in plan.joins]
        self.gets.append(Get(plan, sequence, self.epoch, waits, self.losses_of(plan.direct)))
        self.check_bytes(self.gets[-1])

    def end_get(self, sequence: Prefix, seed: int) -> None:
        if self.gets:
            get = self.gets.pop(seed % len(self.gets))
            self.check_bytes(get)                           # nobody wrote there meanwhile
            if (direct := get.plan.direct) is not None:
                lost = np.array([seed >> (i % 6) & 1 == 1 for i in range(len(direct))], dtype=np.bool_)
                gone = lost & self.still(direct, get.losses)    # else the slot was freed, and holds another copy
                self.lose(direct.ssd_slots[gone])
                self.engine.end_direct_get(direct, None, lost)
                for position in direct.blocks[gone].tolist() if direct.tree is self.engine._tree else ():
                    assert self.engine._tree.slots(direct.keys[: position + 1], SSD)[position] not in direct.ssd_slots[
                        direct.blocks == position]
            self.engine.end_get(get.plan)
            self.over.append(get.plan)

    def check_bytes(self, get: Get) -> None:
        blocks = np.arange(get.plan.start, get.plan.stop)
        for block, slot, whole in zip(blocks.tolist(), get.plan.slots.tolist(), get.whole(), strict=True):
            if whole and slot != IN_PLACE:
                assert self.host[slot] == (get.epoch, get.sequence[: block + 1])
        if (direct := get.plan.direct) is not None:
            assert (get.plan.slots[direct.blocks - get.plan.start] == IN_PLACE).all()
            still = self.still(direct, get.losses)
            for block, slot in zip(direct.blocks[still].tolist(), direct.ssd_slots[still].tolist(), strict=True):
                assert self.ssd[slot] == (get.epoch, get.sequence[: block + 1])

    def a_fetch(self, seed: int) -> Fetch | None:
        return list(self.fetches.values())[seed % len(self.fetches)] if self.fetches else None

    def arrive(self, sequence: Prefix, seed: int) -> None:
        """Some blocks of a fetch arrive, or fail."""
        fetch = self.a_fetch(seed)
        if fetch is not None:
            for i in np.flatnonzero(~fetch.arrived & ~fetch.failed)[: 1 + seed % 3].tolist():
                if seed % 5 == 4 or not self.still(fetch.plan, fetch.losses)[i]:
                    fetch.failed[i] = True
                else:
                    fetch.arrived[i] = True
                    self.host[int(fetch.plan.host_slots[i])] = self.ssd[int(fetch.plan.ssd_slots[i])]

    def end_fetch(self, sequence: Prefix, seed: int) -> None:
        fetch = self.a_fetch(seed)
        if fetch is not None:
            while not (fetch.arrived | fetch.failed).all():
                for i in np.flatnonzero(~fetch.arrived & ~fetch.failed).tolist():
                    fetch.arrived[i] = seed % 4 > 0 and self.still(fetch.plan, fetch.losses)[i]
                    fetch.failed[i] = not fetch.arrived[i]
                    if fetch.arrived[i]:
                        self.host[int(fetch.plan.host_slots[i])] = self.ssd[int(fetch.plan.ssd_slots[i])]
            del self.fetches[fetch.plan.fetch_id]
            self.lose(fetch.plan.ssd_slots[fetch.failed & self.still(fetch.plan, fetch.losses)])
            self.engine.end_fetch(fetch.plan, fetch.arrived)
            self.over.append(fetch.plan)
            for position in fetch.plan.blocks[fetch.failed].tolist() if fetch.plan.tree is self.engine._tree else ():
                assert self.engine.match(fetch.plan.keys[: position + 1]).num_ready <= position

    # ---- write-back -------------------------------------------------------------------------------------------

    def begin_write(self, sequence: Prefix, seed: int) -> None:
        busy = self.ssd_in_use()
        plan = self.engine.begin_write(keys_of(sequence), 1 + seed % 4)
        if plan is not None:
            assert not busy & set(plan.ssd_slots.tolist())
            for slot in plan.ssd_slots.tolist():
                self.ssd[slot] = GARBAGE
            self.writes.append(plan)

    def end_write(self, sequence: Prefix, seed: int) -> None:
        if self.writes:
            plan = self.writes.pop(seed % len(self.writes))
            written = np.array([seed >> (i % 6) & 1 == 0 for i in range(len(plan))], dtype=np.bool_)
            for ok, host, ssd in zip(written, plan.host_slots.tolist(), plan.ssd_slots.tolist(), strict=True):
                self.ssd[ssd] = self.host[host] if ok else GARBAGE
            self.engine.end_write(plan, written)
            self.over.append(plan)

    def write(self, sequence: Prefix, seed: int) -> None:
        count = len(self.writes)
        self.begin_write(sequence, 3)
        if len(self.writes) > count:
            plan = self.writes[-1]
            for host, ssd in zip(plan.host_slots.tolist(), plan.ssd_slots.tolist(), strict=True):
                self.ssd[ssd] = self.host[host]
            self.engine.end_write(self.writes.pop(), np.ones(len(plan), dtype=np.bool_))

    def sink(self, sequence: Prefix, seed: int) -> None:
        """Put and write a sequence, then push what may go out of the host."""
        self.put(sequence, 0)
        for _ in range(2):
            self.write(sequence, 0)
        self.evict(sequence, 0)

    def late(self, sequence: Prefix, seed: int) -> None:
        """A result comes again, for slots that may be others' by now: nothing changes."""
        if not self.over:
            return
        plan, before = self.over[seed % len(self.over)], self.engine.stats()
        count = len(plan.all_blocks) if isinstance(plan, PutPlan) else len(plan)
        ok = np.array([seed >> (i % 6) & 1 == 0 for i in range(count)], dtype=np.bool_)
        if isinstance(plan, PutPlan):
            self.engine.end_put(plan, ok)
        elif isinstance(plan, WritePlan):
            self.engine.end_write(plan, ok)
        elif isinstance(plan, FetchPlan):
            self.engine.end_fetch(plan, ok)
        else:
            if plan.direct is not None:
                self.engine.end_direct_get(plan.direct, None, ok[: len(plan.direct)])
            self.engine.end_get(plan, ok)
        after = self.engine.stats()
        refused = sum(after[name] - before[name] for name in ("stale_results", "ssd_stale_results"))
        assert refused == count
        assert {**after, "stale_results": 0, "ssd_stale_results": 0} == {
            **before, "stale_results": 0, "ssd_stale_results": 0}

    # ---- the rest ---------------------------------------------------------------------------------------------

    def evict(self, sequence: Prefix, seed: int) -> None:
        """Ahead of need, or all that may go from the host, or some of what may go from SSD."""
        if seed % 4 == 3:
            self.engine.evict_ahead()
        elif seed % 4 == 2:
            self.engine._below.evict(self.engine._tree, 1 + seed % 5, self.clock())
        else:
            self.engine._host.evict(self.engine._tree, NUM_HOST, self.clock())

    def reset(self, sequence: Prefix, seed: int) -> None:
        if seed < 8:                                        # seldom
            self.epoch += 1
            self.engine.reset()
            assert self.engine.match(keys_of(sequence)).num_ready == 0

    def break_(self, sequence: Prefix, seed: int) -> None:
        self.usable = seed < 48
        self.half_out = seed % 4 - 2

    def restart(self, sequence: Prefix, seed: int) -> None:
        """A new engine, which finds what was whole on the disks, in any order."""
        if seed >= 16:
            return
        self.drain()
        self.over.clear()
        used = [slot for slot in range(NUM_SSD) if not self.slots.is_free(slot) and self.ssd[slot][0] == self.epoch]
        self.start()
        everything = self.slots.allocate(NUM_SSD)
        assert everything is not None
        self.slots.free(np.setdiff1d(everything, np.array(used, dtype=np.int32)).astype(np.int32))
        self.host.clear()
        names = [self.ssd[slot][1] for slot in used]
        order = np.random.default_rng(seed).permutation(len(used))
        keys = np.array([keys_of(names[i])[-1] for i in order], dtype=np.uint64).reshape(-1, 2)
        parents = np.array([keys_of(names[i])[-2] if len(names[i]) > 1 else (0, 0) for i in order], dtype=np.uint64)
        found = Recovered(keys, parents.reshape(-1, 2), np.array(used, dtype=np.int32)[order])
        known = np.zeros(len(found), dtype=np.bool_)
        paths = []
        for path in found.paths():
            paths.append((found.keys[path], np.where(known[path], np.int32(-1), found.slots[path])))
            known[path] = True
        self.attach(paths)
        self.engine.free_ssd(found.slots[~known])
        whole = {name for name in names if all(name[: i + 1] in names for i in range(len(name)))}
        if self.usable and self.half_out < 0:
            for name in names:
                assert (self.engine.match(keys_of(name)).num_ready == len(name)) == (name in whole)

    def drain(self) -> None:
        while self.puts:
            self.end_put((), 0)
        while self.fetches:
            self.end_fetch((), 1)
        while self.gets:
            self.end_get((), 0)
        while self.writes:
            self.end_write((), 0)
        self.engine.check_integrity()

    def finish(self) -> None:
        self.drain()
        self.engine.reset()
        stats = self.engine.stats()
        assert stats["free_slots"] == NUM_HOST
        assert stats["ssd_free_slots"] == NUM_SSD
        assert stats["blocks_being_fetched"] == 0
        self.engine.check_integrity()


@settings(max_examples=EXAMPLES, deadline=None)
@given(OPERATIONS)
def test_no_tier_offers_wrong_blocks(operations: list[tuple[str, Prefix, int]]) -> None:
    checked = Checked()
    checked.attach([])
    for name, sequence, seed in operations:
        getattr(checked, {"break": "break_"}.get(name, name))(sequence, seed)
        checked.engine.check_integrity()
    checked.finish()
