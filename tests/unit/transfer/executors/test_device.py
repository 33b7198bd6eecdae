"""The device executor: which blocks of an op the results of its parts are for."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.protocol.registration import Hello
from flexkv.protocol.ring import OpFlag, OpKind
from flexkv.transfer.executors.agent_link import Part
from flexkv.transfer.executors.device import DeviceExecutor, _consecutive
from flexkv.transfer.graph import Dependency, OpStatus, TransferGraph, TransferOp
from flexkv.transfer.scheduler import Scheduler
from tests.support.harness import hello_of


@dataclass
class _Rings:
    max_blocks: int
    fence: int = 0
    exchanges: bool = True
    is_over: bool = False

    def end_exchange(self) -> None:
        self.is_over = True

    def reached(self, load: bool) -> int:
        return self.fence


@dataclass(eq=False)
class _Link:
    """An agent that records the ops that it gets."""

    rings: _Rings
    hello: Hello = field(default_factory=hello_of)
    writes: bool = True
    healthy: bool = True
    caught_up: bool = True
    exchange: int = 0
    spared_bytes: int = 0
    left: bool = False
    parts: list[Part] = field(default_factory=list)

    ops: set[TransferOp] = field(default_factory=set)

    def submit(self, part: Part) -> None:
        self.parts.append(part)

    def has_left(self) -> bool:
        return self.left

    def end_exchange(self) -> None:
        self.exchange = 0
        self.rings.end_exchange()

    def fail_backlog(self) -> list[Part]:
        return []


def executor_for(ranks: int) -> DeviceExecutor:
    executor = DeviceExecutor()
    executor.expect(0, ranks)
    return executor


def _op(count: int) -> TransferOp:
    numbers = np.arange(count, dtype=np.int32)
    return TransferOp(OpKind.H2D, numbers, numbers)


@pytest.mark.parametrize("order", ["in order", "shuffled", "with gaps", "swapped"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_each_block_gets_the_results_of_its_own_ranks(order: str, ranks: int) -> None:
    """Whatever blocks are submitted, in parts of 7, and however the ranks' results are cut and mixed."""
    rng = np.random.default_rng(7)
    for count in (1, 2, 7, 8, 40):
        op, executor, links = _op(count), executor_for(ranks), [_Link(_Rings(7)) for _ in range(ranks)]
        for link in links:
            executor.add(link)          # type: ignore[arg-type]
        indices = np.arange(count)
        if order == "shuffled":
            rng.shuffle(indices)
        elif order == "with gaps":
            indices = indices[::2]
        elif order == "swapped" and count > 3:          # first and last as if they followed one another
            indices[[1, 2]] = indices[[2, 1]]
        calls = np.zeros(count, dtype=int)

        def progress(op: TransferOp, which: NDArray[np.intp] | slice, ok: NDArray[np.bool_], calls=calls) -> None:
            assert len(ok) > 0
            calls[which] += 1
            op.resolve(which, ok)

        op.started[indices] = True
        executor.submit(op, indices, progress)
        good = rng.random((ranks, count)) < 0.8         # by rank and block
        todo = [(rank, part, 0) for rank, link in enumerate(links) for part in link.parts]
        while todo:
            rank, part, first = todo.pop(int(rng.integers(len(todo))))
            stop = int(rng.integers(first + 1, len(part.indices) + 1))
            part.flight.answer(part.rows(first, stop), good[rank, part.indices[first:stop]])
            if stop < len(part.indices):
                todo.append((rank, part, stop))
        expected = np.zeros(count, dtype=bool)
        expected[indices] = good.all(axis=0)[indices]
        assert op.ok.tolist() == expected.tolist()
        assert calls.tolist() == [1 if block in indices else 0 for block in range(count)]
        assert op.num_resolved == len(indices)


def test_no_results_are_no_progress() -> None:
    """Neither by indices nor by a slice."""
    op, executor, link = _op(3), executor_for(1), _Link(_Rings(7))
    executor.add(link)          # type: ignore[arg-type]
    executor.submit(op, np.arange(3), lambda op, which, ok: pytest.fail("nothing arrived"))
    link.parts[0].flight.answer(link.parts[0].rows(0, 0), np.zeros(0, dtype=np.bool_))
    link.parts[0].flight.answer(np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.bool_))
    assert not op.done


@pytest.mark.parametrize(
    ("indices", "expected"),
    [([0], True), ([5], True), ([3, 4, 5], True), ([0, 2], False), ([1, 0], False), ([0, 2, 1, 3], False),
     ([0, 1, 1, 3], False), ([2, 2], False), ([0, 5, 2], False)],
)
def test_consecutive(indices: list[int], expected: bool) -> None:
    """One more each time, and nothing else."""
    assert _consecutive(np.array(indices)) is expected


def _executor(writes: list[bool]) -> tuple[DeviceExecutor, list[_Link]]:
    executor = executor_for(len(writes))
    links = [_Link(_Rings(7), hello_of(rank), writes=is_writer) for rank, is_writer in enumerate(writes)]
    for link in links:
        executor.add(link)              # type: ignore[arg-type]
    return executor, links


@pytest.mark.parametrize("kind", [OpKind.D2H, OpKind.H2D])
@pytest.mark.parametrize("writes", [[True, True], [True, False], [False, True, False]])
def test_a_save_concerns_the_ranks_that_write(kind: OpKind, writes: list[bool]) -> None:
    """It completes without the others, connected or not; a load needs all."""
    numbers = np.arange(3, dtype=np.int32)
    for dead in [None, *range(len(writes))]:
        executor, links = _executor(writes)
        if dead is not None:
            executor._links[0].remove(links[dead])      # type: ignore[arg-type]
        op = TransferOp(kind, numbers, numbers)
        executor.submit(op, np.arange(3), TransferOp.resolve)
        concerned = [rank for rank, is_writer in enumerate(writes) if is_writer or kind is OpKind.H2D]
        assert [rank for rank, link in enumerate(links) if link.parts] == [rank for rank in concerned if rank != dead]
        for link in links:
            for part in link.parts:
                is_refused = bool(part.flags & OpFlag.CANCELLED)
                assert is_refused == (dead in concerned)
                part.flight.answer(part.rows(0, 3), np.full(3, not is_refused))
        assert op.done
        assert op.ok.all() == (dead not in concerned)
        assert op.is_lost == (dead in concerned)


@pytest.mark.parametrize("kind", [OpKind.D2H, OpKind.H2D])
def test_ops_of_a_client_that_is_not_known_fail(kind: OpKind) -> None:
    """Also a save, when all the ranks that were connected wrote nothing."""
    executor, links = _executor([False])
    executor._ranks.clear()                             # as after ``dismiss``, while the link still closes
    links[0].healthy = False
    numbers = np.arange(3, dtype=np.int32)
    op = TransferOp(kind, numbers, numbers)
    executor.submit(op, np.arange(3), TransferOp.resolve)
    assert op.done
    assert not op.ok.any()


def test_the_step_of_a_save_is_reached_when_the_ranks_that_write_have_done_it() -> None:
    executor, links = _executor([True, False])
    links[0].rings.fence, links[1].rings.fence = 5, 4
    numbers = np.arange(1, dtype=np.int32)
    for kind, fence, expected in ((OpKind.D2H, 5, True), (OpKind.H2D, 5, False), (OpKind.H2D, 4, True),
                                  (OpKind.D2H, 6, False)):
        assert executor.reached(TransferOp(kind, numbers, numbers, fence=fence)) is expected


# ---- exchanges --------------------------------------------------------------------------------------------------


def _exchange(num_ranks: int = 3) -> tuple[DeviceExecutor, list[_Link]]:
    executor, links = _executor([True] * num_ranks)
    for link in links:
        link.exchange, link.spared_bytes = 4, 1 << 20
    return executor, links


def test_large_loads_of_ranks_that_know_one_another_are_exchanges() -> None:
    executor, links = _exchange()
    assert [executor.exchange_of(0, count) for count in (15, 16, 1000)] == [0, 4, 4]
    assert executor.exchange_of(1, 1000) == 0                # not a client
    for change in ({"exchange": 5}, {"exchange": 0}, {"healthy": False}, {"caught_up": False}):
        before = {name: getattr(links[1], name) for name in change}
        vars(links[1]).update(change)
        assert executor.exchange_of(0, 1000) == 0
        vars(links[1]).update(before)
    links[2].rings.exchanges = False
    assert executor.exchange_of(0, 1000) == 0
    links[2].rings.exchanges = True
    assert executor.exchange_of(0, 1000) == 4
    executor.detach(links[0])                                # type: ignore[arg-type]
    assert executor.exchange_of(0, 1000) == 0
    assert [link.rings.is_over for link in links] == [False, True, True]
    assert [link.exchange for link in links] == [0, 0, 0]


@pytest.mark.parametrize("kind", [OpKind.H2D, OpKind.P2D])
def test_the_steps_of_an_outdated_exchange_fail(kind: OpKind) -> None:
    """A rank registered again, so the others know memory that is not its own any more."""
    numbers = np.arange(3, dtype=np.int32)
    for exchange, is_current in ((4, True), (3, False)):
        executor, links = _exchange()
        op = TransferOp(kind, numbers, numbers, exchange=exchange)
        executor.submit(op, np.arange(3), TransferOp.resolve)
        for link in links:
            [part] = link.parts
            assert bool(part.flags & OpFlag.CANCELLED) != is_current
            assert bool(part.flags & OpFlag.SHARE) == (kind is OpKind.H2D)
        assert op.is_lost != is_current


def test_blocks_of_the_second_step_fail_if_a_rank_has_left() -> None:
    """Whether or not its hang-up was handled: its pages may have been used again before its peers read them."""
    executor, links = _exchange()
    numbers = np.arange(4, dtype=np.int32)
    first, second = (TransferOp(kind, numbers, numbers, exchange=4) for kind in (OpKind.H2D, OpKind.P2D))
    for op in (first, second):
        executor.submit(op, np.arange(4), TransferOp.resolve)
    assert set(executor.exchanging(0)) == {first, second}
    assert executor.exchanging(1) == []
    parts = [link.parts for link in links]
    for rank in range(3):
        parts[rank][0].flight.answer(slice(0, 4), np.ones(4, dtype=np.bool_))
        parts[rank][1].flight.answer(slice(0, 2), np.ones(2, dtype=np.bool_))
    links[0].left = True                                     # it has answered
    for rank in range(3):
        parts[rank][1].flight.answer(slice(2, 4), np.ones(2, dtype=np.bool_))
    assert first.ok.all()
    assert second.ok.tolist() == [True, True, False, False]
    assert second.is_lost
    assert executor.exchanging(0) == []


def test_a_block_that_one_rank_could_not_read_ends_for_all() -> None:
    """Each rank gets the second step of the block as cancelled, so that its load has a result."""
    executor, links = _exchange()
    numbers = np.arange(4, dtype=np.int32)
    first = TransferOp(OpKind.H2D, numbers, numbers, exchange=4)
    second = TransferOp(OpKind.P2D, numbers, numbers, exchange=4, depends_on=[Dependency.each(first)])
    scheduler = Scheduler({(kind, 0): executor for kind in (OpKind.H2D, OpKind.P2D)})
    graph = TransferGraph(1, [first, second])
    scheduler.submit(graph, lambda graph: None, 10.0)
    for rank in range(2):
        links[rank].parts[0].flight.answer(slice(0, 4), np.array([True, rank == 0, True, True]))
        assert not links[0].parts[1:]                        # rank 2 has not answered
    links[2].parts[0].flight.answer(slice(0, 4), np.ones(4, dtype=np.bool_))
    for link in links:
        moved, ended = link.parts[1:]
        assert (moved.indices.tolist(), ended.indices.tolist()) == ([0, 2, 3], [1])
        assert not moved.flags & (OpFlag.CANCELLED | OpFlag.SHARE)
        assert ended.flags & OpFlag.CANCELLED
        moved.flight.answer(moved.indices, np.ones(3, dtype=np.bool_))
        ended.flight.answer(ended.indices, np.zeros(1, dtype=np.bool_))
    assert second.ok.tolist() == [True, False, True, True]
    assert graph.status is OpStatus.FAILED
