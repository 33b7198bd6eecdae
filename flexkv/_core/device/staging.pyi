import numpy as np
from numpy.typing import NDArray

from flexkv._core.device.cuda_driver import Device

MAX_SLOTS: int

class DeviceStaging:
    address: int
    slot_bytes: int
    num_slots: int
    def __init__(
        self, device: Device, regions: NDArray[np.void], num_pages: int, slot_bytes: int, num_slots: int,
        move_function: int, checksum_function: int, num_ctas: int,
    ) -> None: ...
    def follow(self, stream: int) -> None: ...
    def gather(self, slots: NDArray[np.int32], pages: NDArray[np.int32]) -> None: ...
    def scatter(self, slots: NDArray[np.int32], pages: NDArray[np.int32]) -> None: ...
    def checksums(self, first: int, count: int) -> NDArray[np.uint64]: ...
    def close(self) -> None: ...
