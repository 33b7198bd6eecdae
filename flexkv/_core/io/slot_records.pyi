from typing import Final

import numpy as np
from numpy.typing import NDArray

EMPTY: Final = 0
MINE: Final = 1
OTHER_DOMAIN: Final = 2
VOID: Final = 3
BROKEN: Final = 4

def seal(records: NDArray[np.uint8], slots: NDArray[np.int32]) -> None: ...
def scan(
    records: NDArray[np.uint8], first_slot: int, domain: int, length: int, floor: int
) -> NDArray[np.uint8]: ...
