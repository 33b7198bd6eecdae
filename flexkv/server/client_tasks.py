"""The tasks of an engine that the daemon carries out, as the engine knows them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import NO_MATCH, MatchResult
from flexkv.controller.response import KVResponse, KVResponseStatus, mask_of_blocks
from flexkv.controller.tasks import reasons
from flexkv.controller.tasks.arguments import check_pages_of_task
from flexkv.errors import RegistrationError, TaskError
from flexkv.protocol.requests import Pin
from flexkv.protocol.session import unpack_result

_MAX_UNCLAIMED = 4096
"""Results that were not taken. Beyond this number the oldest are forgotten."""

_MAX_MATCHED = 4096
"""Tasks that may wait for their launch. Beyond this number the oldest are forgotten; the daemon ends them in time."""

_STATUSES = tuple(KVResponseStatus)
NO_BLOCKS = np.zeros(0, dtype=np.int32)


@dataclass(slots=True)
class ClientTask:
    """A task of this engine.

    Attributes
    ----------
    num_tokens : int
        Size of the mask of the response; 0: no mask.
    is_launched : bool
    blocks : (m,) int32
        Positions of the blocks that it moves.
    match : MatchResult
    response : KVResponse or None
        Its result, also an early one.
    is_settled : bool
        Whether nothing accesses its pages any more.
    """

    num_tokens: int = 0
    is_launched: bool = True
    blocks: NDArray[np.int32] = field(default_factory=lambda: NO_BLOCKS)
    match: MatchResult = NO_MATCH
    response: KVResponse | None = None
    is_settled: bool = False

    def no_mask(self) -> NDArray[np.bool_] | None:
        """The mask of a response that delivers nothing."""
        return np.zeros(self.num_tokens, dtype=np.bool_) if self.num_tokens else None


class ClientTasks:
    """Tasks by id, from the request that makes them until their result is taken. The caller locks.

    Parameters
    ----------
    tokens_per_block : int
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        self._tasks: dict[int, ClientTask] = {}
        self._matched: dict[int, None] = {}          # in the order of their matches
        self._unclaimed: dict[int, None] = {}        # settled, in that order

    def get(self, task_id: int) -> ClientTask | None:
        """A task; None: it is not known."""
        return self._tasks.get(task_id)

    def add(self, task_id: int, task: ClientTask) -> ClientTask:
        """Add a task."""
        self._tasks[task_id] = task
        if not task.is_launched:
            self._matched[task_id] = None
            while len(self._matched) > _MAX_MATCHED:
                self.forget(next(iter(self._matched)))
        return task

    def forget(self, task_id: int) -> None:
        """Forget a task."""
        self._tasks.pop(task_id, None)
        self._matched.pop(task_id, None)
        self._unclaimed.pop(task_id, None)

    def forget_matched(self, task_ids: Iterable[int] | None = None) -> None:
        """Forget those of these tasks (None: all) that were not launched."""
        for task_id in list(self._matched if task_ids is None else task_ids):
            if task_id in self._matched:
                self.forget(task_id)

    def launch(self, task_ids: Sequence[int], pages: Sequence[NDArray[np.int32]]) -> None:
        """Record that tasks are launched, each with its pages ((m,) int32).

        Raises
        ------
        TaskError, SlotMappingError
            As ``Blocks.launch``; nothing has changed.
        """
        for task_id, part in zip(task_ids, pages, strict=True):
            task = self._tasks.get(task_id)
            if task is None or task.is_launched or task_ids.count(task_id) > 1:
                state = reasons.NOT_MATCHED if task is None else (
                    "launched already" if task.is_launched else "given twice"
                )
                raise TaskError(f"task {task_id} is {state}")
            check_pages_of_task(task_id, len(task.blocks), len(part), self._tokens_per_block)
        for task_id in task_ids:
            self._tasks[task_id].is_launched = True
            del self._matched[task_id]

    # ---- results ----------------------------------------------------------------------------------------------

    def result(self, content: bytes) -> None:
        """Take a RESULT; RegistrationError if it is none. A result of an unknown task is ignored."""
        task_id, status, is_settled, blocks, reason = unpack_result(content)
        if status >= len(_STATUSES):
            raise RegistrationError(f"a result has the status {status}")
        task = self._tasks.get(task_id)
        if task is None or task.is_settled:
            return
        mask = task.no_mask()
        if mask is not None and len(blocks):
            size = self._tokens_per_block
            mask = mask_of_blocks(np.flatnonzero(blocks[: len(mask) // size]), size, len(mask))
        task.response = KVResponse(_STATUSES[status], task_id, mask if is_settled else None, reason)
        if is_settled:
            self._settle(task_id, task)

    def fail(self, task_ids: Iterable[int] | None, reason: str) -> None:
        """End tasks (None: all) that have not settled."""
        for task_id in list(self._tasks if task_ids is None else task_ids):
            task = self._tasks.get(task_id)
            if task is not None and not task.is_settled:
                status = KVResponseStatus.FAILED if len(task.blocks) else KVResponseStatus.UNREADY
                task.response = KVResponse(status, task_id, task.no_mask(), reason)
                self._settle(task_id, task)

    def _settle(self, task_id: int, task: ClientTask) -> None:
        task.is_settled = task.is_launched = True
        self._matched.pop(task_id, None)
        self._unclaimed[task_id] = None
        while len(self._unclaimed) > _MAX_UNCLAIMED:
            self.forget(next(iter(self._unclaimed)))

    def is_settled(self, task_id: int) -> bool:
        """Whether nothing accesses the task's pages any more; an unknown task is settled."""
        task = self._tasks.get(task_id)
        return task is None or task.is_settled

    def has_result(self, task_id: int) -> bool:
        """Whether a longer wait makes no difference: it has a result, is not known, or was not launched."""
        task = self._tasks.get(task_id)
        return task is None or not task.is_launched or task.response is not None

    def take(self, task_id: int) -> KVResponse:
        """The result as it is now; one that has settled is forgotten."""
        task = self._tasks.get(task_id)
        if task is None:
            return KVResponse(KVResponseStatus.NOTFOUND, task_id, reason=reasons.NO_TASK)
        if not task.is_launched:
            return KVResponse(KVResponseStatus.UNREADY, task_id)
        if task.response is None:
            return KVResponse(KVResponseStatus.TIMEOUT, task_id, reason=reasons.STILL_RUNS)
        if task.is_settled:
            self.forget(task_id)
        return task.response


def pin_of(value: Sequence[Any]) -> Pin:
    """A pin from its JSON form, name and number of blocks; TypeError or ValueError if it has another form."""
    name, num_blocks = value
    return Pin(str(name), int(num_blocks))
