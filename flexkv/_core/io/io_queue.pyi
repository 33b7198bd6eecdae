from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

READ: int
WRITE: int
METHODS: tuple[str, ...]

class IoQueue:
    def __init__(
        self,
        files: Sequence[int],
        memory: Buffer | NDArray[np.uint8],
        *,
        depth: int = 64,
        method: str = "auto",
        deadline_s: float = 10.0,
    ) -> None: ...
    @property
    def event_fd(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def registered_bytes(self) -> int: ...
    def register(self, upto_bytes: int) -> None: ...
    def submit(
        self,
        kind: int,
        tags: NDArray[np.uint64],
        files: NDArray[np.int32],
        file_offsets: NDArray[np.int64],
        memory_offsets: NDArray[np.int64],
        size: int,
    ) -> None: ...
    def cancel(self, tags: NDArray[np.uint64]) -> None: ...
    def take(self) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint64]]: ...
    def busy(self) -> NDArray[np.uint64]: ...
    def close(self) -> None: ...
