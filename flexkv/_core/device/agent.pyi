from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from flexkv._core.device.cuda_driver import Device
from flexkv.errors import CudaError

STRATEGIES: tuple[str, ...]
REGION_DTYPE: np.dtype[np.void]
SPAN_DTYPE: np.dtype[np.void]

def spans_of(
    regions: NDArray[np.void], ranges: Sequence[tuple[int, int]], group: int = 0
) -> NDArray[np.void]: ...

class DeviceAgent:
    def __init__(
        self,
        *,
        regions: NDArray[np.void],
        num_pages: Sequence[int],
        spans: NDArray[np.void] | None = None,
        saves: tuple[int, int] | None = None,
        loads: tuple[int, int] | None = None,
        layers: tuple[int, int] | None = None,
        shares: tuple[int, int] = (0, 0),
        peers: tuple[int, int] = (0, 0),
        imports: ExitStack | None = None,
        pool_fd: int,
        pool_bytes: int,
        slot_bytes: int,
        ring_fd: int,
        ring_bytes: int,
        submission_event_fd: int,
        completion_event_fd: int,
        socket_fd: int,
        keep_outcomes: bool = True,
        device: Device | None = None,
        move_function: int = 0,
        strategy: str = "auto",
        window_bytes: int = 0,
        num_ctas: int = 0,
        rest_timeout_s: float = 10.0,
    ) -> None: ...
    @property
    def pinned_slots(self) -> int: ...
    @property
    def pinning(self) -> bool: ...
    def take_part(self) -> None: ...
    def pin_next(self) -> bool: ...
    def fence(self, stream: int, load: bool, fence: int) -> None: ...
    def follow(self, task_id: int, span: int, timeout_s: float, stream: int = 0) -> bool: ...
    @property
    def has_peers(self) -> bool: ...
    def release_peers(self) -> None: ...
    def set_signals(self, fds: list[list[int]], span_of_layer: NDArray[np.uint32] | list[int]) -> None: ...
    @property
    def device_error(self) -> CudaError | None: ...
    def advance(self, load_fence: int, save_fence: int) -> None: ...
    def take(self) -> tuple[int, int, int, NDArray[np.int32], NDArray[np.bool_]] | None: ...
    def wait(self, timeout_s: float) -> bool: ...
    @property
    def status(self) -> int: ...
    def close(self) -> bool: ...
