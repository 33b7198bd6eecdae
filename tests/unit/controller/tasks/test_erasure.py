"""A put straight to SSD that does not succeed: its slots are erased there before it settles."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.cache.lower_tier import TierService
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.controller.tasks.table import TaskTable
from flexkv.controller.tasks.task import KVTask, direct_moves
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import OpStatus, TransferGraph
from tests.property.model_tree import keys_of


class Plane:
    """Keeps graphs until the test ends them."""

    def __init__(self) -> None:
        self.task_ids = itertools.count(1)
        self.graphs: list[tuple[TransferGraph, Callable[[TransferGraph], None]]] = []
        self.fails = False

    def submit(self, graph: TransferGraph, on_done: Callable[[TransferGraph], None]) -> None:
        if self.fails:
            raise MemoryError
        for op in graph.ops:
            op.started[:] = graph.verdict is None
        self.graphs.append((graph, on_done))

    def num_pages(self, client: int) -> None:
        return None

    def cancel(self, graph: TransferGraph) -> None:
        graph.verdict = graph.verdict or OpStatus.CANCELLED

    def end(self, ok: list[bool]) -> list[int]:
        """The oldest graph ends; returns the slots that it erased."""
        graph, on_done = self.graphs.pop(0)
        for op in graph.ops:
            op.resolve(np.arange(len(op)), np.array(ok[: len(op)]))
            op.status = graph.verdict or (OpStatus.DONE if op.ok.all() else OpStatus.FAILED)
        graph.status, graph.quiesced = graph.ops[-1].status, True
        erased = graph.ops[0].dst.tolist() if graph.ops[0].kind is OpKind.ERASE else []
        on_done(graph)
        return erased


class World:
    """A put of three blocks, of which the host has room for none, so that all go straight to SSD."""

    def __init__(self) -> None:
        self.plane = Plane()
        self.cache = GlobalCacheEngine(2, LRU, 1.0, 0.0, clock=itertools.count(1.0).__next__, lower={"ssd": 4})
        self.cache.grow(2)
        self.slots = SlotAllocator(4)
        cost = CostModel(1, lambda: 0.0)
        self.cache.attach(1, TierService(
            self.slots, cost, lambda: True, lambda slots: slots >= 0, saves_directly=lambda: True
        ))
        tiering: Any = type("Tiering", (), {"put_ended": lambda self, plan: None})()
        transfer: Any = self.plane
        self.table = TaskTable(transfer, 0, 4, tiering)
        self.task = self.table.new_put(self.cache, keys_of((1, 2, 3)), 0, 3, 0)
        assert isinstance(self.task, KVTask)
        assert self.direct == [0, 1, 2]
        self.table.run(self.task, np.arange(3, dtype=np.int32), 0)

    @property
    def direct(self) -> list[int]:
        return [int(slot) for move in direct_moves(self.task.plan) for slot in move.dst]

    def stop(self, how: str) -> None:
        if how == "cancelled":
            self.table.cancel(self.task.task_id)
        elif how == "late":
            self.plane.graphs[0][0].verdict = OpStatus.TIMEOUT
        elif how == "lost":
            self.plane.graphs[0][0].ops[0].is_lost = True
            self.plane.graphs[0][0].verdict = OpStatus.FAILED
        else:
            self.cache.reset()
            self.table.reset()


@pytest.mark.parametrize("how", ["cancelled", "late", "lost", "reset"])
def test_slots_are_erased_before_they_are_free_and_before_there_is_a_result(how: str) -> None:
    world = World()
    world.stop(how)
    world.plane.end([True, True, False])
    assert world.slots.num_free == 1
    assert not world.table.is_settled(world.task.task_id)
    assert not world.table.has_result(world.task.task_id)
    assert world.plane.end([True, True, True]) == [0, 1, 2]
    assert world.table.take(world.task.task_id).status is not Status.SUCCESS
    assert world.slots.num_free == 4
    assert world.plane.graphs == []
    assert not world.cache.has_slot(1, keys_of((1, 2, 3))).any()
    world.cache.check_integrity()


def test_blocks_that_were_not_written_are_erased_and_the_others_stay() -> None:
    world = World()
    world.plane.end([True, False, True])
    assert world.plane.end([True]) == [1]
    assert world.table.take(world.task.task_id).status is Status.FAILED
    assert world.cache.has_slot(1, keys_of((1, 2, 3))).tolist() == [True, False, True]


def test_a_put_that_succeeds_erases_nothing() -> None:
    world = World()
    world.plane.end([True, True, True])
    assert world.plane.graphs == []
    assert world.table.take(world.task.task_id).status is Status.SUCCESS


def test_a_put_that_was_stopped_before_it_began_erases_nothing() -> None:
    world = World()
    world.plane.graphs[0][0].ops[0].started[:] = False
    world.stop("cancelled")
    world.plane.end([False, False, False])
    assert world.plane.graphs == []
    assert world.slots.num_free == 4


def test_a_reset_while_some_slots_are_erased_has_the_others_erased_too() -> None:
    world = World()
    world.plane.end([True, False, True])
    world.stop("reset")
    assert world.plane.end([True]) == [1]
    assert world.slots.num_free == 1
    assert world.plane.end([True, True]) == [0, 2]
    assert world.table.take(world.task.task_id).status is Status.CANCELLED
    assert world.slots.num_free == 4


def test_an_erasure_that_fails_is_logged_and_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.stop("cancelled")
    world.plane.end([True, True, True])
    with caplog.at_level(logging.ERROR):
        world.plane.end([False, True, False])
    assert "2 of its blocks could not be erased" in caplog.text
    assert world.table.take(world.task.task_id).status is Status.CANCELLED
    other = World()
    other.stop("cancelled")
    other.plane.fails = True
    other.plane.end([True, True, True])
    assert other.table.take(other.task.task_id).status is Status.CANCELLED
    assert other.slots.num_free == 4
