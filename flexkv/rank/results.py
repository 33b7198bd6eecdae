"""Results of tasks on a rank."""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.ring import OpKind


@dataclass(frozen=True, slots=True, eq=False)
class OpResult:
    """Result of one task on this rank.

    Attributes
    ----------
    pages : (n,) int32
        Pages of the task, in the order in which their copies ended. With several layer groups: (num_groups, n), -1 for
        a block that has no page in a group.
    ok : (n,) bool
        Whether the block of each page was moved.
    """

    task_id: int
    kind: OpKind
    pages: NDArray[np.int32]
    ok: NDArray[np.bool_]

    @property
    def failed_pages(self) -> NDArray[np.int32]:
        """Pages of the blocks that were not moved. After a failed load the content of these pages is undefined."""
        return self.pages[..., ~self.ok]


class ResultQueue:
    """Results of tasks, put together from their parts, until they are taken. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[int, list[OpResult]] = {}
        self._results: list[OpResult] = []

    def add(
        self, task_id: int, kind: int, op_blocks: int, pages: NDArray[np.int32], ok: NDArray[np.bool_]
    ) -> bool:
        """Add a part of the result of a task with ``op_blocks`` blocks; False: blocks of it were not moved."""
        with self._lock:
            parts = self._parts.pop(task_id, [])
            parts.append(OpResult(task_id, OpKind(kind), pages, ok))
            if sum(len(part.ok) for part in parts) < op_blocks:
                self._parts[task_id] = parts
                return True
            whole = np.concatenate([part.pages for part in parts], -1), np.concatenate([part.ok for part in parts])
            self._results.append(OpResult(task_id, OpKind(kind), whole[0], whole[1]))
        return bool(whole[1].all())

    def forget_parts(self) -> None:
        """Forget the parts of results that are not complete."""
        with self._lock:
            self._parts.clear()

    def take(self) -> list[OpResult]:
        """Return and forget the complete results."""
        with self._lock:
            results, self._results = self._results, []
        return results
