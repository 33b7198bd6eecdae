"""The scheduler of graphs, with executors that do as the test says: pipelining, failures, cancels, callbacks."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.config import TransferConfig
from flexkv.controller.host_memory import HostMemory
from flexkv.controller.listener import Listener
from flexkv.errors import InvariantError
from flexkv.protocol.ring import OpKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.graph import Dependency, OpStatus, TransferGraph, TransferOp
from flexkv.transfer.scheduler import Scheduler

IDS = np.arange(4, dtype=np.int32)


class Leg(Executor):
    """Keeps each op until the test lets it arrive."""

    def __init__(self, kind: OpKind) -> None:
        self.kinds = frozenset({kind})
        self.given: list[int] = []
        self.failed: list[int] = []
        self.cancelled = False
        self._progress: Progress | None = None
        self._op: TransferOp | None = None

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False) -> None:
        self._op, self._progress = op, progress
        (self.failed if failed else self.given).extend(indices.tolist())
        if failed:
            progress(op, indices, np.zeros(len(indices), dtype=np.bool_))

    def cancel(self, op: TransferOp) -> None:
        self.cancelled = True

    def arrive(self, engine: TransferEngine, *indices: int, ok: bool = True) -> None:
        assert self._op is not None
        assert self._progress is not None
        with engine._lock:
            self._progress(self._op, np.array(indices), np.full(len(indices), ok))
        engine.poll()


class Pipeline:
    """Two legs, the second after the first."""

    def __init__(self, engine: TransferEngine, first: Leg, second: Leg) -> None:
        self.engine, self.first, self.second = engine, first, second
        one = TransferOp(OpKind.D2H, IDS, IDS)
        two = TransferOp(OpKind.H2D, IDS, IDS, depends_on=[Dependency.each(one)])
        self.graph = TransferGraph(7, [one, two])
        self.done: list[TransferGraph] = []
        engine.submit(self.graph, self.done.append)


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    legs = Leg(OpKind.D2H), Leg(OpKind.H2D)
    config = TransferConfig(gpu_register_port=str(tmp_path / "s"), op_timeout_s=0.3)
    engine = TransferEngine(config, on_capacity=lambda slots: None, executors=legs)
    for leg in legs:
        engine._executors.update(dict.fromkeys(leg.routes, leg))
    Listener(config, engine, HostMemory(1 << 20)).start()
    yield Pipeline(engine, *legs)
    for leg in legs:
        rest = [i for i in leg.given if leg._op is not None and not leg._op.resolved[i]]
        if rest:
            leg.arrive(engine, *rest, ok=False)
    engine.shutdown()


def test_a_block_goes_on_when_it_has_arrived(pipeline: Pipeline) -> None:
    assert pipeline.first.given == [0, 1, 2, 3]
    assert pipeline.second.given == []
    pipeline.first.arrive(pipeline.engine, 2)
    assert pipeline.second.given == [2]
    pipeline.second.arrive(pipeline.engine, 2)
    assert not pipeline.graph.done
    pipeline.first.arrive(pipeline.engine, 0, 3, 1)
    assert [op.status for op in pipeline.graph.ops] == [OpStatus.DONE, OpStatus.RUNNING]
    pipeline.second.arrive(pipeline.engine, 1, 0, 3)
    assert pipeline.done == [pipeline.graph]
    assert [op.status for op in pipeline.graph.ops] == [OpStatus.DONE, OpStatus.DONE]
    assert pipeline.graph.status is OpStatus.DONE
    assert pipeline.graph.quiesced
    pipeline.graph.check_integrity()


def test_a_failed_block_takes_only_its_own_successor_along(pipeline: Pipeline) -> None:
    pipeline.first.arrive(pipeline.engine, 1, ok=False)
    assert pipeline.second.failed == [1]
    pipeline.first.arrive(pipeline.engine, 0, 2, 3)
    assert pipeline.second.given == [0, 2, 3]
    pipeline.second.arrive(pipeline.engine, 0, 2, 3)
    assert pipeline.graph.status is OpStatus.FAILED
    assert pipeline.graph.ops[1].ok.tolist() == [True, False, True, True]


def test_cancel_starts_nothing_more_and_waits_for_what_runs(pipeline: Pipeline) -> None:
    pipeline.first.arrive(pipeline.engine, 0)
    pipeline.engine.cancel(7)
    assert pipeline.first.cancelled
    assert pipeline.second.failed == [1, 2, 3]
    assert pipeline.graph.status is OpStatus.CANCELLED
    assert not pipeline.graph.quiesced
    pipeline.first.arrive(pipeline.engine, 1, 2, 3)
    assert pipeline.done == []                       # block 0 of the second leg is still under way
    pipeline.second.arrive(pipeline.engine, 0)
    assert pipeline.done == [pipeline.graph]
    assert pipeline.graph.ops[1].ok.tolist() == [True, False, False, False]
    pipeline.engine.cancel(7)
    pipeline.engine.cancel(8)


def test_a_late_graph_is_reported_before_it_is_quiesced(pipeline: Pipeline) -> None:
    assert pipeline.engine.wait(lambda: pipeline.graph.done, 5.0)
    assert pipeline.graph.status is OpStatus.TIMEOUT
    assert not pipeline.graph.quiesced
    assert not pipeline.done
    pipeline.first.arrive(pipeline.engine, 0, 1, 2, 3)
    assert pipeline.graph.status is OpStatus.TIMEOUT
    assert pipeline.done == [pipeline.graph]


def test_a_callback_that_raises_does_not_stop_the_others(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    ended_before: list[int] = []

    def broken(graph: TransferGraph) -> None:
        ended_before.append(len(pipeline.done))
        raise RuntimeError("not my day")

    last = pipeline.graph.ops[1]
    arrival = TransferOp(OpKind.ARRIVAL, IDS, IDS, depends_on=[Dependency.each(last)])
    pipeline.engine.submit(TransferGraph(8, [arrival]), broken)
    pipeline.first.arrive(pipeline.engine, 0, 1, 2, 3)
    pipeline.second.arrive(pipeline.engine, 0, 1, 2, 3)         # both graphs end, and 8 is the first of them
    assert ended_before == [0]
    assert pipeline.done == [pipeline.graph]
    assert "not my day" in caplog.text


def test_a_graph_must_be_in_order() -> None:
    one = TransferOp(OpKind.D2H, IDS, IDS)
    two = TransferOp(OpKind.H2D, IDS, IDS, depends_on=[Dependency.each(one)])
    with pytest.raises(InvariantError):
        TransferGraph(1, [two, one])
    with pytest.raises(InvariantError):
        TransferGraph(1, [])
    with pytest.raises(ValueError, match="must be equal"):
        TransferOp(OpKind.D2H, IDS, IDS[:2])
    for wrong in (IDS, np.zeros((2, len(IDS) + 1), np.int32), np.zeros((0, len(IDS)), np.int32),
                  np.full((1, len(IDS)), 1 << 31), np.zeros((1, len(IDS)))):
        with pytest.raises(ValueError, match="further_pages"):
            TransferOp(OpKind.D2H, IDS, IDS, further_pages=wrong)
    with pytest.raises(ValueError, match="must be equal"):
        Dependency(one, np.arange(2), np.arange(3))
    one.resolve(np.array([1]), True)
    with pytest.raises(InvariantError, match="two results"):
        one.resolve(np.array([1]), True)


class Shared:
    """A fetch as a graph of its own, and loads that wait for some of its blocks."""

    def __init__(self, engine: TransferEngine, fetch: Leg, load: Leg) -> None:
        self.engine, self.fetch, self.load = engine, fetch, load
        self.source = TransferOp(OpKind.D2H, IDS, IDS)
        self.done: list[int] = []

    def start_fetch(self) -> None:
        self.engine.submit(TransferGraph(1, [self.source]), self._ended, background=True)

    def start_load(self, task_id: int, mine: list[int], theirs: list[int]) -> TransferOp:
        needs = Dependency(self.source, np.array(mine, dtype=np.intp), np.array(theirs, dtype=np.intp))
        op = TransferOp(OpKind.H2D, IDS, IDS, depends_on=[needs])
        self.engine.submit(TransferGraph(task_id, [op]), self._ended)
        return op

    def _ended(self, graph: TransferGraph) -> None:
        self.done.append(graph.task_id)


@pytest.fixture
def shared(pipeline: Pipeline) -> Shared:
    """After the fixture's own graph has ended."""
    pipeline.first.arrive(pipeline.engine, 0, 1, 2, 3)
    pipeline.second.arrive(pipeline.engine, 0, 1, 2, 3)
    pipeline.first.given.clear()
    pipeline.second.given.clear()
    return Shared(pipeline.engine, pipeline.first, pipeline.second)


def test_blocks_wait_for_those_of_another_graph_and_the_others_go_at_once(shared: Shared) -> None:
    shared.start_fetch()
    op = shared.start_load(2, mine=[1, 3], theirs=[0, 2])
    assert shared.load.given == [0, 2]
    shared.fetch.arrive(shared.engine, 1, 3)
    assert shared.load.given == [0, 2]
    shared.fetch.arrive(shared.engine, 2)
    assert shared.load.given == [0, 2, 3]
    shared.fetch.arrive(shared.engine, 0, ok=False)
    assert shared.load.failed == [1]
    shared.load.arrive(shared.engine, 0, 2, 3)
    assert shared.done == [1, 2]
    assert op.ok.tolist() == [True, False, True, True]


def test_what_has_arrived_before_counts_at_once(shared: Shared) -> None:
    shared.start_fetch()
    shared.fetch.arrive(shared.engine, 0, 1)
    shared.fetch.arrive(shared.engine, 2, ok=False)
    op = shared.start_load(2, mine=[0, 1, 2, 3], theirs=[0, 1, 2, 3])
    assert shared.load.given == [0, 1]
    assert shared.load.failed == [2]
    shared.fetch.arrive(shared.engine, 3)
    assert shared.load.given == [0, 1, 3]
    shared.load.arrive(shared.engine, 0, 1, 3)
    assert op.ok.tolist() == [True, True, False, True]
    assert shared.source.dependents == []


def test_a_load_may_come_before_the_fetch_it_waits_for(shared: Shared) -> None:
    op = shared.start_load(2, mine=[0], theirs=[3])
    assert shared.load.given == [1, 2, 3]
    shared.start_fetch()
    shared.fetch.arrive(shared.engine, 3)
    assert shared.load.given == [1, 2, 3, 0]
    shared.load.arrive(shared.engine, 0, 1, 2, 3)
    shared.fetch.arrive(shared.engine, 0, 1, 2)
    assert shared.done == [2, 1]
    assert op.ok.all()


def test_a_fetch_outlives_the_load_that_is_cancelled(shared: Shared) -> None:
    shared.start_fetch()
    shared.start_load(2, mine=[0, 1, 2, 3], theirs=[0, 1, 2, 3])
    shared.engine.cancel(2)
    assert shared.done == [2]
    assert not shared.fetch.cancelled
    shared.fetch.arrive(shared.engine, 0, 1, 2, 3)
    assert shared.load.given == []
    assert shared.done == [2, 1]


def test_arrival_moves_nothing(shared: Shared) -> None:
    shared.start_fetch()
    op = TransferOp(OpKind.ARRIVAL, IDS, IDS, depends_on=[Dependency.each(shared.source)])
    shared.engine.submit(TransferGraph(2, [op]), lambda graph: shared.done.append(graph.task_id))
    shared.fetch.arrive(shared.engine, 0, 2)
    assert op.ok.tolist() == [True, False, True, False]
    shared.fetch.arrive(shared.engine, 1, ok=False)
    shared.fetch.arrive(shared.engine, 3)
    assert op.ok.tolist() == [True, False, True, True]
    assert op.status is OpStatus.FAILED
    assert set(shared.done) == {1, 2}


class Counted(np.ndarray[Any, Any]):
    """Counts the blocks that are looked at."""

    looked_at = 0

    def __getitem__(self, which: Any) -> Any:
        found = super().__getitem__(which)
        Counted.looked_at += np.size(found)
        return np.asarray(found)


def test_the_work_grows_with_the_blocks_and_not_with_their_square() -> None:
    num_blocks, num_waiters = 512, 4
    source, load = Leg(OpKind.STORE2H), Leg(OpKind.H2D)
    scheduler = Scheduler({(OpKind.STORE2H, 0): source, (OpKind.H2D, 0): load})
    every = np.arange(num_blocks, dtype=np.int32)
    fetch = TransferOp(OpKind.STORE2H, every, every)
    fetch.ok, fetch.resolved = fetch.ok.view(Counted), fetch.resolved.view(Counted)
    scheduler.submit(TransferGraph(1, [fetch]), lambda graph: None, math.inf)
    order = np.random.default_rng(1).permutation(num_blocks)
    for task_id in range(2, 2 + num_waiters):
        op = TransferOp(OpKind.H2D, every, every, depends_on=[Dependency(fetch, order, np.arange(num_blocks))])
        op.started = op.started.view(Counted)
        scheduler.submit(TransferGraph(task_id, [op]), lambda graph: None, math.inf)
    Counted.looked_at = 0
    for block in range(num_blocks):
        scheduler._progress(fetch, np.array([block]), np.array([True]))
    assert load.given == [block for block in order.tolist() for _ in range(num_waiters)]
    assert Counted.looked_at <= 4 * num_blocks * num_waiters


def test_several_blocks_may_wait_for_the_same_one() -> None:
    source, load = Leg(OpKind.STORE2H), Leg(OpKind.H2D)
    scheduler = Scheduler({(OpKind.STORE2H, 0): source, (OpKind.H2D, 0): load})
    fetch = TransferOp(OpKind.STORE2H, IDS, IDS)
    again = Dependency(fetch, np.array([0, 1, 3]), np.array([2, 2, 0]))
    op = TransferOp(OpKind.H2D, IDS, IDS, depends_on=[again, Dependency(fetch, np.array([1]), np.array([1]))])
    scheduler.submit(TransferGraph(1, [fetch]), lambda graph: None, math.inf)
    scheduler.submit(TransferGraph(2, [op]), lambda graph: None, math.inf)
    assert load.given == [2]
    scheduler._progress(fetch, np.array([3, 2]), np.array([True, True]))
    assert load.given == [2, 0]
    scheduler._progress(fetch, np.array([1, 0]), np.array([True, False]))
    assert (load.given, load.failed) == ([2, 0, 1], [3])
