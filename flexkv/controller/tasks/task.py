"""The states of a task, and the blocks and slots that it holds in each.

1. MATCHED: it holds acquired blocks or reserved slots.
2. RUNNING: the data plane has its graph.
3. SETTLED: nothing touches its pages or slots, and it holds nothing.

``TaskTable`` makes the transitions, under its lock.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.engine import GlobalCacheEngine
from flexkv.cache.plan import DEVICE, NO_MATCH, NO_SLOTS, GetPlan, MatchResult, Move, PutPlan
from flexkv.cache.tier import HOST
from flexkv.controller.response import KVResponse, KVResponseStatus, mask_of_blocks
from flexkv.controller.tasks import reasons
from flexkv.controller.tiering import Tiering
from flexkv.errors import InvariantError
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import Dependency, OpStatus, TransferGraph, TransferOp

STATUS = {
    OpStatus.DONE: KVResponseStatus.SUCCESS,
    OpStatus.FAILED: KVResponseStatus.FAILED,
    OpStatus.CANCELLED: KVResponseStatus.CANCELLED,
    OpStatus.TIMEOUT: KVResponseStatus.TIMEOUT,
}


class TaskStage(enum.Enum):
    """Stage of a task; the module describes the stages."""

    MATCHED = "matched"
    RUNNING = "running"
    SETTLED = "settled"


def direct_moves(plan: GetPlan | PutPlan | None) -> list[Move]:
    """Moves of a plan between lower tiers and DEVICE, in the order of the plan; empty for None."""
    if plan is None or not plan.moves:
        return []
    return plan.to(DEVICE) if isinstance(plan, GetPlan) else [move for move in plan.moves if move.target != HOST]


@dataclass(slots=True, eq=False)
class KVTask:
    """A task that has not settled. Methods must be called under the lock of the ``TaskTable``.

    Attributes
    ----------
    task_id : int
    cache : GlobalCacheEngine or None
        Index from which the plan was made; None: there was no index yet, so the task has no blocks.
    epoch : int
        The epoch of ``cache`` when the plan was made.
    plan : GetPlan or PutPlan or None
        None after ``release``.
    blocks : (m,) int32
        Positions in the sequence of the blocks to move.
    slots : (m,) int32
        Host slot of each block; -1: a direct move of the plan moves it, or it is unavailable and will fail.
    tokens_per_block : int
    num_tokens : int
        Size of the token mask of the response; 0: no mask.
    tiering : Tiering or None
    needs : tuple of Dependency
        Dependencies of its blocks on moves from lower tiers to the host.
    loading : bool
        True: a get; False: a put.
    is_provisional : bool
        A put whose blocks become ready only when they are accepted.
    match : MatchResult
        Match of a get; NO_MATCH for a put.
    stage : TaskStage
    graph : TransferGraph or None
        Not None while the task runs.
    verdict : KVResponseStatus or None
        CANCELLED: it was cancelled before it settled; no block counts as moved.
    reason : str
        Reason for a user; empty: derived from the graph.
    erased : (m,) bool or None
        For a put with a direct move: blocks whose slots on the lower tier were returned by ``to_erase`` already.
    """

    task_id: int
    cache: GlobalCacheEngine | None
    epoch: int
    plan: GetPlan | PutPlan | None
    blocks: NDArray[np.int32]
    slots: NDArray[np.int32]
    tokens_per_block: int
    num_tokens: int
    tiering: Tiering | None = None
    needs: tuple[Dependency, ...] = ()
    loading: bool = True
    is_provisional: bool = False
    match: MatchResult = NO_MATCH
    stage: TaskStage = TaskStage.MATCHED
    graph: TransferGraph | None = None
    verdict: KVResponseStatus | None = None
    reason: str = ""
    erased: NDArray[np.bool_] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether the index was reset after the plan was made."""
        return self.cache is not None and self.cache.epoch != self.epoch

    @property
    def early_result(self) -> KVResponseStatus | None:
        """Result that is final before the task has settled, that is, while copies may still be in progress; None: there
        is none. The pages of such a get must not be used otherwise until the task has settled. Always None for a put
        with a direct move: the store records a block as soon as it was read from its page, so the caller must not
        reuse the page before."""
        return None if not self.loading and direct_moves(self.plan) else self.decided

    @property
    def decided(self) -> KVResponseStatus | None:
        """Final status of a task that was stopped: TIMEOUT, CANCELLED, or FAILED if a rank was lost; None: it was not
        stopped. No block of a stopped put becomes ready."""
        stopped = self.graph.verdict if self.graph is not None else None
        is_early = stopped in (OpStatus.TIMEOUT, OpStatus.CANCELLED) or (stopped is not None and self._is_lost)
        return STATUS[stopped] if stopped is not None and is_early else self.verdict

    @property
    def _is_lost(self) -> bool:
        """A rank ended, or was disconnected, while it moved blocks of the task."""
        return self.graph is not None and any(op.is_lost for op in self.graph.ops)

    def empty_outcome(self) -> tuple[KVResponseStatus, NDArray[np.bool_], str]:
        """Outcome of a task without blocks: status, empty (0,) bool mask, reason. UNREADY if there was no index."""
        none = np.zeros(0, dtype=np.bool_)
        if self.cache is None:
            return KVResponseStatus.UNREADY, none, reasons.NOT_READY
        return KVResponseStatus.SUCCESS, none, ""

    def outcome(self, num_pages: Callable[[], int | None]) -> tuple[KVResponseStatus, NDArray[np.bool_], str]:
        """Outcome of a task whose graph is quiesced.

        No block counts as moved if the graph was stopped, because the caller may have received that result before the
        last copy, and reused the pages. The same holds for a put during which a rank was lost, and for any task after
        a reset.

        Parameters
        ----------
        num_pages : callable
            ``num_pages()``: number of pages of the rank with the fewest pages; None: unknown.

        Returns
        -------
        status : KVResponseStatus
        ok : (m,) bool
            Blocks that were moved.
        reason : str
            Empty on success.
        """
        graph = self.graph
        assert graph is not None  # narrowing: it ran
        ok, reason = graph.ops[-1].ok.copy(), self.reason
        is_lost = self._is_lost
        stopped = self.decided or (KVResponseStatus.CANCELLED if self.is_stale and not reason else None)
        if stopped or graph.verdict is not None or self.is_stale or (is_lost and not self.loading):
            ok[:] = False
        if stopped is KVResponseStatus.TIMEOUT:
            return stopped, ok, graph.reason or reasons.LATE
        if stopped is not None:
            lost = reasons.RANK_LOST if stopped is KVResponseStatus.FAILED else reasons.CANCELLED
            return stopped, ok, reason or (reasons.WAS_RESET if self.is_stale else lost)
        if graph.status is OpStatus.DONE:
            return KVResponseStatus.SUCCESS, ok, ""
        if not reason:
            refused = any(op.is_refused for op in graph.ops)
            reason = reasons.LOAD_FAILED if refused else reasons.RANK_LOST if is_lost else (
                self._why_not_moved(graph.ops[-1], num_pages())
            )
        return KVResponseStatus.FAILED, ok, f"{int((~ok).sum())} of {len(ok)} blocks were not moved: {reason}"

    def to_erase(self, ok: NDArray[np.bool_]) -> tuple[int, NDArray[np.int32]]:
        """Next slots to erase on a lower tier before the task settles: those of blocks that are not ``ok`` ((m,) bool)
        and that the tier's store has recorded or may yet record. A restart would offer these blocks.

        Returns
        -------
        tier : int
        slots : (k,) int32
            Each slot is returned by one call only. Empty: no slots are left.
        """
        if not self.loading and self.graph is not None and isinstance(self.plan, PutPlan):
            for op, move in zip(self.graph.ops, direct_moves(self.plan), strict=False):
                if self.erased is None:
                    self.erased = np.zeros(len(self.plan), dtype=np.bool_)
                where = self.plan.where(move)
                left = op.started & ~ok[where] & ~self.erased[where]
                self.erased[where] |= left
                if left.any():
                    return move.target, move.dst[left]
        return HOST, NO_SLOTS

    def _why_not_moved(self, op: TransferOp, num_pages: int | None) -> str:
        page = -1 if op.kind is OpKind.ARRIVAL else int((op.dst if self.loading else op.src).max())
        return reasons.NOT_MOVED if num_pages is None or page < num_pages else reasons.no_such_page(page, num_pages)

    def response(self) -> KVResponse:
        """Current response. TIMEOUT if the task still runs; UNREADY if it was not launched."""
        if self.stage is TaskStage.MATCHED:
            return KVResponse(KVResponseStatus.UNREADY, self.task_id)
        early = self.early_result
        if early is None:
            return KVResponse(KVResponseStatus.TIMEOUT, self.task_id, reason=reasons.STILL_RUNS)
        lost = reasons.RANK_LOST if early is KVResponseStatus.FAILED else ""
        late = (self.graph.reason if self.graph is not None else "") or reasons.LATE
        reason = late if early is KVResponseStatus.TIMEOUT else self.reason or lost
        return KVResponse(early, self.task_id, reason=reason)

    def release(self, ok: NDArray[np.bool_]) -> None:
        """Release the plan's blocks and slots to the index. Blocks of a put that are ``ok`` ((m,) bool) become ready,
        the others absent. Later calls have no effect.

        Raises
        ------
        InvariantError
            A block that was loaded had its slot freed during the load.
        """
        plan, self.plan = self.plan, None
        if isinstance(plan, GetPlan) and self.cache is not None:
            if plan.moves and self.tiering is not None:
                self.tiering.end_get(self.cache, plan, self.graph.ops if self.graph is not None else ())
            loaded = ok[: len(plan)] if len(ok) >= len(plan) else None
            if self.cache.end_get(plan, loaded) is not None:
                raise InvariantError(f"task {self.task_id} read slots that were freed meanwhile")
        elif isinstance(plan, PutPlan) and self.cache is not None:
            self.cache.end_put(plan, ok)
            if self.tiering is not None:
                self.tiering.put_ended(plan)
            self.cache.evict_ahead()


@dataclass(slots=True, eq=False)
class EndedTask:
    """Result of a task that has settled, until it is claimed.

    Attributes
    ----------
    first, last : int
        The task's blocks are ``[first, last)`` if they are consecutive (``blocks`` is None).
    blocks : (m,) int32 or None
        Positions of the task's blocks if they are not consecutive.
    missing : (k,) int32 or None
        Positions of the blocks that were not moved; None: all were moved.
    cache, epoch
        Index and epoch of a get, which is reported as cancelled after a reset; ``cache`` is None for a put.
    """

    task_id: int
    status: KVResponseStatus
    reason: str
    first: int
    last: int
    blocks: NDArray[np.int32] | None
    missing: NDArray[np.int32] | None
    tokens_per_block: int
    num_tokens: int
    match: MatchResult
    cache: GlobalCacheEngine | None
    epoch: int

    stage = TaskStage.SETTLED

    @classmethod
    def of(cls, task: KVTask, status: KVResponseStatus, ok: NDArray[np.bool_], reason: str) -> "EndedTask":
        """Make the result of a task, of which the blocks that are ``ok`` ((m,) bool) were moved."""
        count = len(task.blocks)
        first = int(task.blocks[0]) if count else 0
        dense = count == 0 or int(task.blocks[-1]) - first == count - 1
        missing = None if np.count_nonzero(ok) == count else task.blocks[~ok]
        return cls(
            task.task_id, status, reason, first, first + count, None if dense else task.blocks, missing,
            task.tokens_per_block, task.num_tokens, task.match,
            task.cache if task.loading else None, task.epoch,
        )

    def positions(self) -> NDArray[np.int32]:
        """(m,) int32: positions of the task's blocks in its sequence, ascending."""
        return np.arange(self.first, self.last, dtype=np.int32) if self.blocks is None else self.blocks

    def response(self) -> KVResponse:
        """Response of the task. A get is CANCELLED if the index was reset after its plan was made."""
        status, reason = self.status, self.reason
        blocks = range(self.first, self.last) if self.blocks is None else self.blocks
        num_moved = len(blocks) - (len(self.missing) if self.missing is not None else 0)
        delivers = status is KVResponseStatus.SUCCESS or num_moved > 0
        if self.cache is not None and self.cache.epoch != self.epoch and delivers:
            status, reason, blocks = KVResponseStatus.CANCELLED, reasons.WAS_RESET, blocks[:0]
        elif self.missing is not None:
            blocks = np.setdiff1d(blocks, self.missing, assume_unique=True)
        mask = mask_of_blocks(blocks, self.tokens_per_block, self.num_tokens) if self.num_tokens else None
        return KVResponse(status, self.task_id, mask, reason)
