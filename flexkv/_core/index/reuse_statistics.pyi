import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.ghosts import Ghosts

NUM_QUEUES: int

def remember(pieces: NDArray[np.void], ghosts: Ghosts) -> None: ...

class ReuseStatistics:
    has_learned: bool
    def place(self, events: NDArray[np.void], returns: NDArray[np.void]) -> None: ...
    def choose(self, heads: NDArray[np.float64]) -> tuple[int, float]: ...
