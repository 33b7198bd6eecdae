import numpy as np
from numpy.typing import ArrayLike, NDArray

def pages_from_slot_mapping(slot_mapping: ArrayLike, tokens_per_block: int) -> NDArray[np.int32]: ...
