"""The parts around a table of tasks, run step by step: a data plane, an index, an SSD tier and a lock.

The data plane does nothing by itself: graphs are handed over, blocks are copied and callbacks run when a test says so.
Slots, pages and the disk hold the content that real copies would have left there.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.lower_tier import TierService
from flexkv.cache.plan import GetPlan, PutPlan
from flexkv.protocol.ring import IN_PLACE, OpKind
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.graph import Dependency, OpStatus, TransferGraph, TransferOp
from flexkv.transfer.scheduler import OnDone, Scheduler

from .model_tree import Prefix

Content = tuple[int, Prefix] | None
"""Epoch and prefix of the KV that a slot or a page holds; None: other bytes."""


@dataclass(frozen=True)
class Record:
    """Block on disk, as a restart would offer it.

    Attributes
    ----------
    key : bytes
    content : Content
    put : int
        Task id of the put that computed it.
    """

    key: bytes
    content: Content
    put: int


@dataclass(eq=False)
class Copies(Executor):
    """Copies one block when the test says so; from its begin to its end a copy may touch slot and page.

    Attributes
    ----------
    begins : callable
        ``begins(op, i)``: block ``i`` of ``op`` is about to be touched.
    moved : dict of dict
        By task, then by block of its last op: whether the block arrived.
    hurt : set of int
        Tasks of which a copy was begun or queued, and failed.
    """

    kinds = frozenset({OpKind.D2H, OpKind.H2D, OpKind.P2D, OpKind.D2STORE, OpKind.STORE2D, OpKind.ERASE})
    begins: Callable[[TransferOp, int], None]
    progress: Progress | None = None
    queued: list[tuple[TransferOp, int]] = field(default_factory=list)
    moving: list[tuple[TransferOp, int, int]] = field(default_factory=list)
    slots: dict[int, Content] = field(default_factory=dict)
    pages: dict[int, Content] = field(default_factory=dict)
    parts: dict[int, Content] = field(default_factory=dict)        # of pages, after the first step of an exchange
    disk: dict[int, Record] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)             # SSD slots of which a read has failed
    num_clears: int = 0
    moved: dict[int, dict[int, bool]] = field(default_factory=dict)
    hurt: set[int] = field(default_factory=set)

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False) -> None:
        self.progress = progress
        if failed:
            self._answer(op, indices.tolist(), False, hurts=False)
        else:
            self.queued += [(op, int(i)) for i in indices]

    def cancel(self, op: TransferOp) -> None:
        mine = [i for each, i in self.queued if each is op]
        self.queued = [each for each in self.queued if each[0] is not op]
        self._answer(op, mine, False)

    def begin(self, which: int) -> None:
        """A copy begins to touch its slot and its page."""
        if not self.queued:
            return
        op, i = self.queued.pop(which % len(self.queued))
        src, dst = int(op.src[i]), int(op.dst[i])
        self.begins(op, i)
        if IN_PLACE in (src, dst) or src < 0:
            self._answer(op, [i], src == IN_PLACE or dst == IN_PLACE)
            return
        if op.kind is OpKind.D2STORE:
            self.disk.pop(dst, None)                       # the store empties the record before it writes
        self.moving.append((op, i, self.num_clears))

    def end(self, which: int, ok: bool) -> None:
        """A copy has ended, and is ``ok``, or has left garbage. To erase does not fail: see ``erase``."""
        if not self.moving:
            return
        op, i, num_clears = self.moving.pop(which % len(self.moving))
        src, dst = int(op.src[i]), int(op.dst[i])
        if op.kind is OpKind.ERASE:
            self.disk.pop(dst, None)
            ok = True
        elif op.kind is OpKind.D2STORE:
            assert op.keys is not None
            self.bad.discard(dst)
            if num_clears == self.num_clears:              # one that failed may have left a record
                self.disk[dst] = Record(op.keys[i].tobytes(), self.pages.get(src) if ok else None, op.task_id)
            ok = ok and num_clears == self.num_clears
        elif op.kind is OpKind.D2H:
            self.slots[dst] = self.pages.get(src) if ok else None
        elif op.kind is OpKind.H2D and op.exchange:
            self.parts[dst], self.pages[dst] = self.slots.get(src) if ok else None, None
        elif op.kind is OpKind.P2D:
            self.pages[dst] = self.parts[dst] if ok else None
        elif op.kind is OpKind.H2D:
            self.pages[dst] = self.slots.get(src) if ok else None
        else:
            assert op.keys is not None
            record = self.disk.get(src)
            self.bad |= set() if ok else {src}
            ok = ok and record is not None and record.key == op.keys[i].tobytes()
            self.pages[dst] = record.content if ok and record is not None else None
        self._answer(op, [i], ok)

    def _answer(self, op: TransferOp, indices: list[int], ok: bool, hurts: bool = True) -> None:
        if indices:
            assert self.progress is not None
            if op.kind is OpKind.P2D or (op.kind in (OpKind.D2H, OpKind.H2D) and not op.exchange):
                self.moved.setdefault(op.task_id, {}).update(dict.fromkeys(indices, ok))
            if hurts and not ok:
                self.hurt.add(op.task_id)
            self.progress(op, np.array(indices), np.full(len(indices), ok))

    def clear(self) -> None:
        """The disk forgets its records; what is being written is not recorded."""
        self.disk.clear()
        self.num_clears += 1

    def touched(self, *kinds: OpKind, source: bool = False) -> set[int]:
        """Destinations (or sources) of the copies under way."""
        return {int((op.src if source else op.dst)[i]) for op, i, _ in self.moving if op.kind in kinds}


class Plane:
    """The part of ``TransferEngine`` that a table calls. A graph that is submitted waits until it is handed over, as if
    its thread had stopped before; a cancel may wait too (``defers``).

    Attributes
    ----------
    fails : bool
        The next graph of a task is not taken.
    refused : set of int
        Tasks whose graph was not taken.
    stopped : set of int
        Tasks that the data plane must stop: none of their copies begins.
    over : list of callables
        Callbacks of graphs that were called.
    """

    def __init__(self, lock: "Lock", begins: Callable[[TransferOp, int], None]) -> None:
        self.task_ids = itertools.count(1)
        self.copies = Copies(begins)
        self.scheduler = Scheduler({(kind, tier): self.copies for kind in Copies.kinds for tier in (0, 1)})
        self.lock = lock
        self.pending: list[tuple[TransferGraph, OnDone]] = []
        self.stops: list[TransferGraph] = []
        self.defers = self.fails = False
        self.num_loads = 0
        self.refused: set[int] = set()
        self.stopped: set[int] = set()
        self.over: dict[int, Callable[[], None]] = {}

    def num_pages(self, client: int) -> None:
        """No client's pages are counted: every page is valid."""

    def exchange_of(self, client: int, num_blocks: int) -> int:
        """Every other load is an exchange."""
        self.num_loads += 1
        return self.num_loads % 2

    def submit(self, graph: TransferGraph, on_done: OnDone) -> None:
        assert self.lock.depth == 0
        if self.fails and graph.ops[0].kind is not OpKind.ERASE:
            self.fails = False
            self.refused.add(graph.task_id)
            raise MemoryError
        self.pending.append((graph, on_done))

    def hand_over(self, which: int) -> None:
        """A graph that was submitted reaches the scheduler."""
        if self.pending:
            graph, on_done = self.pending.pop(which % len(self.pending))
            self.scheduler.submit(graph, lambda graph: self._done(graph, on_done), float("inf"))

    def _done(self, graph: TransferGraph, on_done: OnDone) -> None:
        self.over[graph.task_id] = lambda: on_done(graph)
        on_done(graph)

    def cancel(self, graph: TransferGraph) -> None:
        self.stops.append(graph)
        if not self.defers:
            self.stop(len(self.stops) - 1)

    def stop(self, which: int) -> None:
        """A graph that was cancelled is stopped."""
        if self.stops:
            graph = self.stops.pop(which % len(self.stops))
            self.stopped.add(graph.task_id)
            self.scheduler.stop_graph(graph, OpStatus.CANCELLED)

    def end_early(self, task_id: int, verdict: OpStatus, is_lost: bool = False) -> bool:
        """A task gets a verdict while it runs; ``is_lost``: with its rank. False if it does not run, or has one."""
        if task_id not in self.scheduler.running() or task_id in self.stopped:
            return False
        self.stopped.add(task_id)
        for op in self.scheduler._active[task_id].graph.ops:
            op.is_lost = is_lost
        self.scheduler.stop(task_id, verdict)
        return True

    def fire(self) -> None:
        """The oldest callback is called."""
        if self.scheduler.ended:
            self.scheduler.ended.popleft()()

    def notify(self) -> None:
        """No thread waits here."""

    @property
    def stopping(self) -> set[int]:
        """Tasks that were cancelled, and are to be stopped."""
        return {graph.task_id for graph in self.stops}

    @property
    def is_idle(self) -> bool:
        """Nothing is under way."""
        return not (self.pending or self.stops or self.scheduler.running() or self.scheduler.ended)


class Index(GlobalCacheEngine):
    """An index that another thread resets while a get or a put is planned.

    Attributes
    ----------
    before, after : callable or None
        Called once, around the next plan.
    """

    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None

    def begin_get(self, *args: Any, **named: Any) -> GetPlan:
        self._interrupt("before")
        plan = super().begin_get(*args, **named)
        self._interrupt("after")
        return plan

    def begin_put(self, *args: Any, **named: Any) -> PutPlan:
        self._interrupt("before")
        plan = super().begin_put(*args, **named)
        self._interrupt("after")
        return plan

    def _interrupt(self, when: str) -> None:
        call = getattr(self, when)
        setattr(self, when, None)
        if call is not None:
            call()


class Below:
    """The part of ``Tiering`` that a table calls, over the disk of ``Copies``: what is on SSD alone is read straight
    into pages, and puts without host slots are written straight from there."""

    def __init__(self, cache: GlobalCacheEngine, copies: Copies, num_slots: int) -> None:
        self.slots = SlotAllocator(num_slots)
        self._copies = copies
        cost = CostModel(1, lambda: 0.0)
        cache.attach(1, TierService(
            self.slots, cost, lambda: True, lambda slots: slots >= 0,
            loads_directly=lambda: True, saves_directly=lambda: True,
        ))

    def begin_get(
        self, cache: GlobalCacheEngine, keys: NDArray[np.uint64], start: int, stop: int, choose: bool, host_only: bool,
        tenant: int,
    ) -> tuple[GetPlan, tuple[Dependency, ...]]:
        return cache.begin_get(keys, start, stop, choose, host_only, tenant), ()

    def end_get(self, cache: GlobalCacheEngine, plan: GetPlan, ops: Sequence[TransferOp]) -> None:
        assert len(plan.moves) <= 1
        for move in plan.moves:
            ok = ops[0].ok if ops else np.zeros(len(move), dtype=np.bool_)
            lost = ~ok & (len(ops) > 0)
            for i, slot in enumerate(move.src.tolist()):
                record = self._copies.disk.get(slot)
                is_there = record is not None and record.key == move.keys[move.blocks[i]].tobytes()
                lost[i] &= not is_there or slot in self._copies.bad
            cache.end_move(move, ok, lost)

    def put_ended(self, plan: PutPlan) -> None:
        """The test decides when ready blocks are written."""


class Lock:
    """A lock that knows whether it is held."""

    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1


class Guarded(dict[Any, Any]):
    """A dict that changes only while a lock is held."""

    def __init__(self, lock: Lock) -> None:
        super().__init__()
        self._guard = lock

    def __setitem__(self, key: Any, value: Any) -> None:
        assert self._guard.depth
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        assert self._guard.depth
        super().__delitem__(key)

    def pop(self, *args: Any) -> Any:
        assert self._guard.depth
        return super().pop(*args)

    def clear(self) -> None:
        assert self._guard.depth
        super().clear()


def guard(table: Any, lock: Lock) -> None:
    """Have what a table keeps of its tasks change only under its lock, which becomes this one."""
    table._lock = lock
    for part, names in (
        (table, ("_tasks", "_matched", "_unclaimed")), (table._provisional, ("_puts", "_resting")),
        (table._good_loads, ("_epochs",)),
    ):
        for name in names:
            setattr(part, name, Guarded(lock))
