import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def xxh3_64(data: Buffer | NDArray[np.uint8]) -> int: ...
def xxh3_64_slots(
    pool: Buffer | NDArray[np.uint8], slot_bytes: int, slots: NDArray[np.int32]
) -> NDArray[np.uint64]: ...
