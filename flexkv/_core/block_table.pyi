from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

REGION_DTYPE: np.dtype[np.void]
SPAN_DTYPE: np.dtype[np.void]

def pages_from_slot_mapping(slot_mapping: ArrayLike, tokens_per_block: int) -> NDArray[np.int32]: ...
def merge_runs(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]: ...

@dataclass(frozen=True)
class TensorSpec:
    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    page_dim: int = 0
    tokens_per_page: int | None = None
    device: int | None = None

def regions_from_tensors(specs: Sequence[TensorSpec]) -> tuple[NDArray[np.void], int, int]: ...
def whole_span(regions: NDArray[np.void]) -> NDArray[np.void]: ...
def layer_spans(
    regions: NDArray[np.void], tensor_bytes: Sequence[int], num_groups: int
) -> tuple[NDArray[np.void], list[int]]: ...
