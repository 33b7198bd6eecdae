"""Tasks of ``KVManager``: one get or put each, from match to result."""

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv._core.block_table import pages_from_slot_mapping
from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import NOTHING, GetPlan, MatchResult, PutPlan
from flexkv.errors import SlotMappingError
from flexkv.response import KVResponse, KVResponseStatus
from flexkv.tiering import Tiering, direct_op
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import Dependency, OpKind, OpStatus, TransferGraph, TransferOp

logger = logging.getLogger("flexkv.kvtask")

_STATUS = {
    OpStatus.DONE: KVResponseStatus.SUCCESS,
    OpStatus.FAILED: KVResponseStatus.FAILED,
    OpStatus.CANCELLED: KVResponseStatus.CANCELLED,
    OpStatus.TIMEOUT: KVResponseStatus.TIMEOUT,
}
_MAX_UNCLAIMED = 4096
"""Results that nobody asks for are dropped, oldest first, beyond this many."""


def tokens_and_start(
    token_ids: ArrayLike, token_mask: NDArray[np.bool_] | None, tokens_per_block: int
) -> tuple[NDArray[np.integer], int]:
    """The tokens, and the first block that lies wholly where the mask is True.

    Raises
    ------
    ValueError
        The mask is not one of leading False and then True, one for each token.
    """
    tokens = np.asarray(token_ids)
    if token_mask is None:
        return tokens, 0
    mask = np.asarray(token_mask)
    if mask.dtype != np.bool_ or mask.shape != tokens.shape:
        raise ValueError(f"token_mask is {mask.dtype} {mask.shape}; give bool {tokens.shape}, one for each token")
    first = int(mask.argmax()) if mask.any() else len(mask)
    if not mask[first:].all():
        raise ValueError("token_mask has False after True: only leading tokens can be left out")
    return tokens, -(-first // tokens_per_block)


def part_of_mapping(
    slot_mapping: ArrayLike, mask: NDArray[np.bool_], token_mask: NDArray[np.bool_] | None
) -> NDArray[np.integer]:
    """Of a slot mapping for all tokens, or for those in ``token_mask``, the part for those in ``mask``.

    Raises
    ------
    SlotMappingError
        It is for neither.
    """
    mapping = np.asarray(slot_mapping)
    if mapping.shape == mask.shape:
        return mapping[mask]
    if token_mask is not None and mapping.shape == (int(token_mask.sum()),):
        return mapping[mask[token_mask]]
    raise SlotMappingError(
        f"slot_mapping has shape {mapping.shape}; give a slot for each of the {len(mask)} tokens"
    )


class TaskStage(enum.Enum):
    """MATCHED (holds pins or slots) -> RUNNING -> SETTLED (holds nothing; nothing touches its pages or slots)."""

    MATCHED = "matched"
    RUNNING = "running"
    SETTLED = "settled"


@dataclass(slots=True, eq=False)
class KVTask:
    """State of a task.

    Attributes
    ----------
    num_tokens : int
        Size of the token mask of the response; 0: no mask.
    blocks : (m,) int32
        Positions in the sequence of the blocks to move.
    slots : (m,) int32
        Host slot of each; -1: not there, will be reported as failed.
    ok : (m,) bool
        Moved.
    needs : tuple of Dependency
        What its blocks wait for.
    loading : bool
        A get; else a put.
    match : MatchResult
        What a get found.
    """

    task_id: int
    cache: GlobalCacheEngine | None
    plan: GetPlan | PutPlan | None
    blocks: NDArray[np.int32]
    slots: NDArray[np.int32]
    tokens_per_block: int
    num_tokens: int
    stage: TaskStage = TaskStage.MATCHED
    graph: TransferGraph | None = None
    status: KVResponseStatus | None = None
    ok: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    needs: tuple[Dependency, ...] = ()
    tiering: Tiering | None = None
    loading: bool = True
    match: MatchResult = NOTHING

    def pages(self, slot_mapping: object) -> NDArray[np.int32]:
        """The pages of a mapping that has one slot for each token of the task's blocks; else SlotMappingError."""
        pages = pages_from_slot_mapping(np.asarray(slot_mapping), self.tokens_per_block)
        if len(pages) != len(self.blocks):
            raise SlotMappingError(
                f"task {self.task_id} moves {len(self.blocks)} blocks of {self.tokens_per_block} tokens; "
                f"its slot mapping has {len(pages)}: give one slot for each True of the mask"
            )
        return pages

    def token_mask(self, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """(num_tokens,) bool: tokens of the task's blocks, or of the ``chosen`` ones ((m,) bool)."""
        blocks = np.zeros(self.num_tokens // self.tokens_per_block, dtype=np.bool_)
        blocks[self.blocks if chosen is None else self.blocks[chosen]] = True
        mask = np.zeros(self.num_tokens, dtype=np.bool_)
        mask[: len(blocks) * self.tokens_per_block] = np.repeat(blocks, self.tokens_per_block)
        return mask

    @property
    def result(self) -> KVResponseStatus | None:
        """How it ended; None while it has not. Told before it is settled only of one that is late or was cancelled."""
        status = self.graph.status if self.graph is not None else OpStatus.PENDING
        early = _STATUS[status] if status in (OpStatus.TIMEOUT, OpStatus.CANCELLED) else None
        return self.status or early

    def release(self) -> None:
        """Give pins or slots back to the index, by what was moved."""
        if isinstance(self.plan, GetPlan) and self.cache is not None:
            if self.plan.direct is not None and self.tiering is not None:
                ok = self.graph.ops[0].ok if self.graph is not None else None
                self.tiering.end_direct_get(self.cache, self.plan.direct, ok)
            self.cache.end_get(self.plan)
        elif isinstance(self.plan, PutPlan) and self.cache is not None:
            self.cache.end_put(self.plan, self.ok)
            if self.tiering is not None:
                self.tiering.put_ended(self.plan)
            self.cache.evict_ahead()
        self.plan = None


class TaskTable:
    """The tasks that are known, and their way through the data plane.

    Thread safe. Its lock is taken before the index's and the data plane's, never after.

    Parameters
    ----------
    transfer : TransferEngine
    dp_client_id : int
        Whose ranks move the blocks.
    tokens_per_block : int
    tiering : Tiering or None
        The tiers below host memory.
    """

    def __init__(
        self, transfer: TransferEngine, dp_client_id: int, tokens_per_block: int, tiering: Tiering | None = None
    ) -> None:
        self._transfer = transfer
        self._tiering = tiering
        self._dp_client_id = dp_client_id
        self._tokens_per_block = tokens_per_block
        self._lock = threading.RLock()
        self._tasks: dict[int, KVTask] = {}
        self._unclaimed: dict[int, None] = {}            # settled, in that order

    def new_get(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], start: int, stop: int | None, num_tokens: int,
        choose: bool = True, host_only: bool = False, group: int = 0,
    ) -> KVTask:
        """Match blocks ``[start, stop)``; with ``stop`` None as far as they are there, else all of them, -1 if not.

        ``choose``: with ``stop`` None, leave out what is sooner computed than loaded. ``host_only``: only what is in
        host memory now. ``group``: of the namespace that the sequence belongs to.
        """
        end, choose = len(keys) if stop is None else stop, choose and stop is None
        plan, needs = self._begin_get(cache, keys, start, end, choose, host_only, group)
        found = plan.slots if plan is not None else np.zeros(0, dtype=np.int32)
        count = len(found) if stop is None else stop - start
        slots = np.full(count, -1, dtype=np.int32)
        slots[: len(found)] = found
        first = start if stop is not None or plan is None else plan.start
        return self._add(cache, plan, np.arange(first, first + count, dtype=np.int32), slots, num_tokens, needs)

    def _begin_get(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], start: int, stop: int, choose: bool,
        host_only: bool, group: int,
    ) -> tuple[GetPlan | None, tuple[Dependency, ...]]:
        if cache is None:
            return None, ()
        if self._tiering is None:
            return cache.begin_get(keys, start, stop, choose, group=group), ()
        return self._tiering.begin_get(cache, keys, start, stop, choose, host_only, group)

    def new_put(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], start: int, stop: int, num_tokens: int,
        group: int = 0,
    ) -> KVTask:
        """Reserve slots for the absent blocks of ``[start, stop)``."""
        if cache is None:
            nothing = np.zeros(0, dtype=np.int32)
            return self._add(None, None, nothing, nothing, num_tokens)
        direct = self._tiering is not None and self._tiering.saves_directly
        plan = cache.begin_put(keys, start, stop, group, direct)
        return self._add(cache, plan, plan.all_blocks, plan.all_slots, num_tokens)

    def _add(
        self,
        cache: GlobalCacheEngine | None,
        plan: GetPlan | PutPlan | None,
        blocks: NDArray[np.int32],
        slots: NDArray[np.int32],
        num_tokens: int,
        needs: tuple[Dependency, ...] = (),
    ) -> KVTask:
        with self._lock:
            task = KVTask(
                next(self._transfer.task_ids), cache, plan, blocks, slots, self._tokens_per_block, num_tokens,
                needs=needs, tiering=self._tiering, loading=not isinstance(plan, PutPlan),
                match=plan.match if isinstance(plan, GetPlan) else NOTHING,
            )
            self._tasks[task.task_id] = task
            return task

    def matched(self, task_id: int) -> KVTask:
        """The task, if it waits for its launch.

        Raises
        ------
        KeyError
            It is not known, or was launched already.
        """
        with self._lock:
            task = self._tasks.get(task_id)
        if task is None or task.stage is not TaskStage.MATCHED:
            raise KeyError(f"task {task_id} is {'not known' if task is None else 'launched already'}")
        return task

    def match(self, task_id: int) -> MatchResult | None:
        """What a get found; None if it is not known."""
        with self._lock:
            task = self._tasks.get(task_id)
            return task.match if task is not None else None

    def blocks(self, task_id: int) -> NDArray[np.int32]:
        """(m,) int32: positions of the blocks that a task moves; empty if it is not known."""
        with self._lock:
            task = self._tasks.get(task_id)
            return task.blocks if task is not None else np.zeros(0, dtype=np.int32)

    def run(
        self, task: KVTask, pages: NDArray[np.int32], fence: int, layerwise: bool = False, counter: int = 0
    ) -> None:
        """Move the task's blocks between their slots and ``pages`` ((m,) int32)."""
        with self._lock:
            if self._tasks.get(task.task_id) is not task:
                # cancelled since it was matched, as by a reset: its slots may be another's by now, so all blocks fail
                self._tasks[task.task_id] = task
                task.slots, task.needs = np.full_like(task.slots, -1), ()
            task.stage = TaskStage.RUNNING
            if len(task.blocks) == 0:
                self._settle(task, KVResponseStatus.SUCCESS)
                return
            loading, needs, ops = task.loading, task.needs, []
            if task.plan is not None and task.plan.direct is not None:
                where = np.searchsorted(task.blocks, task.plan.direct.blocks)
                ops.append(direct_op(task.plan, pages[where], fence))
                needs = (*needs, Dependency(ops[0], where, np.arange(len(where))))
                if loading and task.cache is not None:
                    task.cache.begin_direct_get()
            ops.append(TransferOp(
                OpKind.H2D if loading else OpKind.D2H,
                src=task.slots if loading else pages,
                dst=pages if loading else task.slots,
                dp_client_id=self._dp_client_id,
                fence=fence,
                layerwise=layerwise and loading,
                counter=counter if loading else 0,
                depends_on=needs,
            ))
            task.graph = TransferGraph(task.task_id, ops)
        self._transfer.submit(task.graph, self._on_done)

    def prefetch(
        self, cache: GlobalCacheEngine | None, keys: NDArray[np.uint64], num_tokens: int, start: int = 0,
        group: int = 0, host_only: bool = False,
    ) -> int:
        """A task that ends when all blocks that can be had are in host memory, however long that takes to load;
        ``host_only``: those that are there now."""
        host_only = host_only or (self._tiering is not None and self._tiering.loads_directly)   # need not come there
        task = self.new_get(cache, keys, start, None, num_tokens, choose=False, host_only=host_only, group=group)
        self._await_arrival(task)
        return task.task_id

    def _await_arrival(self, task: KVTask) -> None:
        with self._lock:
            if self._tasks.get(task.task_id) is not task:      # cancelled since it was matched
                return
            task.stage = TaskStage.RUNNING
            if not task.needs:
                task.ok = np.ones(len(task.blocks), dtype=np.bool_)
                self._settle(task, KVResponseStatus.SUCCESS)
                return
            op = TransferOp(OpKind.ARRIVAL, task.slots, task.slots, depends_on=task.needs)
            task.graph = TransferGraph(task.task_id, [op])
        self._transfer.submit(task.graph, self._on_done)

    def cancel(self, task_id: int) -> None:
        """Stop a task. One that was not launched is gone; one that runs will settle, and has a result."""
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None or task.stage is TaskStage.SETTLED:
                return
            if task.stage is TaskStage.MATCHED:
                task.ok = np.zeros(len(task.blocks), dtype=np.bool_)
                task.release()
                del self._tasks[task_id]
                return
        self._transfer.cancel(task_id)

    def _on_done(self, graph: TransferGraph) -> None:
        with self._lock:
            task = self._tasks[graph.task_id]
            task.ok = graph.ops[-1].ok
            if graph.status is OpStatus.CANCELLED and isinstance(task.plan, PutPlan):
                task.ok = np.zeros_like(task.ok)       # its pages may have been given away before the last copies
            if graph.ops[-1].counter and graph.status is not OpStatus.DONE:
                logger.critical(
                    "task %d failed, and the engine can only be told of layers that are there: it waits for the others "
                    "until its watchdog ends it", task.task_id,
                )
            self._settle(task, _STATUS[graph.status])

    def _settle(self, task: KVTask, status: KVResponseStatus) -> None:
        task.release()
        task.status = status
        task.stage = TaskStage.SETTLED
        self._unclaimed[task.task_id] = None
        while len(self._unclaimed) > _MAX_UNCLAIMED:
            oldest = next(iter(self._unclaimed))
            del self._unclaimed[oldest], self._tasks[oldest]

    def unsettled(self) -> list[int]:
        """Ids of the tasks that hold pins or slots."""
        with self._lock:
            return [task.task_id for task in self._tasks.values() if task.stage is not TaskStage.SETTLED]

    def wait(self, ids: list[int], timeout: float, settled: Callable[[int], bool] | None = None) -> bool:
        """Wait until ``settled`` (default: has a result) holds for all ids, at most ``timeout`` seconds."""
        done = settled or self.has_result
        return self._transfer.wait(lambda: all(done(task_id) for task_id in ids), timeout)

    def is_settled(self, task_id: int) -> bool:
        """Whether nothing can touch the task's pages and slots any more; an unknown task is settled."""
        task = self._tasks.get(task_id)
        return task is None or task.stage is TaskStage.SETTLED

    def has_result(self, task_id: int) -> bool:
        """Whether waiting longer makes no difference: it ended, is not known, or was never launched."""
        task = self._tasks.get(task_id)
        return task is None or task.stage is TaskStage.MATCHED or task.result is not None

    def take(self, task_id: int) -> KVResponse:
        """The result as it stands; one that is settled is forgotten."""
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None:
                return KVResponse(KVResponseStatus.NOTFOUND, task_id)
            if task.stage is TaskStage.MATCHED:
                return KVResponse(KVResponseStatus.UNREADY, task_id)
            if task.stage is TaskStage.SETTLED:
                del self._tasks[task_id]
                del self._unclaimed[task_id]
            mask = task.token_mask(task.ok) if task.num_tokens and len(task.ok) == len(task.blocks) else None
            return KVResponse(task.result or KVResponseStatus.TIMEOUT, task_id, mask)

    def __len__(self) -> int:
        return len(self._tasks)
