import numpy as np
from numpy.typing import NDArray

from flexkv._core.ring_pair import RingPair

FAREWELL: bytes

class ControllerRings(RingPair):
    max_blocks: int
    def __init__(self, data_bytes: int, num_groups: int = 1) -> None: ...
    def push_op(
        self,
        op_id: int,
        task_id: int,
        kind: int,
        fence: int,
        slots: NDArray[np.int32],
        pages: NDArray[np.int32],
        op_blocks: int,
        flags: int = 0,
        counter: int = 0,
        outstanding: int = 0,
    ) -> bool: ...
    def push_cancel(self, op_id: int) -> bool: ...
    def pop_result(self) -> tuple[int, int, NDArray[np.bool_], bool] | None: ...
    @property
    def usable_slots(self) -> int: ...
    def note_populated(self, num_slots: int, last: bool) -> None: ...
    @property
    def exchanges(self) -> bool: ...
    def end_exchange(self) -> None: ...
    def reached(self, load: bool) -> int: ...
