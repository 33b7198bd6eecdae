import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.eviction_queues import EvictionQueues

class NodeStore:
    num_tiers: int
    max_blocks: int
    num_blocks: int
    num_nodes: int
    num_holes: int
    def __init__(self, max_blocks: int, num_tiers: int = 1) -> None: ...
    def eviction_queues(self, tier: int) -> EvictionQueues: ...
    def check_integrity(self) -> list[NDArray[np.int32]]: ...
