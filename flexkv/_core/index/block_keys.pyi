from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

HAS_SHA_INSTRUCTIONS: bool

def chain_seed(domain: bytes, namespace: Sequence[str] = (), secret: bytes = b"") -> bytes: ...
def hash_blocks(
    tokens: ArrayLike,
    tokens_per_block: int,
    seed: bytes,
    extras: Mapping[int, bytes] | None = None,
    portable: bool = False,
) -> NDArray[np.uint64]: ...

class SequenceHasher:
    tokens_per_block: int
    num_blocks: int
    def __init__(self, seed: bytes, tokens_per_block: int) -> None: ...
    def extend(self, tokens: ArrayLike, extras: Mapping[int, bytes] | None = None) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def keys(self) -> NDArray[np.uint64]: ...
