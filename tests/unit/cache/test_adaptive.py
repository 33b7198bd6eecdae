"""The policy that learns which blocks are reused."""

import heapq
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv._core.index.eviction import PIECE_DTYPE, Pieces
from flexkv._core.index.eviction_queues import EVENT_DTYPE, RETURN_DTYPE
from flexkv._core.index.ghosts import Ghosts
from flexkv._core.index.radix import RadixTree
from flexkv._core.index.reuse_statistics import NUM_QUEUES, ReuseStatistics, remember
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU, POLICIES, Adaptive, EvictionPolicy
from flexkv.config import CacheConfig

Sequence = tuple[int, ...]


def keys_of(sequence: Sequence) -> np.ndarray:
    """Keys that are chained, as the hashing module's are."""
    keys, before = [], (1, 1)
    for token in sequence:
        before = (hash((*before, token)) & (1 << 63) - 1, hash((token, *before)) & (1 << 63) - 1)
        keys.append(before)
    return np.array(keys, dtype=np.uint64).reshape(-1, 2)


class Cache:
    """An engine with a clock that is set."""

    def __init__(self, capacity: int, policy: type[EvictionPolicy] = Adaptive) -> None:
        self.now = 0.0
        self.policy: EvictionPolicy | None = None

        def make(capacity: int) -> EvictionPolicy:
            self.policy = policy(capacity)
            return self.policy

        self.engine = GlobalCacheEngine(capacity, make, clock=lambda: self.now)
        self.engine.grow(capacity)

    def request(self, sequence: Sequence, now: float) -> int:
        """Returns the hits."""
        self.now, keys = now, keys_of(sequence)
        got = self.engine.begin_get(keys, 0, len(keys))
        self.engine.end_get(got)
        put = self.engine.begin_put(keys, got.stop, len(keys))
        self.engine.end_put(put, np.ones(len(put), dtype=np.bool_))
        return got.stop


def talk(name: int, blocks: int) -> Sequence:
    return tuple(1000 * name + i for i in range(blocks))


def test_it_is_the_default_and_all_policies_can_be_set() -> None:
    assert POLICIES[CacheConfig.eviction_policy] is Adaptive
    choices = next(field.metadata["choices"] for field in fields(CacheConfig) if field.name == "eviction_policy")
    assert choices == tuple(POLICIES)


def test_what_always_comes_back_is_kept_and_what_never_does_goes_first() -> None:
    """Conversations have a second turn after 10 s and then end, beside single long requests."""
    hits = {}
    for policy in (Adaptive, LRU):
        cache, hits[policy] = Cache(200, policy), 0
        for i in range(1500):
            cache.request(talk(2 * i, 10), float(i))
            cache.request(talk(2 * i + 1, 12), i + 0.3)
            if i >= 10:
                found = cache.request(talk(2 * (i - 10), 14), i + 0.6)
                hits[policy] += found if i >= 750 else 0
    assert hits[LRU] == 0
    assert hits[Adaptive] > 0.5 * 750 * 10


@pytest.mark.parametrize("fits", [0.2, 0.5, 0.9])
def test_of_a_loop_over_more_than_fits_a_part_stays(fits: float) -> None:
    cache, hits = Cache(int(fits * 1000), Adaptive), 0
    for i in range(3000):
        found = cache.request(talk(i % 100, 10), float(i))
        hits += found if i >= 2000 else 0
    assert hits / 10_000 > fits - 0.1


def test_a_scan_does_not_flush_what_is_used_again_and_again() -> None:
    cache, hits = Cache(300), 0
    for i in range(3000):
        found = cache.request(talk(i % 10, 10), float(i))
        cache.request(talk(100 + i, 30), i + 0.5)       # is never asked for again
        hits += found if i >= 1000 else 0
    assert hits / 20_000 > 0.95                         # LRU: 0, as 400 blocks pass between two uses


def test_it_is_lru_before_it_has_learned() -> None:
    caches = Cache(50), Cache(50, LRU)
    rng = np.random.default_rng(1)
    for i in range(8):
        sequence = talk(int(rng.integers(4)), 20)
        assert len({cache.request(sequence, float(i)) for cache in caches}) == 1
    for name in range(4):
        keys = keys_of(talk(name, 20))
        assert len({cache.engine.match(keys).num_ready for cache in caches}) == 1


@pytest.mark.parametrize("seconds", [0.0, 60.0, 1e-3, 1e6])
def test_a_clock_that_stands_still_or_jumps_breaks_nothing(seconds: float) -> None:
    cache = Cache(100)
    rng = np.random.default_rng(2)
    for i in range(500):
        cache.request(talk(int(rng.zipf(1.5)) % 50, int(rng.integers(1, 30))), i // 20 * seconds)
    cache.engine.check_integrity()
    assert cache.request(talk(1, 5), 499 // 20 * seconds) == 5


def test_the_same_requests_have_the_same_hits() -> None:
    def hits() -> list[int]:
        rng, cache = np.random.default_rng(3), Cache(300)
        return [cache.request(talk(int(rng.zipf(1.3)) % 200, int(rng.integers(1, 40))), 0.7 * i) for i in range(2000)]

    assert hits() == hits()


def test_at_another_pace_the_hits_are_the_same() -> None:
    """Agents that are answered after 1 to 4 paces, beside people who take 30 on average."""
    hits = {}
    for pace_s in (0.05, 1.6, 51.2):
        rng, cache, hits[pace_s] = np.random.default_rng(4), Cache(400), 0
        due = [(float(name), name, 20) for name in range(40)]
        for _ in range(6000):
            now, name, length = heapq.heappop(due)
            hits[pace_s] += cache.request(talk(name, length), now * pace_s)
            gap = float(rng.uniform(1, 4)) if name % 2 else float(rng.exponential(30))
            goes_on = length < 40
            heapq.heappush(due, (now + gap, name, length + 2) if goes_on else (now + gap, name + 40, 20))
    assert max(hits.values()) < 1.02 * min(hits.values()), hits


def test_what_came_back_is_found_piece_by_piece() -> None:
    tree, ghosts, keys = RadixTree(100), Ghosts(64), keys_of(talk(1, 10))
    tree.insert(keys, np.arange(10, dtype=np.int32), 0, 1.0)
    gone = np.zeros(3, dtype=PIECE_DTYPE)
    gone["first_key"], gone["blocks"] = keys[[0, 3, 8], 0], [3, 4, 5]
    gone["priority"], gone["mark"] = [1, -2, 3], [7, 8, 9]
    remember(gone, ghosts)
    queues = tree.eviction_queues(0)
    returns = queues.returned(queues.drain(), ghosts)
    assert returns[["mark", "blocks", "value"]].tolist() == [(7, 3, 1.0), (8, 4, 2.0)]     # from 7 on it is new
    assert ghosts.num_blocks == 5


def test_the_part_that_is_left_aside_is_told_of() -> None:
    tree, keys = RadixTree(100), keys_of(talk(1, 10))
    tree.insert(keys, np.arange(10, dtype=np.int32), 0, 1.0)
    tree.set_ready(keys, np.arange(10, dtype=np.int32), 0)
    queues = tree.eviction_queues(0)
    queues.place(queues.drain())
    tree.touch(keys[:4], 2.0)
    events = np.sort(queues.drain(), order="depth")
    assert events[["depth", "length", "new_hits", "last_access"]].tolist() == [(0, 4, 1, 2.0), (4, 6, 0, 1.0)]


def test_only_what_ranks_below_goes() -> None:
    tree = RadixTree(100)
    for name in range(4):
        keys, slots = keys_of(talk(name, 5)), np.arange(5 * name, 5 * name + 5, dtype=np.int32)
        tree.insert(keys, slots, 0, float(name))
        tree.set_ready(keys, slots, 0)
    queues = tree.eviction_queues(0)
    queues.place(queues.drain())
    pieces = Pieces()
    slots = tree.evict(0, 0, 0, 100, 9.0, below=2.0, pieces=pieces)
    assert sorted(slots.tolist()) == list(range(10))
    assert pieces.array()["priority"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("parts", [[20], [2, 20], [2, 9, 20]])
def test_a_prompt_saved_in_parts_is_counted_as_one_saved_at_once(parts: list[int]) -> None:
    """Ten blocks that were there, and twenty new ones, which grow in place."""
    statistics, no_returns = ReuseStatistics(), np.zeros(0, dtype=RETURN_DTYPE)
    before, node = np.zeros((2, 1), dtype=EVENT_DTYPE)
    before["length"], before["is_new"] = 10, True
    statistics.place(before, no_returns)
    for number, length in enumerate(parts):
        events = np.concatenate([before, node])
        events["last_access"], events["is_new"] = 1.0 + number, [False, number == 0]
        events["depth"], events["length"] = [0, 10], [10, length]
        statistics.place(events, no_returns)
        before, node = events[:1], events[1:]
    at_once = np.zeros(1, dtype=EVENT_DTYPE)
    at_once["last_access"], at_once["length"], at_once["is_new"] = 9.0, 20, True
    statistics.place(at_once, no_returns)              # nothing of it was there: the share is the largest, as 20 of 30
    assert node[["queue", "mark"]] == at_once[["queue", "mark"]]


@pytest.mark.parametrize("copied", [0, 1])
def test_what_could_be_loaded_from_below_goes_before_what_could_not(copied: int) -> None:
    """Two nodes, of which one is a hub and so of another class, are used by turns."""
    statistics, no_returns = ReuseStatistics(), np.zeros(0, dtype=RETURN_DTYPE)
    nodes = np.zeros(2, dtype=EVENT_DTYPE)
    nodes["length"], nodes["children"], nodes["is_new"] = 10, [0, 2], True
    for second in range(200):
        event = nodes[second % 2 :][:1]
        event["last_access"], event["new_hits"] = second, not event["is_new"][0]
        event["has_copy"] = second % 2 == copied
        statistics.place(event, no_returns)
        event["is_new"] = False
    heads = np.full(NUM_QUEUES, np.inf)
    heads[nodes["queue"]] = nodes["priority"]
    assert statistics.choose(heads)[0] == nodes["queue"][copied]


EVENTS = st.lists(
    st.tuples(
        st.floats(0, 1e9), st.integers(0, 3), st.integers(0, 1 << 20), st.integers(1, 1 << 20), st.integers(0, 3),
        st.booleans(), st.booleans(),
    ),
    min_size=1, max_size=20,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=30))
def test_whatever_happens_ranks_are_finite_and_choices_valid(rounds: list[list[tuple[float, ...]]]) -> None:
    statistics, known = ReuseStatistics(), np.zeros(0, dtype=EVENT_DTYPE)
    for told in rounds:
        events = np.zeros(len(told), dtype=EVENT_DTYPE)
        for event, (time, hits, depth, length, children, is_new, again) in zip(events, told, strict=True):
            if again and len(known):                    # as it was placed
                event["priority"], event["mark"] = known[hits % len(known)][["priority", "mark"]].item()
            event["is_new"] = is_new or not (again and len(known))
            event["last_access"], event["hits"], event["new_hits"] = time, hits, hits
            event["depth"], event["length"], event["children"] = depth, length, children
        returns = np.zeros(int(events[0]["is_new"]), dtype=RETURN_DTYPE)
        returns["blocks"] = 1
        statistics.place(events, returns)
        known = events
        assert np.isfinite(events["priority"]).all()
        assert (events["queue"] < NUM_QUEUES).all()
        heads = np.full(NUM_QUEUES, np.inf)
        np.minimum.at(heads, events["queue"], events["priority"])
        queue, below = statistics.choose(heads)
        assert heads[queue] < below                     # what is chosen can go
