import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.nodes import NodeStore

PIECE_DTYPE: np.dtype[np.void]

class Pieces:
    def __len__(self) -> int: ...
    def array(self) -> NDArray[np.void]: ...

class Evictor:
    def __init__(self, store: NodeStore) -> None: ...
