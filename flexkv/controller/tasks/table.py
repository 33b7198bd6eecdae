"""Table of tasks, from match to result."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import NO_MATCH, GetPlan, MatchResult, PutPlan
from flexkv.cache.tier import HOST
from flexkv.controller.response import KVResponse, KVResponseStatus
from flexkv.controller.tasks import reasons
from flexkv.controller.tasks.erasure import erase
from flexkv.controller.tasks.graphs import arrival_of, graph_of
from flexkv.controller.tasks.loads import GoodLoads
from flexkv.controller.tasks.provisional import ProvisionalPuts
from flexkv.controller.tasks.task import EndedTask, KVTask, TaskStage
from flexkv.controller.tasks.task_log import TaskLog
from flexkv.controller.tiering import Tiering
from flexkv.errors import TaskError
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import Dependency, OpStatus, TransferGraph

logger = logging.getLogger("flexkv.controller")

_MAX_UNCLAIMED = 4096
"""Maximum number of unclaimed results. Beyond it the oldest are dropped."""

_MAX_MATCHED = 4096
"""Tasks that may wait for their launch. Beyond this number the oldest expire: more requests than any engine runs at a
time, and each holds slots."""

_LAUNCH_WITHIN_S = 60.0
"""A matched task expires after this time: its engine has forgotten it. An engine launches within a few scheduling
steps, and those take seconds at most."""


class TaskTable:
    """Known tasks, from match to result. Submits their graphs to the data plane.

    Thread safe. Every transition of a task is made under one lock, which is acquired before the index's and the data
    plane's, never after. A graph is submitted without the lock; if it is cancelled before it is submitted, the data
    plane starts none of its blocks.

    Parameters
    ----------
    transfer : TransferEngine
    dp_client_id : int
        Data-parallel client whose ranks move the blocks.
    tokens_per_block : int
    tiering : Tiering or None
        The tiers below host memory.
    accept_within_s : float
        ``hold_s`` of ``ProvisionalPuts``, in seconds.
    task_ids : iterator of int, optional
        Source of the ids of tasks; default: that of ``transfer``.
    on_news : callable, optional
        ``on_news(task_id)`` is called when a task has got a result, and when it has settled. It must not wait.
    clock : callable
        Monotonic time in seconds.
    """

    def __init__(
        self, transfer: TransferEngine, dp_client_id: int, tokens_per_block: int, tiering: Tiering | None = None,
        accept_within_s: float = 20.0, *, task_ids: Iterator[int] | None = None,
        on_news: Callable[[int], None] | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transfer = transfer
        self._tiering = tiering
        self._dp_client_id = dp_client_id
        self._tokens_per_block = tokens_per_block
        self._clock = clock
        self._task_ids = transfer.task_ids if task_ids is None else task_ids
        self._on_news = on_news
        self._lock = threading.RLock()
        self._tasks: dict[int, KVTask | EndedTask] = {}
        self._matched: dict[int, float] = {}             # when each was matched, in that order
        self._unclaimed: dict[int, None] = {}            # settled, in that order
        self._good_loads = GoodLoads()
        self._log = TaskLog()
        self._provisional = ProvisionalPuts(accept_within_s)

    # ---- matching ---------------------------------------------------------------------------------------------

    def new_get(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], start: int, stop: int | None, num_tokens: int,
        choose: bool = True, host_only: bool = False, tenant: int = 0,
    ) -> KVTask:
        """Plan a load of blocks ``[start, stop)``; blocks from the first unavailable one on get slot -1 and fail. With
        ``stop`` None the task has only the available blocks. The caller must pass the task to ``hold`` or ``run``.

        ``choose``: with ``stop`` None, end before blocks that are computed faster than loaded. ``host_only``: end
        before blocks that are not in host memory now. ``tenant``: tenant of the sequence's namespace.
        """
        end, choose = len(keys) if stop is None else stop, choose and stop is None
        epoch = cache.epoch if cache is not None else 0          # before the plan: it may be taken for older, not newer
        plan, needs = self._begin_get(cache, keys, start, end, choose, host_only, tenant)
        found = plan.slots if plan is not None else np.zeros(0, dtype=np.int32)
        count = len(found) if stop is None else stop - start
        absent = np.full(count - len(found), -1, dtype=np.int32)
        slots = np.concatenate([found, absent]) if len(absent) else found
        first = start if stop is not None or plan is None else plan.start
        return KVTask(
            next(self._task_ids), cache, epoch, plan, np.arange(first, first + count, dtype=np.int32), slots,
            self._tokens_per_block, num_tokens, self._tiering, needs, match=NO_MATCH if plan is None else plan.match,
        )

    def _begin_get(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], start: int, stop: int, choose: bool,
        host_only: bool, tenant: int,
    ) -> tuple[GetPlan | None, tuple[Dependency, ...]]:
        if cache is None:
            return None, ()
        if self._tiering is None:
            return cache.begin_get(keys, start, stop, choose, tenant=tenant), ()
        return self._tiering.begin_get(cache, keys, start, stop, choose, host_only, tenant)

    def new_put(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], start: int, stop: int, num_tokens: int,
        tenant: int = 0, provisional: bool = False,
    ) -> KVTask:
        """Reserve slots for the absent blocks of ``[start, stop)``. The caller must pass the task to ``hold``, ``run``
        or ``discard``."""
        plan: PutPlan | None = None
        blocks = slots = np.zeros(0, dtype=np.int32)
        epoch = cache.epoch if cache is not None else 0
        if cache is not None:
            # A block that goes straight to a lower tier is recorded there before it can be accepted.
            plan = cache.begin_put(keys, start, stop, tenant, direct=not provisional)
            blocks, slots = plan.blocks, plan.slots_on(HOST)
        return KVTask(
            next(self._task_ids), cache, epoch, plan, blocks, slots, self._tokens_per_block, num_tokens,
            self._tiering, loading=False, is_provisional=provisional,
        )

    def hold(self, task: KVTask) -> None:
        """Keep a task until it is launched or cancelled, or expires after ``_LAUNCH_WITHIN_S`` seconds."""
        with self._lock:
            self._tasks[task.task_id] = task
            self._matched[task.task_id] = self._clock()
            while len(self._matched) > _MAX_MATCHED:
                self._expire(next(iter(self._matched)))

    def discard(self, task: KVTask) -> None:
        """Release the blocks and slots of a task that was neither held nor run."""
        task.release(np.zeros(len(task.blocks), dtype=np.bool_))

    def matched(self, task_id: int) -> KVTask:
        """Returns a task that waits for its launch.

        Raises
        ------
        TaskError
            The task is not known, or was launched or ended already.
        """
        task = self._tasks.get(task_id)
        if isinstance(task, KVTask) and task.stage is TaskStage.MATCHED:
            return task
        state = reasons.NOT_MATCHED if task is None else (
            f"ended already: {task.reason}" if isinstance(task, EndedTask) and task.reason else "launched already"
        )
        raise TaskError(f"task {task_id} is {state}")

    # ---- running ----------------------------------------------------------------------------------------------

    def launch(
        self, tasks: Sequence[tuple[KVTask, NDArray[np.int32]]], fence: int, layerwise: bool = False, counter: int = 0
    ) -> None:
        """Run held tasks, each with its pages ((m,) int32).

        Raises
        ------
        TaskError
            A task was launched or ended meanwhile, or is given twice; no task was launched.
        """
        with self._lock:
            seen: set[int] = set()
            for task, _ in tasks:
                if task.task_id in seen or self.matched(task.task_id) is not task:
                    raise TaskError(f"task {task.task_id} is given twice: launch each task once")
                seen.add(task.task_id)
            graphs = [self._begin(task, pages, fence, layerwise, counter) for task, pages in tasks]
        for (task, _), graph in zip(tasks, graphs, strict=True):
            self._submit(task, graph)

    def run(
        self, task: KVTask, pages: NDArray[np.int32], fence: int, layerwise: bool = False, after: Sequence[int] = ()
    ) -> None:
        """Run a task that is not held: move its blocks between their slots and ``pages`` ((m,) int32).

        ``after``: ids of loads of which every block must have succeeded; otherwise all blocks fail.
        """
        with self._lock:
            graph = self._begin(task, pages, fence, layerwise, after=after)
        self._submit(task, graph)

    def _begin(
        self, task: KVTask, pages: NDArray[np.int32], fence: int, layerwise: bool = False, counter: int = 0,
        after: Sequence[int] = (),
    ) -> TransferGraph | None:
        """Make a task RUNNING. Under the lock."""
        self._tasks[task.task_id] = task
        self._matched.pop(task.task_id, None)
        task.stage = TaskStage.RUNNING
        if len(task.blocks) == 0:
            self._settle(task, *task.empty_outcome())
            return None
        loads, are_good = self._good_loads.needed(task, after, self._tasks)
        task.graph = graph_of(task, pages, self._dp_client_id, fence, layerwise, counter, loads, self._transfer)
        if (on_news := self._on_news) is not None:
            task.graph.on_stop = lambda graph: on_news(graph.task_id)
        if task.is_stale or not are_good:            # the rank still learns that these pages were not moved
            task.graph.verdict = OpStatus.FAILED
            task.reason = reasons.WAS_RESET if task.is_stale else reasons.LOAD_FAILED
        if task.is_provisional:
            self._provisional.begin(task.task_id)
        return task.graph

    def _submit(self, task: KVTask, graph: TransferGraph | None) -> None:
        if graph is None:
            return
        try:
            self._transfer.submit(graph, partial(self._on_done, task))
        except Exception:
            logger.exception("task %d could not be handed to the data plane", task.task_id)
            self._transfer.cancel(graph)
            if graph.status is OpStatus.PENDING:           # it was not taken, so nothing will end it
                with self._lock:
                    nothing = np.zeros(len(task.blocks), dtype=np.bool_)
                    self._settle(task, KVResponseStatus.FAILED, nothing, reasons.INTERNAL)

    def prefetch(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], num_tokens: int, start: int = 0,
        tenant: int = 0, host_only: bool = False,
    ) -> int:
        """Start a task that ends when the leading blocks on any tier are in host memory, however long the reads take;
        returns its id. ``host_only``: only blocks that are in host memory now."""
        host_only = host_only or (cache is not None and cache.loads_directly)                   # need not come there
        task = self.new_get(cache, keys, start, None, num_tokens, choose=False, host_only=host_only, tenant=tenant)
        with self._lock:
            self._tasks[task.task_id] = task
            task.stage = TaskStage.RUNNING
            if len(task.blocks) == 0:
                self._settle(task, *task.empty_outcome())
                return task.task_id
            if not task.needs:
                self._settle(task, KVResponseStatus.SUCCESS, np.ones(len(task.blocks), dtype=np.bool_), "")
                return task.task_id
            task.graph = arrival_of(task)
        self._submit(task, task.graph)
        return task.task_id

    # ---- ending -----------------------------------------------------------------------------------------------

    def cancel(self, task_id: int, reason: str = reasons.CANCELLED) -> None:
        """Stop a task. It is forgotten if it was not launched; an unaccepted put is dropped; a running task settles."""
        with self._lock:
            self._provisional.drop(task_id)
            task = self._tasks.get(task_id)
            if not isinstance(task, KVTask):
                return
            if task.stage is TaskStage.MATCHED:
                del self._tasks[task_id], self._matched[task_id]
                self.discard(task)
                self._transfer.notify()
                return
            if task.verdict is None and task.decided is None:
                task.verdict, task.reason = KVResponseStatus.CANCELLED, task.reason or reason
            graph = task.graph
        if graph is not None:
            self._transfer.cancel(graph)

    def reset(self) -> list[int]:
        """Cancel all tasks, after a reset of the index: no block that was planned before it becomes ready. Returns the
        ids of the tasks, which may still run."""
        with self._lock:
            self._good_loads.clear()
            self._provisional.drop_all()
            unsettled = self.unsettled()
        for task_id in unsettled:
            self.cancel(task_id, reasons.WAS_RESET)
        return unsettled

    def accept(self, task_id: int, stop: float) -> None:
        """Accept the blocks of a provisional put at positions before ``stop`` (infinite: all), and drop the others."""
        with self._lock:
            self._provisional.accept(task_id, stop)

    def run_background_work(self) -> float:
        """End tasks not launched and puts not accepted in time; returns the seconds until the next call."""
        now = self._clock()
        with self._lock:
            while self._matched:
                task_id, since = next(iter(self._matched.items()))
                if since + _LAUNCH_WITHIN_S > now:
                    break
                self._expire(task_id)
            if dropped := self._provisional.expire(now):
                logger.warning("%d saves were dropped: the engine did not accept them in time", dropped)
        return 1.0

    def _expire(self, task_id: int) -> None:
        task = self._tasks[task_id]
        del self._matched[task_id]
        if isinstance(task, KVTask):
            nothing = np.zeros(len(task.blocks), dtype=np.bool_)
            self._settle(task, KVResponseStatus.TIMEOUT, nothing, reasons.not_launched(_LAUNCH_WITHIN_S))
            self._transfer.notify()

    def _on_done(self, task: KVTask, graph: TransferGraph) -> None:
        with self._lock:
            if task.stage is TaskStage.SETTLED:
                return
            status, ok, reason = task.outcome(partial(self._transfer.num_pages, self._dp_client_id))
            tier, slots = task.to_erase(ok)
            if len(slots) == 0:
                if graph.ops[-1].counter and status is not KVResponseStatus.SUCCESS:
                    self._log.layers_lost(task)
                return self._settle(task, status, ok, reason)
        # and look again then: a cancel or a reset may come meanwhile
        erase(self._transfer, task.task_id, tier, slots, partial(self._on_done, task, graph))

    def _settle(self, task: KVTask, status: KVResponseStatus, ok: NDArray[np.bool_], reason: str) -> None:
        """The end of a task. Under the lock. Its result is seen once its blocks are ready, or its slots given back."""
        try:
            if task.is_provisional:
                self._provisional.rest(task, ok, self._clock())
            else:
                task.release(ok)
        except Exception:
            logger.exception("task %d could not give back its blocks", task.task_id)
            status, reason = KVResponseStatus.FAILED, reasons.INTERNAL
            ok = np.zeros(len(task.blocks), dtype=np.bool_)
        if task.loading and status is KVResponseStatus.SUCCESS:
            self._good_loads.add(task.task_id, task.epoch)
        if status is KVResponseStatus.FAILED:
            self._log.failed(task, reason)
        task.stage, task.graph, task.needs = TaskStage.SETTLED, None, ()
        self._tasks[task.task_id] = EndedTask.of(task, status, ok, reason)
        self._unclaimed[task.task_id] = None
        while len(self._unclaimed) > _MAX_UNCLAIMED:
            oldest = next(iter(self._unclaimed))
            del self._unclaimed[oldest], self._tasks[oldest]
        if self._on_news is not None:
            self._on_news(task.task_id)

    # ---- results ----------------------------------------------------------------------------------------------

    def match(self, task_id: int) -> MatchResult | None:
        """Match of a get (NO_MATCH for a put); None if the task is not known."""
        task = self._tasks.get(task_id)
        return task.match if task is not None else None

    def blocks(self, task_id: int) -> NDArray[np.int32]:
        """(m,) int32: positions of the blocks that a task moves, ascending; empty if the task is not known."""
        task = self._tasks.get(task_id)
        if isinstance(task, EndedTask):
            return task.positions()
        return task.blocks if task is not None else np.zeros(0, dtype=np.int32)

    def unsettled(self) -> list[int]:
        """Ids of the tasks that have not settled. Settled puts that wait for acceptance are not among them."""
        with self._lock:
            return [task_id for task_id, task in self._tasks.items() if isinstance(task, KVTask)]

    def wait(self, ids: Sequence[int], timeout: float, settled: Callable[[int], bool] | None = None) -> bool:
        """Wait until ``settled`` (default: ``has_result``) holds for all ids; False after ``timeout`` seconds."""
        done = settled or self.has_result
        return self._transfer.wait(lambda: all(done(task_id) for task_id in ids), timeout)

    def is_settled(self, task_id: int) -> bool:
        """Whether no transfer can access the task's pages and slots any more; True for an unknown task."""
        return not isinstance(self._tasks.get(task_id), KVTask)

    def has_result(self, task_id: int) -> bool:
        """Whether a wait would not change the response: the task has ended, is not known, or was not launched."""
        task = self._tasks.get(task_id)
        return not isinstance(task, KVTask) or task.stage is TaskStage.MATCHED or task.early_result is not None

    def take(self, task_id: int) -> KVResponse:
        """Returns the current response. A settled task is forgotten; its next response is NOTFOUND."""
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None:
                return KVResponse(KVResponseStatus.NOTFOUND, task_id, reason=reasons.NO_TASK)
            if isinstance(task, EndedTask):
                del self._tasks[task_id], self._unclaimed[task_id]
            return task.response()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def num_provisional(self) -> int:
        """Number of provisional puts whose blocks are neither ready nor dropped."""
        return len(self._provisional)
