"""The control plane on a trace, against plain models."""

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.cache.eviction import POLICIES
from flexkv.tools.replay.bounds import optimal_hits, unbounded_hits
from flexkv.tools.replay.simulation import Simulation

from .traces import requests, trace_of

Prefix = tuple[int, ...]


def lru_hits(sequences: list[Prefix], capacity: int) -> int:
    """Leading blocks found in a cache of blocks where the least recently used goes first; of one request the last."""
    cache: OrderedDict[Prefix, None] = OrderedDict()
    hits = 0
    for ids in sequences:
        prefixes = [ids[: i + 1] for i in range(len(ids))]
        hits += next((i for i, prefix in enumerate(prefixes) if prefix not in cache), len(prefixes))
        for prefix in reversed(prefixes):
            cache[prefix] = None
            cache.move_to_end(prefix)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@settings(max_examples=300, deadline=None)
@given(requests(max_size=20), st.integers(1, 9), st.booleans())
def test_lru_is_lru_of_blocks(sequences: list[Prefix], capacity: int, at_once: bool) -> None:
    trace = trace_of(sequences, [0.0] * len(sequences) if at_once else None)
    assert Simulation("lru", capacity).run(trace).hits == lru_hits(sequences, capacity)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(sequences=requests(max_size=20), capacity=st.integers(1, 9))
def test_every_policy_is_between_nothing_and_opt(policy: str, sequences: list[Prefix], capacity: int) -> None:
    trace = trace_of(sequences)
    outcome = Simulation(policy, capacity).run(trace)
    assert 0 <= outcome.hits <= optimal_hits(trace, capacity)
    assert (outcome.host_hits, outcome.ssd_written) == (outcome.hits, 0)
    assert Simulation(policy, trace.num_distinct).run(trace).hits == unbounded_hits(trace)


def test_what_left_memory_comes_from_ssd() -> None:
    a, b = tuple(range(4)), tuple(range(10, 18))
    outcome = Simulation("lru", 8, 16).run(trace_of([a, a, b, a]))
    assert (outcome.hits, outcome.host_hits, outcome.ssd_written) == (8, 4, 8)     # of b as much as the queue takes
    outcome = Simulation("lru", 8, 16).run(trace_of([a, b, a]))
    assert (outcome.hits, outcome.host_hits, outcome.ssd_written) == (4, 0, 8)       # slots are free
    outcome = Simulation("lru", 8, 4).run(trace_of([a, b]))
    assert outcome.ssd_written == 4                                             # b would push out a
    outcome = Simulation("lru", 8, 16, write_all=True).run(trace_of([a, b, a]))
    assert (outcome.hits, outcome.host_hits, outcome.ssd_written) == (4, 0, 8)      # of b, as much as may be queued


@settings(max_examples=100, deadline=None)
@given(requests(max_size=20), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_two_tiers_are_no_better_than_opt_of_both(
    sequences: list[Prefix], host: int, ssd: int, write_all: bool
) -> None:
    trace = trace_of(sequences)
    outcome = Simulation("lru", host, ssd, write_all).run(trace)
    assert 0 <= outcome.host_hits <= outcome.hits <= optimal_hits(trace, host + ssd)


def test_progress_counts_requests() -> None:
    done: list[int] = []
    Simulation("lru", 4).run(trace_of([(1, 2), (), (3,)]), done.append)
    assert done == [1, 1, 1]
