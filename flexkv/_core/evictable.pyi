from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv._core.nodes import NodeStore

PIECE_DTYPE: np.dtype[np.void]

class Pieces:
    def __len__(self) -> int: ...
    def array(self) -> NDArray[np.void]: ...

class EvictableNodes(NodeStore):
    num_groups: int
    def configure(self, num_queues: Sequence[int], ttl_s: Sequence[float] = ...) -> None: ...
    def discard(self, tier: int) -> NDArray[np.int32]: ...
    def evict(
        self, tier: int, group: int, queue: int, want: int, now: float, leave: int = 0, spare_to: int = -1,
        why: int = ..., below: float = ..., pieces: Pieces | None = None,
    ) -> NDArray[np.int32]: ...
    def expire(self, tier: int, now: float, num_nodes: int, want: int = ...) -> NDArray[np.int32]: ...
