"""The states of a task as plainly as they can be said: how it ends and why, which blocks it saves, its answers."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import PutPlan
from flexkv.cache.tier import HOST
from flexkv.controller.response import KVResponse
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.controller.tasks import reasons
from flexkv.controller.tasks.task import KVTask

from .model_tree import Prefix

TOKENS_PER_BLOCK = 4
LAUNCH_WITHIN_S, ACCEPT_WITHIN_S = 60.0, 50.0

Uses = tuple[Any, NDArray[np.int32], NDArray[np.int32], NDArray[np.uint32]]
"""Allocator, blocks of a put, their slots, and the generation of each slot when it was given to the put."""


@dataclass(eq=False)
class ModelTask:
    """A task in the model.

    Attributes
    ----------
    task : KVTask
        Only its id, its blocks and its plan are looked at, as they were when it was made.
    pages : (m,) int32
    epoch : int
        The index's, before the task was planned.
    uses : list of Uses
        Slots of a put.
    stage : str
        planned, matched, running, settled; gone: cancelled before it was launched, or discarded.
    after : list of ModelTask
    refused : str
        Why the data plane must not move anything of it, decided at its launch.
    cancelled : bool
        While it ran.
    verdict : Status or None
        TIMEOUT: its deadline passed while it ran; FAILED: its rank was lost.
    given_up : bool
        The data plane went out of service while it ran.
    reason : str
        First reason for it not to succeed.
    since : float
        When it was held, or came to rest.
    stop : float or None
        Of a provisional put: blocks from this position on are dropped; None: not decided.
    status : Status
        Once it has settled.
    moved : set of int
        Blocks that its result names.
    kept : set of int or None
        Blocks that a put has made ready; None: not decided.
    """

    task: KVTask
    sequence: Prefix
    pages: NDArray[np.int32]
    epoch: int
    provisional: bool = False
    uses: list[Uses] = field(default_factory=list)
    stage: str = "planned"
    after: list["ModelTask"] = field(default_factory=list)
    refused: str = ""
    cancelled: bool = False
    verdict: Status | None = None
    given_up: bool = False
    reason: str = ""
    since: float = math.nan
    stop: float | None = None
    status: Status = Status.UNREADY
    moved: set[int] = field(default_factory=set)
    kept: set[int] | None = None
    is_taken: bool = False
    is_compared: bool = False

    def __post_init__(self) -> None:
        self.id = self.task.task_id
        self.loading = self.task.loading
        self.plan = self.task.plan
        self.blocks: list[int] = self.task.blocks.tolist()
        self.is_direct = isinstance(self.plan, PutPlan) and any(move.target != HOST for move in self.plan.moves)

    def content(self, block: int) -> tuple[int, Prefix]:
        """The KV of a block."""
        return self.epoch, self.sequence[: block + 1]

    @property
    def is_resting(self) -> bool:
        """A provisional put that is launched, and neither accepted nor dropped."""
        return self.provisional and self.stage in ("running", "settled") and self.kept is None

    def freed(self) -> list[NDArray[np.bool_]]:
        """For each part of ``uses`` ((m,) bool): slots that were freed since."""
        none = [np.zeros(len(blocks), dtype=np.bool_) for _, blocks, _, _ in self.uses]
        changed = [slots.changed(numbers, generations) for slots, _, numbers, generations in self.uses]
        return [some if some is not None else no for some, no in zip(changed, none, strict=True)]

    # ---- transitions ------------------------------------------------------------------------------------------

    def launch(self, epoch: int, after: list["ModelTask"]) -> None:
        """Nothing of a put moves unless each task before it is a load of its epoch that runs or has succeeded; and
        nothing of a task of an older epoch moves at all."""
        self.stage, self.after = "running", after
        if epoch != self.epoch:
            self.refused = reasons.WAS_RESET
        elif not all(load.may_be_followed(self.epoch) for load in after):
            self.refused = reasons.LOAD_FAILED
        self.reason = self.refused

    def may_be_followed(self, epoch: int) -> bool:
        """A put may be launched after it."""
        is_good = self.stage == "running" or (self.stage == "settled" and self.status is Status.SUCCESS)
        return is_good and self.loading and self.epoch == epoch

    def end_before_launch(self) -> None:
        """It was cancelled or discarded."""
        self.stage, self.kept = "gone", set()

    def cancel(self, epoch: int, reason: str = reasons.CANCELLED) -> None:
        """Before its launch nothing is left of it; from then on no block of it becomes ready. A result stays."""
        self.decide(0, epoch)
        if self.stage == "matched":
            self.end_before_launch()
        elif self.stage == "running" and self.verdict is None and not self.cancelled:
            self.cancelled, self.reason = True, self.reason or reason

    def decide(self, stop: float, epoch: int) -> None:
        """A provisional put is accepted or dropped: the first call decides."""
        if self.is_resting and self.stop is None:
            self.stop = stop
            if self.stage == "settled":
                self._keep(epoch)

    def expire(self, now: float, epoch: int) -> None:
        """Time has passed."""
        if self.stage == "matched" and self.since + LAUNCH_WITHIN_S <= now:
            self.stage, self.status, self.kept = "settled", Status.TIMEOUT, set()
            self.reason = reasons.not_launched(LAUNCH_WITHIN_S)
        elif self.stage == "settled" and self.is_resting and self.since + ACCEPT_WITHIN_S <= now:
            self.decide(0, epoch)

    def settle(self, now: float, epoch: int, arrived: set[int], taken: bool, excused: bool) -> None:
        """Nothing touches its pages and slots any more.

        Parameters
        ----------
        arrived : set of int
            Blocks that were copied.
        taken : bool
            The data plane has taken its graph.
        excused : bool
            A block of it may have failed, though it was not stopped.
        """
        self.stage, self.since, is_stale = "settled", now, epoch != self.epoch
        if self.blocks and not taken:
            self.status, self.reason = Status.FAILED, reasons.INTERNAL
        elif self.verdict is Status.TIMEOUT:
            self.status, self.reason = Status.TIMEOUT, reasons.LATE
        elif self.verdict is not None:
            self.status = self.verdict
            self.reason = self.reason or (reasons.WAS_RESET if is_stale else reasons.RANK_LOST)
        elif self.cancelled:
            self.status = Status.CANCELLED
        elif self.blocks and self.refused:
            self.status = Status.FAILED
        elif is_stale and self.blocks:                     # a task without blocks has nothing that could be stale
            self.status, self.reason = Status.CANCELLED, reasons.WAS_RESET
        elif self.given_up:
            self.status = Status.FAILED
        else:
            assert excused or len(arrived) == len(self.blocks)
            self.status = Status.SUCCESS if len(arrived) == len(self.blocks) else Status.FAILED
            self.reason, self.moved = "", arrived
        if self.stop is not None or not self.provisional or not self.moved:
            self._keep(epoch)

    def _keep(self, epoch: int) -> None:
        stop = math.inf if self.stop is None else self.stop
        self.kept = {block for block in self.moved if block < stop and epoch == self.epoch}

    # ---- what it answers --------------------------------------------------------------------------------------

    @property
    def early(self) -> Status | None:
        """Its result, while it still runs."""
        early = self.verdict or (Status.CANCELLED if self.cancelled else None)
        return early if self.stage == "running" and not self.is_direct else None

    def check_response(self, response: KVResponse, epoch: int) -> None:
        """Check a result as it stands."""
        status, reason, moved = self.status, self.reason, self.moved
        if self.stage == "matched":
            status, reason = Status.UNREADY, ""
        elif self.stage == "gone" or self.is_taken:
            status, reason = Status.NOTFOUND, "no such task, or its result was taken"
        elif self.stage == "running":
            status = self.early or Status.TIMEOUT
            reason = reasons.LATE if self.verdict is Status.TIMEOUT else self.reason or reasons.RANK_LOST
            reason = reason if self.early else reasons.STILL_RUNS
        elif self.loading and epoch != self.epoch and (status is Status.SUCCESS or moved):
            status, reason, moved = Status.CANCELLED, reasons.WAS_RESET, set()
        assert response.status is status
        assert reason in response.reason
        assert bool(response.reason) == (status not in (Status.SUCCESS, Status.UNREADY))
        if self.stage == "settled" and not self.is_taken:
            tokens = np.zeros((len(self.sequence), TOKENS_PER_BLOCK), dtype=np.bool_)
            tokens[sorted(moved)] = True
            assert response.return_mask is not None
            assert response.return_mask.tolist() == tokens.ravel().tolist()
