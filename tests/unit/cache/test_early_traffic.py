"""The record of events before the SSD tier is open: bounded, and replayed as fast as the writer takes them."""

import numpy as np

from flexkv.cache.early_traffic import EarlyTraffic
from tests.property.model_tree import keys_of
from tests.unit.cache.admission.test_write_back import World


def test_events_are_replayed_as_the_queue_has_room() -> None:
    world, early = World(), EarlyTraffic()                 # the queue takes 32 blocks
    for first in range(0, 60, 20):
        keys = keys_of(tuple(range(first, first + 20)))
        plan = world.cache.begin_put(keys, 0, 20)
        world.cache.end_put(plan, np.ones(20, dtype=np.bool_))
        early.add(plan)
    assert early.num_blocks == 60
    early.replay(world.writer)
    assert early.num_blocks == 40
    assert sum(world.write()) == 20
    early.replay(world.writer)
    world.write()
    early.replay(world.writer)
    world.write()
    assert early.num_blocks == 0
    assert world.writer.stats()["written_blocks"] == 60
    assert world.writer.stats()["dropped_writes"] == 0


def test_a_sequence_that_is_longer_than_the_queue_is_written_as_far_as_it_goes() -> None:
    world, early = World(), EarlyTraffic()
    plan = world.cache.begin_put(keys_of(tuple(range(50))), 0, 50)
    world.cache.end_put(plan, np.ones(50, dtype=np.bool_))
    early.add(plan)
    early.replay(world.writer)
    assert sum(world.write()) == 32


def test_a_load_is_evidence_of_reuse_too() -> None:
    world, early = World(ssd_slots=8), EarlyTraffic()
    world.put(tuple(range(8)))
    world.write()                                           # the tier is full
    plan = world.cache.begin_put(keys_of(tuple(range(100, 104))), 0, 4)
    world.cache.end_put(plan, np.ones(4, dtype=np.bool_))
    early.add(plan)
    early.replay(world.writer)
    assert world.write() == []                              # nothing shows that it is used again
    early.add(plan.keys)
    early.replay(world.writer)
    assert world.write() == [4]


def test_the_oldest_are_dropped_beyond_the_bound() -> None:
    early = EarlyTraffic(max_keys=10)
    for first in range(0, 12, 4):
        early.add(keys_of(tuple(range(first, first + 4))))
    assert early.num_blocks == 8
    early.add(keys_of(tuple(range(50))))
    assert early.num_blocks == 0
    early.clear()
    assert early.num_blocks == 0
