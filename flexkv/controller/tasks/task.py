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
    """How far a task is."""

    MATCHED = "matched"
    RUNNING = "running"
    SETTLED = "settled"


def direct_moves(plan: GetPlan | PutPlan | None) -> list[Move]:
    """Moves of a plan between lower tiers and DEVICE."""
    if plan is None or not plan.moves:
        return []
    return plan.to(DEVICE) if isinstance(plan, GetPlan) else [move for move in plan.moves if move.target != HOST]


@dataclass(slots=True, eq=False)
class KVTask:
    """A task that has not settled.

    Attributes
    ----------
    task_id : int
    cache : GlobalCacheEngine or None
        The index that the plan is of; None: there is none yet, so the task has no blocks.
    epoch : int
        The epoch of ``cache`` when the plan was made.
    plan : GetPlan or PutPlan or None
        None once it was given back.
    blocks : (m,) int32
        Positions in the sequence of the blocks to move.
    slots : (m,) int32
        Host slot of each; -1: another move of the plan concerns it, or it is not cached and will be reported as failed.
    tokens_per_block : int
    num_tokens : int
        Size of the token mask of the response; 0: no mask.
    tiering : Tiering or None
    needs : tuple of Dependency
        Dependencies of its blocks.
    loading : bool
        A get; else a put.
    is_provisional : bool
        A put whose blocks become ready only when they are accepted.
    match : MatchResult
        Match of a get.
    graph : TransferGraph or None
        While it runs.
    verdict : KVResponseStatus or None
        CANCELLED: it was cancelled before it settled, and nothing of it counts.
    reason : str
        Why it failed, where the graph does not say.
    erased : (m,) bool or None
        Of a put straight to a lower tier: blocks whose slots were erased there, or could not be.
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
        """The index was reset since the plan was made."""
        return self.cache is not None and self.cache.epoch != self.epoch

    @property
    def early_result(self) -> KVResponseStatus | None:
        """The verdict, though blocks may still be under way. The pages of such a get must not be used for anything
        else until the task has settled. None for a put that writes straight to SSD: the store records a block as soon
        as it was read from its page, so the page must not be given away before."""
        return None if not self.loading and direct_moves(self.plan) else self.decided

    @property
    def decided(self) -> KVResponseStatus | None:
        """TIMEOUT, CANCELLED, or FAILED if a rank was lost, once that is decided. No block of such a put becomes
        ready."""
        stopped = self.graph.verdict if self.graph is not None else None
        is_early = stopped in (OpStatus.TIMEOUT, OpStatus.CANCELLED) or (stopped is not None and self._is_lost)
        return STATUS[stopped] if stopped is not None and is_early else self.verdict

    @property
    def _is_lost(self) -> bool:
        """A rank ended, or was disconnected, while it moved blocks of the task."""
        return self.graph is not None and any(op.is_lost for op in self.graph.ops)

    def empty_outcome(self) -> tuple[KVResponseStatus, NDArray[np.bool_], str]:
        """Status, no blocks, and reason, of a task that has nothing to move."""
        none = np.zeros(0, dtype=np.bool_)
        if self.cache is None:
            return KVResponseStatus.UNREADY, none, reasons.NOT_READY
        return KVResponseStatus.SUCCESS, none, ""

    def outcome(self, num_pages: Callable[[], int | None]) -> tuple[KVResponseStatus, NDArray[np.bool_], str]:
        """Status, blocks that were moved ((m,) bool), and reason, of a graph that is quiesced.

        ``num_pages`` returns the pages of the rank that has the fewest; None if that is unknown.

        A graph that was stopped has moved nothing: its caller may have received that result before the last copy, and
        reused the pages. Blocks of a put do not outlive a rank that was lost, nor those of any task a reset.
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
        """A lower tier, and its slots ((k,) int32) that its store may have recorded, or may yet record, of blocks that
        are not ``ok`` ((m,) bool). To be erased before the task settles: they must not be offered after a restart. Each
        is returned once. No slots: there are none left."""
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
        """As it stands now."""
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
        """Give acquired blocks or slots back to the index. Blocks of a put that are ``ok`` ((m,) bool) become ready."""
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
    """The result of a task that has settled, until it is claimed.

    Attributes
    ----------
    first, last : int
        The task's blocks, where they follow one another.
    blocks : (m,) int32 or None
        Else.
    missing : (k,) int32 or None
        Positions of the blocks that were not moved; None: all were.
    cache, epoch
        Of a get: what it loaded is not delivered after a reset.
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
        """The result of a task whose blocks were moved where ``ok`` ((m,) bool)."""
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
        """(m,) int32: the task's blocks."""
        return np.arange(self.first, self.last, dtype=np.int32) if self.blocks is None else self.blocks

    def response(self) -> KVResponse:
        """As it stands now."""
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
