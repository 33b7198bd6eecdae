"""OPT against the best of everything that a cache could have done."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.tools.replay.bounds import optimal_hits, unbounded_hits

from .traces import requests, trace_of

Prefix = tuple[int, ...]


def leading(cache: frozenset[Prefix], prefixes: list[Prefix]) -> int:
    return next((i for i, prefix in enumerate(prefixes) if prefix not in cache), len(prefixes))


def best_hits(sequences: list[Prefix], capacity: int) -> int:
    """Tries, after each request, every set of blocks that a cache could keep of its old and new blocks."""
    best: dict[frozenset[Prefix], int] = {frozenset(): 0}
    for ids in sequences:
        prefixes = [ids[: i + 1] for i in range(len(ids))]
        after: dict[frozenset[Prefix], int] = {}
        for cache, hits in best.items():
            total = hits + leading(cache, prefixes)
            there = sorted(cache | set(prefixes))
            for kept in itertools.combinations(there, min(capacity, len(there))):
                key = frozenset(kept)
                after[key] = max(after.get(key, 0), total)
        best = after
    return max(best.values())


@settings(max_examples=100, deadline=None)
@given(requests(max_size=7), st.integers(1, 3))
def test_nothing_does_better_than_opt(sequences: list[Prefix], capacity: int) -> None:
    assert optimal_hits(trace_of(sequences), capacity) == best_hits(sequences, capacity)


@given(requests(max_size=30))
def test_with_room_for_all_opt_has_what_was_there_before(sequences: list[Prefix]) -> None:
    trace = trace_of(sequences)
    seen: set[Prefix] = set()
    hits = 0
    for ids in sequences:
        prefixes = {ids[: i + 1] for i in range(len(ids))}
        hits += len(prefixes & seen)
        seen |= prefixes
    assert unbounded_hits(trace) == hits == optimal_hits(trace, trace.num_distinct)
    assert trace.num_distinct == len(seen)


def test_opt_finds_the_farthest_across_buckets() -> None:
    filler = [tuple(range(10_000 * i, 10_000 * i + 700)) for i in range(1, 9)]
    sequences = [(1, 2), (3, 4), *filler, (1, 2), *filler[:2], (3, 4)]
    assert optimal_hits(trace_of(sequences), 2) == 2
    assert optimal_hits(trace_of(sequences), 4) == 4
    assert optimal_hits(trace_of(sequences), 704) == 4 + 700
    assert optimal_hits(trace_of(sequences), 1404) == 4 + 1400
