"""Eviction queues: the order of eviction for any priorities, and the events that the policy gets."""

import numpy as np
import pytest

from flexkv._core.index.eviction import Pieces
from flexkv._core.index.eviction_queues import EvictionQueues
from flexkv._core.index.radix import RadixTree
from flexkv.errors import InvariantError
from tests.property.model_tree import keys_of


def put(tree: RadixTree, sequence: tuple[int, ...], now: float, tenant: int = 0) -> None:
    keys = keys_of(sequence)
    slots = np.full(len(keys), -1, dtype=np.int32)
    absent = tree.absent(keys)
    slots[absent] = [100 * sequence[0] + i for i in absent]
    tree.insert(keys, slots, 0, now, tenant)
    tree.set_ready(keys, slots, 0)


def place(queues: EvictionQueues, **fields: object) -> np.ndarray:
    events = queues.drain()
    for name, value in fields.items():
        events[name] = value
    queues.place(events)
    return events


def test_any_priorities_come_out_in_order() -> None:
    rng, tree = np.random.default_rng(0), RadixTree(1000)
    for i in range(200):
        put(tree, (i,), i)
    events = tree.eviction_queues(0).drain()
    events["priority"] = rng.permutation(200)
    tree.eviction_queues(0).place(events)
    moved = events[rng.permutation(200)[:80]]
    moved["priority"] = rng.integers(0, 200, 80)
    tree.eviction_queues(0).place(moved)
    tree.check_integrity()
    priority_of = dict(zip(events["node"].tolist(), events["priority"].tolist(), strict=True))
    priority_of.update(zip(moved["node"].tolist(), moved["priority"].tolist(), strict=True))
    pieces = Pieces()
    tree.evict(0, 0, 0, 1000, 300.0, pieces=pieces)
    gone = [priority_of[node] for node in pieces.array()["node"].tolist()]
    assert gone == sorted(priority_of.values())
    assert tree.num_blocks == 0


def test_the_policy_is_told_once_of_all_that_changed() -> None:
    tree = RadixTree(100)
    put(tree, (1, 1, 1), 1.0)
    put(tree, (2,), 2.0)
    tree.touch(keys_of((1, 1)), 5.0)
    events = place(tree.eviction_queues(0))
    assert sorted(zip(events["length"].tolist(), events["new_hits"].tolist(), strict=True)) == [(1, 0), (1, 0), (2, 1)]
    assert events["is_new"].all()
    assert events["priority"].tolist() == [1.0, 2.0, 1.0]        # when they came
    assert len(tree.eviction_queues(0).drain()) == 0
    tree.touch(keys_of((1, 1, 1)), 9.0)
    events = place(tree.eviction_queues(0))
    assert not events["is_new"].any()
    assert events["last_access"].tolist() == [9.0, 9.0]


def test_queues_leave_and_spare() -> None:
    tree = RadixTree(100)
    tree.configure([2])
    for i in range(4):
        put(tree, (i, i), i)
    queues = tree.eviction_queues(0)
    place(queues, lives=[1, 0, 0, 0])
    slots = tree.evict(0, 0, 0, 10, 7.0, leave=3, spare_to=1)
    assert slots.tolist() == []                             # 0 was spared; now the other queue could be chosen
    slots = tree.evict(0, 0, 0, 10, 7.0, leave=3, spare_to=1)
    assert slots.tolist() == [101, 100, 201]
    assert queues.blocks().tolist() == [[3, 2]]
    slots = tree.evict(0, 0, 1, 10, 8.0, spare_to=1)
    assert slots.tolist() == [1, 0]
    put(tree, (9,), 9.0)
    with pytest.raises(InvariantError, match="queue 9"):
        place(queues, queue=9)
    with pytest.raises(ValueError, match="queue 5"):
        tree.evict(0, 0, 5, 1, 9.0)


def test_a_node_that_goes_bit_by_bit_is_one_piece() -> None:
    tree, pieces = RadixTree(100), Pieces()
    put(tree, (1, 1, 1), 1.0)
    put(tree, (2, 2), 2.0)
    place(tree.eviction_queues(0))
    for want in (2, 2, 0):
        tree.evict(0, 0, 0, want, 3.0, pieces=pieces)
    first_keys = [keys_of((1,))[0, 0], keys_of((2, 2))[1, 0]]
    assert pieces.array()[["first_key", "blocks"]].tolist() == [(first_keys[0], 3), (first_keys[1], 1)]
    tree.evict(0, 0, 0, 10, 3.0)                            # nobody asked
    assert len(pieces) == 2
    assert len(Pieces().array()) == 0


def test_the_queues_of_a_tenant() -> None:
    tree = RadixTree(100)
    tree.configure([2])
    queues = tree.eviction_queues(0)
    assert not queues.has_evictable(0)
    put(tree, (1, 1, 1), 1.0)
    put(tree, (2, 2), 2.0)
    place(queues, queue=[1, 1])
    blocks, heads = queues.of_tenant(0)
    assert (blocks.tolist(), heads.tolist()) == ([0, 5], [np.inf, 1.0])
    assert queues.has_evictable(0)
    tree.evict(0, 0, 1, 5, 3.0)
    assert not queues.has_evictable(0)


def test_what_is_pinned_is_passed_over_and_goes_later() -> None:
    tree = RadixTree(100)
    put(tree, (1,), 1.0)
    put(tree, (2,), 2.0)
    place(tree.eviction_queues(0))
    tree.acquire(keys_of((1,)), 0, 1)
    assert tree.evict(0, 0, 0, 5, 3.0).tolist() == [200]
    assert tree.evict(0, 0, 0, 5, 3.0).tolist() == []
    tree.release(keys_of((1,)), 0, 1)
    assert tree.evict(0, 0, 0, 5, 3.0).tolist() == [100]


def test_tenants_have_their_own_order_and_age() -> None:
    tree = RadixTree(100)
    tree.configure([1], [np.inf, 10.0])
    put(tree, (1, 1), 0.0, tenant=1)
    put(tree, (2, 2), 0.0)
    place(tree.eviction_queues(0))
    assert tree.eviction_queues(0).blocks().tolist() == [[2], [2]]
    assert tree.match(keys_of((1, 1)), 10.0).num_ready == 2
    assert tree.match(keys_of((1, 1)), 10.5).num_ready == 0
    assert tree.match(keys_of((1, 1)), 10.5).evicted_at == 10.0
    assert tree.match(keys_of((2, 2)), 99.0).num_ready == 2
    assert sorted(tree.expire(0, 10.5, 100).tolist()) == [100, 101]
    assert tree.eviction_queues(0).blocks().tolist() == [[2], [0]]
    tree.touch(keys_of((2, 2)), 20.0, tenant=1)
    assert tree.eviction_queues(0).blocks().tolist() == [[0], [2]]
    tree.check_integrity()
