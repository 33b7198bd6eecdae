"""Policies in the engine against plain ones: the same hits, to the block."""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import ARC, LRU, POLICIES, S3FIFO, EvictionPolicy

from .examples import EXAMPLES
from .model_tree import Prefix, keys_of
from .plain_policies import PlainARC, PlainLRU, PlainS3FIFO

PLAIN = {LRU: PlainLRU, S3FIFO: PlainS3FIFO, ARC: PlainARC}


def make_engine(policy: type[EvictionPolicy], capacity: int) -> GlobalCacheEngine:
    clock = itertools.count()
    engine = GlobalCacheEngine(capacity, policy, clock=lambda: float(next(clock)))
    engine.grow(capacity)
    return engine


def request(engine: GlobalCacheEngine, sequence: Prefix) -> int:
    keys = keys_of(sequence)
    got = engine.begin_get(keys, 0, len(keys))
    engine.end_get(got)
    put = engine.begin_put(keys, got.stop, len(keys))
    engine.end_put(put, np.ones(len(put), dtype=np.bool_))
    return got.stop


def conversations(seed: int, count: int) -> Iterator[Prefix]:
    """Turns of many conversations that share how they begin, in a random order; some are asked again."""
    rng = random.Random(seed)
    talks: list[Prefix] = []
    for number in range(count):
        if talks and rng.random() < 0.6:
            talk = talks[max(0, len(talks) - 1 - int(rng.expovariate(0.2)))]
            talk = talk[: rng.randint(1, len(talk))] if rng.random() < 0.2 else talk
        else:
            talk = (0,) * rng.randint(0, 3)
        talk += tuple(1 + number % 250 for _ in range(rng.randint(0 if talk else 1, 6)))
        talks.append(talk)
        yield talk


@pytest.mark.parametrize("policy", PLAIN, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("capacity", [7, 40, 160])
def test_same_hits_as_a_plain_policy(policy: type[EvictionPolicy], capacity: int) -> None:
    engine, plain = make_engine(policy, capacity), PLAIN[policy](capacity)
    for sequence in conversations(capacity, 600):
        assert request(engine, sequence) == plain.request(sequence)
    engine.check_integrity()
    assert len(plain.at) == capacity


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@pytest.mark.parametrize("policy", PLAIN, ids=lambda policy: policy.__name__)
@settings(max_examples=max(10, EXAMPLES // 20), deadline=None)
@given(st.lists(SEQUENCES, min_size=5, max_size=60), st.integers(3, 12))
def test_same_hits_for_any_requests(policy: type[EvictionPolicy], sequences: list[Prefix], capacity: int) -> None:
    engine, plain = make_engine(policy, capacity), PLAIN[policy](capacity)
    for sequence in sequences:
        assert request(engine, sequence) == plain.request(sequence)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.__name__)
def test_a_full_engine_stays_sound(policy: type[EvictionPolicy]) -> None:
    """Every put evicts, while plans hold blocks; what is held is not touched, and nothing leaks."""
    rng, engine = random.Random(1), make_engine(policy, 60)
    held = []
    for sequence in conversations(2, 600):
        keys = keys_of(sequence)
        held.append(engine.begin_get(keys, 0, len(keys)))
        put = engine.begin_put(keys, held[-1].stop, len(keys))
        engine.end_put(put, np.array([rng.random() < 0.9 for _ in range(len(put))], dtype=np.bool_))
        for plan in held:
            assert plan.tree is not engine._tree or engine.match(plan.keys).num_ready >= plan.stop
        while len(held) > rng.randint(0, 5):
            engine.end_get(held.pop(rng.randrange(len(held))))
        if rng.random() < 0.1:
            engine.evict_ahead()
        if rng.random() < 0.01:
            engine.reset()
        engine.check_integrity()
    for plan in held:
        engine.end_get(plan)
    engine.check_integrity()
