"""Deadlines count from when blocks can move: fences, other transfers, and the bound on all of it."""

import math
from pathlib import Path

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.protocol.ring import OpKind
from flexkv.transfer.deadline import LONGEST_WAIT, Deadline, waits
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp
from tests.support.harness import controller_of, local, tokens_of, until

IDS = np.arange(4, dtype=np.int32)


def op_of(kind: OpKind, fence: int = 0, *, after: TransferOp | None = None, running: bool = True) -> TransferOp:
    op = TransferOp(kind, IDS, IDS, fence=fence, depends_on=[Dependency.each(after)] if after else [])
    op.started[:] = running
    return op


def is_waiting(graph: TransferGraph, reached: int = 0, bounded: bool = True) -> bool:
    return waits(graph, lambda op: op.fence <= reached, lambda task_id: bounded)


def test_an_op_waits_for_its_fence_only() -> None:
    graph = TransferGraph(1, [op_of(OpKind.D2H, fence=7)])
    assert is_waiting(graph, reached=6)
    assert not is_waiting(graph, reached=7)
    assert not is_waiting(TransferGraph(2, [op_of(OpKind.H2D)]))


def test_what_runs_before_a_fenced_op_counts() -> None:
    fetch = op_of(OpKind.STORE2H)
    load = op_of(OpKind.H2D, fence=7, after=fetch, running=False)
    graph = TransferGraph(1, [fetch, load])
    assert not is_waiting(graph)                                # the disk is slow
    fetch.resolve(slice(0, 2), True)
    load.started[:2] = True
    assert not is_waiting(graph)
    fetch.resolve(slice(2, 4), True)
    load.started[:] = True
    assert is_waiting(graph)                                    # the step is slow
    assert not is_waiting(graph, reached=7)


def test_waiting_for_a_transfer_with_a_deadline_of_its_own_does_not_count() -> None:
    other = op_of(OpKind.STORE2H)
    TransferGraph(1, [other])
    graph = TransferGraph(2, [op_of(OpKind.H2D, after=other, running=False)])
    assert is_waiting(graph, bounded=True)
    assert not is_waiting(graph, bounded=False)


def test_time_counts_from_when_it_is_seen_to_run() -> None:
    deadline = Deadline(20.0, 100.0)
    assert not deadline.look(160.0, waiting=True)
    assert not deadline.look(161.0, waiting=False)
    assert not deadline.look(180.9, waiting=False)
    assert deadline.look(181.0, waiting=False)


def test_a_second_wait_starts_the_clock_again() -> None:
    deadline = Deadline(20.0, 0.0)
    assert not deadline.look(1.0, waiting=False)
    assert not deadline.look(20.0, waiting=True)
    assert not deadline.look(39.0, waiting=False)
    assert not deadline.look(58.9, waiting=False)
    assert deadline.look(59.0, waiting=False)


def test_no_wait_is_unbounded() -> None:
    deadline = Deadline(20.0, 0.0)
    assert not deadline.look(LONGEST_WAIT * 20.0 - 0.1, waiting=True)
    assert deadline.look(LONGEST_WAIT * 20.0, waiting=True)
    assert "has waited 200 s (10 x op_timeout_s) for the engine's step 7" in deadline.reason(
        TransferGraph(1, [op_of(OpKind.D2H, fence=7)])
    )


def test_background_work_has_no_deadline() -> None:
    deadline = Deadline(math.inf, 0.0)
    assert not deadline.is_finite
    assert not deadline.look(1e9, waiting=False)


def test_the_reason_names_direction_blocks_and_setting() -> None:
    deadline = Deadline(20.0, 0.0)
    deadline.look(0.0, waiting=False)
    save, load = op_of(OpKind.D2H, fence=7), op_of(OpKind.H2D)
    save.resolve(slice(0, 1), True)
    assert deadline.reason(TransferGraph(1, [save])).startswith(
        "saving 4 blocks has taken longer than 20 s (op_timeout_s) after the engine's step was done: 1 were moved"
    )
    assert deadline.reason(TransferGraph(1, [load])).startswith(
        "loading 4 blocks has taken longer than 20 s (op_timeout_s): 0 were moved"
    )


@pytest.mark.parametrize("save", [True, False])
def test_a_step_may_take_longer_than_the_limit(tmp_path: Path, save: bool) -> None:
    """The engine computes for several times op_timeout_s; the transfer that waits for that succeeds, and is right."""
    with local(tmp_path, op_timeout_s=0.2) as (manager, client, tensors):
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(4))
        tensors.fill(range(4), 1)
        before = tensors.read(range(4))
        if not save:
            assert manager.wait(manager.blocks.put_blocks(hasher.keys, 0, IDS)) is not None
            tensors.zero()
        begin = manager.blocks.put_blocks if save else manager.blocks.get_blocks
        task = begin(hasher.keys, 0, IDS, fence=3)
        assert task is not None
        scheduler, looks = controller_of(manager)._cache.transfer._scheduler, set()
        until(lambda: looks.add(scheduler._next_look) or len(looks) > 10)       # a look every 50 ms
        assert manager.try_wait(task) == {}
        client.advance_fence(load=3, save=3)
        assert manager.wait(task)[task].status is Status.SUCCESS
        if save:
            tensors.zero()
            task = manager.blocks.get_blocks(hasher.keys, 0, IDS)
            assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read(range(4)) == before


def test_a_step_that_never_ends_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with local(tmp_path, op_timeout_s=0.05) as (manager, _, tensors):
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(2))
        tensors.fill(range(2), 1)
        task = manager.blocks.put_blocks(hasher.keys, 0, IDS[:2], fence=3)
        assert task is not None
        response = manager.wait(task, timeout=10.0)[task]
        assert response.status is Status.TIMEOUT
        assert response.reason.startswith(
            "saving 2 blocks has waited 0.5 s (10 x op_timeout_s) for the engine's step 3, which did not end"
        )
        assert response.reason in caplog.text
        assert manager.blocks.lookup(hasher.keys).num_ready == 0
