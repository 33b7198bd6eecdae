from typing import Final

import numpy as np
from numpy.typing import NDArray

from flexkv._core.evictable import EvictableNodes

REASON_FULL_HIT: Final = 0
REASON_NOT_READY: Final = 1
REASON_NEVER_SEEN: Final = 2
REASON_EVICTED: Final = 3
REASON_FAILED: Final = 4
REASON_EXPIRED: Final = 5
REASON_OVER_QUOTA: Final = 6
REASON_NOT_ADMITTED: Final = 7

class Match:
    num_blocks: int
    num_ready: int
    reason: int
    slots: NDArray[np.int32]
    tiers: NDArray[np.int8]
    since: float
    def __init__(
        self, num_blocks: int, num_ready: int, reason: int, slots: NDArray[np.int32], tiers: NDArray[np.int8],
        since: float = ...,
    ) -> None: ...

class RadixTree(EvictableNodes):
    def match(self, keys: NDArray[np.uint64], now: float = ...) -> Match: ...
    def absent(self, keys: NDArray[np.uint64]) -> NDArray[np.int32]: ...
    def slots(self, keys: NDArray[np.uint64], tier: int) -> NDArray[np.int32]: ...
    def insert(
        self, keys: NDArray[np.uint64], slots: NDArray[np.int32], tier: int, now: float, group: int = 0
    ) -> None: ...
    def set_ready(self, keys: NDArray[np.uint64], slots: NDArray[np.int32], tier: int) -> int: ...
    def drop(
        self, keys: NDArray[np.uint64], slots: NDArray[np.int32], tier: int, failed: bool = False
    ) -> int: ...
    def pin(self, keys: NDArray[np.uint64], start: int, stop: int) -> None: ...
    def unpin(self, keys: NDArray[np.uint64], start: int, stop: int) -> None: ...
    def touch(self, keys: NDArray[np.uint64], now: float, hit: bool = True, group: int = -1) -> None: ...
    def group_of(self, keys: NDArray[np.uint64]) -> int: ...
    def remember(self, keys: NDArray[np.uint64], start: int, why: int) -> None: ...
    def resident(self, tier: int) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
