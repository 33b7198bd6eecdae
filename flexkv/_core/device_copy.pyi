import numpy as np
from numpy.typing import NDArray

class DeviceAgent:
    def __init__(
        self,
        *,
        regions: NDArray[np.void],
        num_pages: int,
        pool_fd: int,
        pool_bytes: int,
        slot_bytes: int,
        segment_offset: int,
        ring_fd: int,
        ring_bytes: int,
        submission_event_fd: int,
        completion_event_fd: int,
        socket_fd: int,
    ) -> None: ...
    def advance(self, load_fence: int, save_fence: int) -> None: ...
    def take(self) -> tuple[int, int, int, NDArray[np.int32], NDArray[np.bool_]] | None: ...
    def wait(self, timeout_s: float) -> bool: ...
    @property
    def status(self) -> int: ...
    def close(self) -> None: ...
