import numpy as np
from numpy.typing import NDArray

NUM_QUEUES: int

class ReuseStatistics:
    has_learned: bool
    def place(self, events: NDArray[np.void], returns: NDArray[np.void]) -> None: ...
    def choose(self, heads: NDArray[np.float64]) -> tuple[int, float]: ...
