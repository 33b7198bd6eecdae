"""Pinned prefixes: the blocks that a pin keeps, those that it cannot keep, and the bounds of pins."""

import numpy as np
import pytest

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.quotas import Quotas
from flexkv.cache.reasons import MissReason
from flexkv.config.namespaces import Quota
from flexkv.errors import PinError
from flexkv.protocol.requests import Pin
from tests.property.model_tree import keys_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(share: float = 0.5, clock: Clock | None = None, **quotas: Quota) -> GlobalCacheEngine:
    engine = GlobalCacheEngine(
        10, LRU, clock=clock or Clock(), quotas=Quotas(quotas), max_pinned_share=share
    )
    engine.grow(10)
    return engine


def put(engine: GlobalCacheEngine, *sequence: int, tenant: int = 0) -> int:
    plan = engine.begin_put(keys_of(sequence), 0, len(sequence), tenant)
    engine.end_put(plan, np.ones(len(plan), dtype=np.bool_))
    return len(plan)


def flood(engine: GlobalCacheEngine, tenant: int = 0) -> None:
    for i in range(30):
        put(engine, 100 + i, 0, tenant=tenant)


def test_a_pinned_prefix_stays_until_it_is_unpinned() -> None:
    engine = make()
    put(engine, 1, 2, 3, 4, 5)
    assert engine.pin(keys_of((1, 2, 3, 9)), "system prompt") == Pin("system prompt", 3)
    assert put(engine, 1, 2, 3, 4, 5, 6) == 1                   # what follows on it is not pinned
    flood(engine)
    found = engine.match(keys_of((1, 2, 3, 4, 5)))
    assert (found.num_ready, found.reason) == (3, MissReason.EVICTED)
    assert engine.pins() == [Pin("system prompt", 3)]
    assert engine.unpin("system prompt") == Pin("system prompt", 3)
    assert engine.pins() == []
    flood(engine)
    assert engine.match(keys_of((1,))).num_ready == 0
    engine.check_integrity()


def test_a_pinned_prefix_does_not_expire_and_ages_again_when_it_is_unpinned() -> None:
    clock = Clock()
    engine = make(clock=clock, short=Quota(ttl_s=10))
    put(engine, 1, 2, 3, tenant=1)
    engine.pin(keys_of((1, 2)), "p", 1)
    put(engine, 1, 2, 3, 4, tenant=1)
    clock.now = 100.0
    found = engine.match(keys_of((1, 2, 3)), tenant=1)
    assert (found.num_ready, found.reason) == (2, MissReason.EXPIRED)
    assert engine.evict_ahead() == 2
    engine.unpin("p")
    assert engine.match(keys_of((1, 2, 3)), tenant=1).num_ready == 0
    assert engine.evict_ahead() == 2
    engine.check_integrity()


def test_pins_overlap() -> None:
    engine = make()
    put(engine, 1, 2, 3, 4)
    engine.pin(keys_of((1, 2, 3, 4)), "long")
    engine.pin(keys_of((1, 2)), "short")
    assert engine.stats()["pinned_blocks"] == 4                 # shared ones count once
    engine.unpin("long")
    flood(engine)
    assert engine.match(keys_of((1, 2, 3, 4))).num_ready == 2
    engine.check_integrity()


def test_what_cannot_be_pinned_is_named_and_changes_nothing() -> None:
    engine = make(a=Quota(guaranteed=0.4), b=Quota(guaranteed=0.4), c=Quota(limit=0.1))
    with pytest.raises(PinError, match="no block of this prefix is cached"):
        engine.pin(keys_of((1, 2)), "p")
    put(engine, 1, 2, 3)
    with pytest.raises(PinError, match="is not a valid name"):
        engine.pin(keys_of((1,)), "x" * 129)
    with pytest.raises(PinError, match="is not a valid name"):
        engine.pin(keys_of((1,)), "a\nb")
    assert engine.pin(keys_of((1,)), "").name
    with pytest.raises(PinError, match="already"):
        engine.pin(keys_of((1,)), "")
    with pytest.raises(PinError, match="nothing is pinned as 'q'"):
        engine.unpin("q")
    with pytest.raises(PinError, match="guarantees of other namespaces"):   # two blocks are nobody's
        engine.pin(keys_of((1, 2, 3)), "three")
    assert engine.pin(keys_of((1, 2)), "two").num_blocks == 2
    put(engine, 5, 6, 7, 8, tenant=1)
    with pytest.raises(PinError, match="6 blocks would be pinned, and max_pinned_share allows 5"):
        engine.pin(keys_of((5, 6, 7, 8)), "four", 1)
    assert engine.pin(keys_of((5, 6, 7)), "own", 1).num_blocks == 3
    assert engine.stats()["pinned_blocks"] == 5
    engine.check_integrity()


def test_there_can_be_so_many_pins() -> None:
    engine = make()
    put(engine, 1)
    for i in range(256):
        engine.pin(keys_of((1,)), str(i))
    with pytest.raises(PinError, match="256 prefixes are pinned"):
        engine.pin(keys_of((1,)), "more")


def test_a_reset_drops_pins() -> None:
    engine = make()
    put(engine, 1, 2)
    engine.pin(keys_of((1, 2)), "p")
    engine.reset()
    assert engine.pins() == []
    assert engine.stats()["free_slots"] == 10
    engine.check_integrity()
