"""Host and SSD together: random gets, puts, fetches, write-backs, moves straight between SSD and GPU, failures,
evictions and resets against what each slot holds."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from flexkv.cache.plan import DEVICE, GetPlan, Move, PutPlan
from flexkv.cache.tier import HOST
from flexkv.storage.recovered import Recovered

from .examples import EXAMPLES
from .model_tree import Prefix, keys_of

SSD = 1
NUM_HOST = 6
NUM_SSD = 10
# Few of them, which share prefixes, and many operations: most meet what earlier ones left.
SEQUENCES = st.sampled_from([(0, 0, 0, 0, 0), (0, 0, 0), (0, 0, 1, 1), (0, 1), (1, 1, 1, 1)])
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([
            "put", "sink", "sink", "sink", "begin_put", "end_put", "begin_get", "begin_get", "direct_get", "direct_get",
            "direct_put", "end_get", "end_get", "arrive",
            "arrive", "end_fetch", "end_fetch", "hang", "write", "write", "begin_write", "end_write", "evict", "evict",
            "reset", "break", "restart", "late", "late",
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

    plan: Move
    arrived: NDArray[np.bool_]
    failed: NDArray[np.bool_]


@dataclass(eq=False)
class Get:
    """A get, and the fetches that some of its blocks wait for."""

    plan: GetPlan
    sequence: Prefix
    epoch: int
    waits: list[tuple[Fetch, NDArray[np.intp], NDArray[np.intp]]]

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
    usable: bool = True
    loads_directly: bool = False
    half_out: int = -1                      # which of two disks is out of service
    puts: list[tuple[PutPlan, Prefix]] = field(default_factory=list)
    gets: list[Get] = field(default_factory=list)
    fetches: dict[int, Fetch] = field(default_factory=dict)
    writes: list[Move] = field(default_factory=list)
    over: list[PutPlan | GetPlan | Move] = field(default_factory=list)     # have had their result

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.engine = GlobalCacheEngine(NUM_HOST, LRU, 0.9, 0.2, clock=self.clock, lower={"ssd": NUM_SSD})
        self.engine.grow(NUM_HOST)
        self.slots = SlotAllocator(NUM_SSD)
        self.cost = CostModel(1, self.clock)

    def attach(self, found: list[tuple[NDArray[np.uint64], NDArray[np.int32]]]) -> None:
        tier = TierService(
            self.slots, self.cost, lambda: self.usable, lambda slots: slots % 2 != self.half_out,
            loads_directly=lambda: self.loads_directly, saves_directly=lambda: True, read_deadline_s=30.0,
        )
        assert self.engine.attach(1, tier, found)

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    # ---- what is in use ---------------------------------------------------------------------------------------

    def host_in_use(self) -> set[int]:
        used = [slot for plan, _ in self.puts for slot in plan.slots_on(HOST).tolist()]
        used += [slot for fetch in self.fetches.values() for slot in fetch.plan.dst.tolist()]
        used += [slot for plan in self.writes for slot in plan.src.tolist()]
        for get in self.gets:                               # a block whose fetch has failed is read by nobody
            used += get.plan.slots[get.whole()].tolist()
        return set(used) - {-1}

    def ssd_in_use(self) -> set[int]:
        """Slots that a move reads or writes, also of blocks that another move has found bad."""
        used = [slot for plan in self.writes for slot in plan.dst.tolist()]
        used += [slot for plan, _ in self.puts for slot in plan.slots_on(SSD).tolist()]
        reads = [fetch.plan for fetch in self.fetches.values()]
        for move in reads + [move for get in self.gets for move in get.plan.to(DEVICE)]:
            used += move.src.tolist()
        return set(used) - {-1}

    def on(self, tier: int) -> dict[int, Content]:
        return self.host if tier == HOST else self.ssd

    # ---- puts -------------------------------------------------------------------------------------------------

    def direct_put(self, sequence: Prefix, seed: int) -> None:
        """Where there are too few host slots, as while gets hold them, the first blocks go straight to SSD."""
        self.begin_put(sequence, seed, direct=True)

    def begin_put(self, sequence: Prefix, seed: int, direct: bool = False) -> None:
        start = min(seed % 3 if seed % 2 else 0, len(sequence))
        busy, busy_ssd = self.host_in_use(), self.ssd_in_use()
        plan = self.engine.begin_put(keys_of(sequence), start, len(sequence), direct=direct)
        assert all(block >= start for block in plan.blocks)
        for move in plan.moves:
            assert move.target == HOST or direct
            assert not (busy if move.target == HOST else busy_ssd) & set(move.dst.tolist())   # nothing touches them
            for block, slot in zip(move.blocks.tolist(), move.dst.tolist(), strict=True):
                self.on(move.target)[slot] = (self.epoch, sequence[: block + 1])
        self.puts.append((plan, sequence))

    def end_put(self, sequence: Prefix, seed: int) -> None:
        if self.puts:
            plan, _ = self.puts.pop(seed % len(self.puts))
            written = np.array([seed >> (i % 6) & 1 == 0 for i in range(len(plan.blocks))], dtype=np.bool_)
            for move in plan.moves:
                for slot in move.dst[~written[plan.where(move)]].tolist():
                    self.on(move.target)[slot] = GARBAGE
            self.engine.end_put(plan, written)
            self.over.append(plan)

    def put(self, sequence: Prefix, seed: int) -> None:
        self.begin_put(sequence, 0)
        plan, _ = self.puts.pop()
        self.engine.end_put(plan, np.ones(len(plan.blocks), dtype=np.bool_))

    # ---- gets and fetches -------------------------------------------------------------------------------------

    def direct_get(self, sequence: Prefix, seed: int) -> None:
        """What is on SSD alone goes straight to the GPU, and gets no host slot."""
        self.begin_get(sequence, seed, direct=True)

    def begin_get(self, sequence: Prefix, seed: int, direct: bool = False) -> None:
        keys = keys_of(sequence)
        start = min(seed % 3, len(sequence))
        offered = self.engine.match(keys, start)
        busy, before = self.host_in_use(), set(self.fetches)
        self.loads_directly = direct
        plan = self.engine.begin_get(keys, start, len(sequence))
        assert not plan.to(HOST if direct else DEVICE)
        assert plan.stop <= offered.num_ready
        if plan.reason.name != "NO_ROOM":
            assert plan.stop == offered.num_ready
        for move in plan.to(HOST):
            assert move.move_id not in before
            assert (move.src % 2 != self.half_out).all()
            assert not busy & set(move.dst.tolist())
            assert not {f.plan.dst[i] for f in self.fetches.values() for i in range(len(f.plan))} & set(
                move.dst.tolist())
            none = np.zeros(len(move), dtype=np.bool_)
            self.fetches[move.move_id] = Fetch(move, none, none.copy())
            self.host.update(dict.fromkeys(move.dst.tolist(), GARBAGE))
        waits = [(self.fetches[join.move_id], join.mine, join.theirs) for join in plan.joins]
        self.gets.append(Get(plan, sequence, self.epoch, waits))
        self.check_bytes(self.gets[-1])

    def end_get(self, sequence: Prefix, seed: int) -> None:
        if self.gets:
            get = self.gets.pop(seed % len(self.gets))
            self.check_bytes(get)                           # nobody wrote there meanwhile
            for direct in get.plan.to(DEVICE):
                lost = np.array([seed >> (i % 6) & 1 == 1 for i in range(len(direct))], dtype=np.bool_)
                self.engine.end_move(direct, ~lost, lost)
                for position in direct.blocks[lost].tolist() if direct.tree is self.engine._tree else ():
                    assert self.engine._tree.slots(direct.keys[: position + 1], SSD)[position] not in direct.src[
                        direct.blocks == position]
            self.engine.end_get(get.plan)
            self.over.append(get.plan)

    def check_bytes(self, get: Get) -> None:
        blocks = np.arange(get.plan.start, get.plan.stop)
        for block, slot, whole in zip(blocks.tolist(), get.plan.slots.tolist(), get.whole(), strict=True):
            if whole and slot != -1:
                assert self.host[slot] == (get.epoch, get.sequence[: block + 1])
        for direct in get.plan.to(DEVICE):
            assert (get.plan.slots[direct.blocks - get.plan.start] == -1).all()
            for block, slot in zip(direct.blocks.tolist(), direct.src.tolist(), strict=True):
                assert self.ssd[slot] == (get.epoch, get.sequence[: block + 1])

    def a_fetch(self, seed: int) -> Fetch | None:
        return list(self.fetches.values())[seed % len(self.fetches)] if self.fetches else None

    def arrive(self, sequence: Prefix, seed: int) -> None:
        """Some blocks of a fetch arrive, or fail."""
        fetch = self.a_fetch(seed)
        if fetch is not None:
            for i in np.flatnonzero(~fetch.arrived & ~fetch.failed)[: 1 + seed % 3].tolist():
                if seed % 5 == 4:
                    fetch.failed[i] = True
                else:
                    fetch.arrived[i] = True
                    self.host[int(fetch.plan.dst[i])] = self.ssd[int(fetch.plan.src[i])]

    def end_fetch(self, sequence: Prefix, seed: int) -> None:
        fetch = self.a_fetch(seed)
        if fetch is not None:
            while not (fetch.arrived | fetch.failed).all():
                for i in np.flatnonzero(~fetch.arrived & ~fetch.failed).tolist():
                    fetch.arrived[i] = seed % 4 > 0
                    fetch.failed[i] = not fetch.arrived[i]
                    if fetch.arrived[i]:
                        self.host[int(fetch.plan.dst[i])] = self.ssd[int(fetch.plan.src[i])]
            del self.fetches[fetch.plan.move_id]
            self.engine.end_move(fetch.plan, fetch.arrived)
            self.over.append(fetch.plan)
            is_known = fetch.plan.tree is self.engine._tree and not fetch.plan.is_abandoned    # else: put again
            for position in fetch.plan.blocks[fetch.failed].tolist() if is_known else ():
                assert self.engine.match(fetch.plan.keys[: position + 1]).num_ready <= position

    def hang(self, sequence: Prefix, seed: int) -> None:
        """Fetches take too long: their blocks are absent, and their slots stay in limbo."""
        self.now += 40.0
        self.engine.abandon_reads_that_hang()
        for fetch in self.fetches.values():
            assert fetch.plan.is_abandoned
            if fetch.plan.tree is self.engine._tree:
                assert not set(self.engine._tree.slots(fetch.plan.keys, HOST)) & set(fetch.plan.dst.tolist())

    # ---- write-back -------------------------------------------------------------------------------------------

    def begin_write(self, sequence: Prefix, seed: int) -> None:
        busy = self.ssd_in_use()
        plan = self.engine.begin_write_back(1, keys_of(sequence), 1 + seed % 4)
        if plan is not None:
            assert not busy & set(plan.dst.tolist())
            for slot in plan.dst.tolist():
                self.ssd[slot] = GARBAGE
            self.writes.append(plan)

    def end_write(self, sequence: Prefix, seed: int) -> None:
        if self.writes:
            plan = self.writes.pop(seed % len(self.writes))
            written = np.array([seed >> (i % 6) & 1 == 0 for i in range(len(plan))], dtype=np.bool_)
            for ok, host, ssd in zip(written, plan.src.tolist(), plan.dst.tolist(), strict=True):
                self.ssd[ssd] = self.host[host] if ok else GARBAGE
            self.engine.end_move(plan, written)
            self.over.append(plan)

    def write(self, sequence: Prefix, seed: int) -> None:
        count = len(self.writes)
        self.begin_write(sequence, 3)
        if len(self.writes) > count:
            plan = self.writes[-1]
            for host, ssd in zip(plan.src.tolist(), plan.dst.tolist(), strict=True):
                self.ssd[ssd] = self.host[host]
            self.engine.end_move(self.writes.pop(), np.ones(len(plan), dtype=np.bool_))

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
        count = len(plan.blocks) if isinstance(plan, PutPlan) else len(plan)
        ok = np.array([seed >> (i % 6) & 1 == 0 for i in range(count)], dtype=np.bool_)
        if isinstance(plan, PutPlan):
            self.engine.end_put(plan, ok)
        elif isinstance(plan, Move):
            self.engine.end_move(plan, ok)
        else:
            for move in plan.to(DEVICE):
                self.engine.end_move(move, ok[: len(move)])
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
            self.engine._lower[0].evict(self.engine._tree, 1 + seed % 5, self.clock())
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
        self.engine.free(1, found.slots[~known])
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
