from typing_extensions import Buffer

import numpy as np
from numpy.typing import NDArray

def xxh3_64(data: Buffer) -> int: ...
def xxh3_64_slots(pool: Buffer, slot_bytes: int, slots: NDArray[np.int32]) -> NDArray[np.uint64]: ...
