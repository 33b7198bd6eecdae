"""Results of tasks on a rank."""

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
