"""The state machine of tasks, step by step: its calls interleaved in every way with hand-over, copies, results, resets.

A step is what one thread does between two moments at which another one may run. The data plane does nothing by itself:
graphs are handed over, blocks copied and callbacks run when a step says so. Each slot and page holds what would have
been copied there, so that a block that is offered, and a load that succeeds, is compared with what computing writes.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.eviction import LRU
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.controller.tasks.table import TaskTable
from flexkv.controller.tasks.task import KVTask
from flexkv.errors import TaskError
from flexkv.protocol.ring import OpKind
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.graph import OpStatus, TransferGraph, TransferOp
from flexkv.transfer.scheduler import Scheduler

from .examples import EXAMPLES
from .model_tree import Prefix, keys_of

NUM_SLOTS = 5
SEQUENCES = st.sampled_from([(0, 0), (0, 0, 0), (0, 1), (1,)])
STEPS = st.lists(
    st.tuples(
        st.sampled_from([
            "put", "put", "get", "plan_put", "plan_get", "run", "hold", "launch", "hand_over", "begin", "begin",
            "begin", "end", "end", "end", "lose", "fire", "fire", "cancel", "accept", "accept", "late", "take", "take",
            "reset_index", "reset_tasks", "expire", "evict",
        ]),
        SEQUENCES, st.integers(0, 63),
    ),
    min_size=25, max_size=60,
)

Content = tuple[int, Prefix] | None
"""Epoch and prefix of the KV that a slot or a page holds; None: of something else."""


class Copies(Executor):
    """Copies a block when the test says so; from the moment it begins until it ends, it may touch slot and page."""

    kinds = frozenset({OpKind.D2H, OpKind.H2D})

    def __init__(self) -> None:
        self.queued: list[tuple[TransferOp, int]] = []
        self.moving: list[tuple[TransferOp, int]] = []
        self.slots: dict[int, Content] = {}
        self.pages: dict[int, Content] = {}
        self.progress: Progress | None = None

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, doomed: bool = False) -> None:
        self.progress = progress
        if doomed:
            progress(op, indices, np.zeros(len(indices), dtype=np.bool_))
        else:
            self.queued += [(op, int(i)) for i in indices]

    def cancel(self, op: TransferOp) -> None:
        mine = [each for each in self.queued if each[0] is op]
        self.queued = [each for each in self.queued if each[0] is not op]
        self._answer(op, [i for _, i in mine], False)

    def begin(self, which: int) -> None:
        if self.queued:
            op, i = self.queued.pop(which % len(self.queued))
            if op.src[i] < 0:
                self._answer(op, [i], False)
            else:
                self.moving.append((op, i))

    def end(self, which: int, ok: bool) -> None:
        if self.moving:
            op, i = self.moving.pop(which % len(self.moving))
            source, target = (self.pages, self.slots) if op.kind is OpKind.D2H else (self.slots, self.pages)
            target[int(op.dst[i])] = source.get(int(op.src[i])) if ok else None
            self._answer(op, [i], ok)

    def _answer(self, op: TransferOp, indices: list[int], ok: bool) -> None:
        if indices:
            assert self.progress is not None
            self.progress(op, np.array(indices), np.full(len(indices), ok))

    def touched(self, kind: OpKind) -> set[int]:
        """Slots (D2H) or pages (H2D) that copies under way write."""
        return {int(op.dst[i]) for op, i in self.moving if op.kind is kind}


class Plane:
    """The part of ``TransferEngine`` that a table calls; a graph that is submitted waits until it is handed over."""

    def __init__(self) -> None:
        self.task_ids = itertools.count(1)
        self.copies = Copies()
        self.scheduler = Scheduler(dict.fromkeys(Copies.kinds, self.copies))
        self.num_pages = None
        self.pending: list[tuple[TransferGraph, Callable[[TransferGraph], None]]] = []

    def submit(self, graph: TransferGraph, on_done: Callable[[TransferGraph], None]) -> None:
        self.pending.append((graph, on_done))

    def cancel(self, graph: TransferGraph) -> None:
        self.scheduler.stop_graph(graph, OpStatus.CANCELLED)

    def notify(self) -> None:
        """Nobody waits here."""


@dataclass
class Known:
    """A task, as its caller sees it."""

    task: KVTask
    sequence: Prefix
    pages: NDArray[np.int32]
    provisional: bool
    epoch: int
    accepted: float = math.nan
    told: bool = False
    ended: Status | None = None


@dataclass
class Checked:
    """A table over a data plane that is stepped, and what each of its callers was told."""

    now: float = 0.0
    known: dict[int, Known] = field(default_factory=dict)
    planned: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    owner: dict[int, int] = field(default_factory=dict)      # of each host slot: the put that filled it
    next_page: int = 0

    def __post_init__(self) -> None:
        self.plane = Plane()
        self.cache = GlobalCacheEngine(NUM_SLOTS, LRU, 1.0, 0.0, clock=self.clock)
        self.cache.grow(NUM_SLOTS)
        transfer: Any = self.plane
        self.table = TaskTable(transfer, 0, 4, None, accept_within_s=50.0, clock=lambda: self.now)

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    # ---- calls ------------------------------------------------------------------------------------------------

    def plan_put(self, sequence: Prefix, seed: int) -> None:
        busy = self.plane.copies.touched(OpKind.D2H)
        task = self.table.new_put(self.cache, keys_of(sequence), 0, len(sequence), 0, 0, seed % 2 == 0)
        assert not busy & set(task.slots.tolist())           # nothing writes a slot that is given away
        self._plan(task, sequence, seed % 2 == 0)
        for page, block in zip(self.known[task.task_id].pages, task.blocks, strict=True):
            self.plane.copies.pages[int(page)] = (self.cache.epoch, sequence[: block + 1])
        for slot in task.slots.tolist():
            self.owner[slot] = task.task_id
            self.plane.copies.slots[slot] = None

    def plan_get(self, sequence: Prefix, seed: int) -> None:
        stop = len(sequence) if seed % 2 else None
        self._plan(self.table.new_get(self.cache, keys_of(sequence), 0, stop, 0), sequence, False)

    def put(self, sequence: Prefix, seed: int) -> None:
        self.plan_put(sequence, seed)
        self._start()

    def get(self, sequence: Prefix, seed: int) -> None:
        self.plan_get(sequence, seed)
        self._start()

    def _start(self) -> None:
        self.run((), len(self.planned) - 1)
        self.hand_over((), len(self.plane.pending) - 1)

    def _plan(self, task: KVTask, sequence: Prefix, provisional: bool) -> None:
        pages = np.arange(self.next_page, self.next_page + len(task.blocks), dtype=np.int32)
        self.next_page += len(pages)
        self.known[task.task_id] = Known(task, sequence, pages, provisional, self.cache.epoch)
        self.planned.append(task.task_id)

    def _pop(self, ids: list[int], seed: int) -> Known | None:
        return self.known[ids.pop(seed % len(ids))] if ids else None

    def run(self, sequence: Prefix, seed: int) -> None:
        known = self._pop(self.planned, seed)
        if known is not None:
            after = [min(self.known)] if seed % 5 == 4 and not known.task.loading else []
            self.table.run(known.task, known.pages, 0, after=after)

    def hold(self, sequence: Prefix, seed: int) -> None:
        known = self._pop(self.planned, seed)
        if known is not None:
            self.table.hold(known.task)
            self.held.append(known.task.task_id)

    def launch(self, sequence: Prefix, seed: int) -> None:
        """Held tasks, also such as were launched, cancelled or expired already, and a task twice."""
        if self.held:
            which = self.held[seed % len(self.held)]
            ids = [which, which] if seed % 7 == 0 else [which]
            try:
                tasks = [(self.table.matched(i), self.known[i].pages) for i in ids]
                self.table.launch(tasks, 0)
                assert len(ids) == 1
            except TaskError:
                pass

    def cancel(self, sequence: Prefix, seed: int) -> None:
        ids = [i for i in self.known if i not in self.planned]
        if ids:
            which = ids[seed % len(ids)]
            self.table.cancel(which)
            known = self.known[which]
            if math.isnan(known.accepted):
                known.accepted = 0                           # of a provisional put nothing becomes ready any more

    def accept(self, sequence: Prefix, seed: int) -> None:
        ids = [i for i, known in self.known.items() if known.provisional and i not in self.planned]
        if ids:
            known = self.known[ids[seed % len(ids)]]
            stop = seed % 4 if seed % 3 == 0 else math.inf
            self.table.accept(known.task.task_id, stop)
            if math.isnan(known.accepted):
                known.accepted = stop

    def reset_index(self, sequence: Prefix, seed: int) -> None:
        if seed < 24:
            self.cache.reset()

    def reset_tasks(self, sequence: Prefix, seed: int) -> None:
        if seed < 24:
            self.cache.reset()
            self.table.reset()

    def expire(self, sequence: Prefix, seed: int) -> None:
        self.now += 30.0
        self.table.keep_house()

    def evict(self, sequence: Prefix, seed: int) -> None:
        self.cache._host.evict(self.cache._tree, 1 + seed % 2, self.clock())

    # ---- the data plane ---------------------------------------------------------------------------------------

    def hand_over(self, sequence: Prefix, seed: int) -> None:
        if self.plane.pending:
            graph, on_done = self.plane.pending.pop(seed % len(self.plane.pending))
            self.plane.scheduler.submit(graph, on_done, math.inf)

    def begin(self, sequence: Prefix, seed: int) -> None:
        self.plane.copies.begin(seed)

    def end(self, sequence: Prefix, seed: int) -> None:
        self.plane.copies.end(seed, True)

    def lose(self, sequence: Prefix, seed: int) -> None:
        self.plane.copies.end(seed, False)

    def late(self, sequence: Prefix, seed: int) -> None:
        if running := self.plane.scheduler.running():
            self.plane.scheduler.stop(running[seed % len(running)], OpStatus.TIMEOUT)

    def fire(self, sequence: Prefix, seed: int) -> None:
        if self.plane.scheduler.ended:
            self.plane.scheduler.ended.popleft()()

    # ---- results ----------------------------------------------------------------------------------------------

    def take(self, sequence: Prefix, seed: int) -> None:
        """Once a caller has a result, it gives the pages of a put away; those of a get only when it has settled."""
        ids = [i for i, known in self.known.items() if known.ended is None and i not in self.planned]
        if not ids:
            return
        task_id = ids[seed % len(ids)]
        known = self.known[task_id]
        if not self.table.has_result(task_id):
            return
        is_settled = self.table.is_settled(task_id)
        response = self.table.take(task_id)
        if response.status is Status.UNREADY:
            return
        if not known.task.loading and known.ended is None:
            for page in known.pages.tolist():
                self.plane.copies.pages[page] = None
        if response.status is Status.SUCCESS and known.task.loading:
            for page, block in zip(known.pages.tolist(), known.task.blocks.tolist(), strict=True):
                assert self.plane.copies.pages[page] == (self.cache.epoch, known.sequence[: block + 1])
        if known.task.loading and is_settled:
            assert not self.plane.copies.touched(OpKind.H2D) & set(known.pages.tolist())
        if is_settled or not known.task.loading:
            known.ended = response.status
        assert bool(response.reason) == (response.status is not Status.SUCCESS)

    # ---- promises ---------------------------------------------------------------------------------------------

    def check(self, sequence: Prefix) -> None:
        keys = keys_of(sequence)
        count = self.cache.match(keys).num_ready
        for block, slot in enumerate(self.cache._tree.slots(keys[:count], 0).tolist()):
            assert self.plane.copies.slots[slot] == (self.cache.epoch, sequence[: block + 1])
            known = self.known[self.owner[slot]]
            assert not known.provisional or block < known.accepted
            assert known.ended in (None, Status.SUCCESS, Status.FAILED), known
        self.cache.check_integrity()

    def drain(self) -> None:
        """Without its callers everything comes to rest, and nothing is held."""
        for task_id in self.planned:
            self.table.discard(self.known[task_id].task)
        self.planned.clear()
        for _ in range(300):
            self.hand_over((), 0)
            self.begin((), 0)
            self.end((), 0)
            self.fire((), 0)
        self.now += 1000.0
        self.table.keep_house()
        assert self.table.unsettled() == []
        assert self.table.num_provisional == 0
        for sequence in ((0, 0), (0, 0, 0), (0, 1), (1,)):
            self.check(sequence)
        self.cache.reset()
        assert self.cache.stats()["free_slots"] == NUM_SLOTS


@settings(max_examples=EXAMPLES // 10, deadline=None)
@given(STEPS)
def test_tasks_keep_their_promises_in_every_interleaving(steps: list[tuple[str, Prefix, int]]) -> None:
    checked = Checked()
    for name, sequence, seed in steps:
        getattr(checked, name)(sequence, seed)
        checked.check(sequence)
    checked.drain()
