import numpy as np
from numpy.typing import NDArray

NODE_DTYPE: np.dtype[np.void]

class NodeStore:
    num_tiers: int
    max_blocks: int
    num_blocks: int
    num_nodes: int
    def __init__(self, max_blocks: int, num_tiers: int = 1) -> None: ...
    def check_integrity(self) -> list[NDArray[np.int32]]: ...
