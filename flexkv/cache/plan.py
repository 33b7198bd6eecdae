"""What one get or put will move: made by ``GlobalCacheEngine``, carried out by the data plane."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.radix import RadixTree
from flexkv.cache.reasons import StopReason


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Answer to "how much of this sequence is here": ``num_ready`` leading blocks, and why no more."""

    num_ready: int
    reason: StopReason


@dataclass(frozen=True, slots=True, eq=False)
class GetPlan:
    """Blocks ``[start, stop)`` of a sequence, pinned until ``end_get``.

    Attributes
    ----------
    keys : (stop, 2) uint64
    slots : (stop - start,) int32
        Host slot of each block.
    reason : StopReason
        Why the plan ends at ``stop``.
    tree : RadixTree
        The index it was made from; a reset replaces the engine's index, not the plan's.
    """

    keys: NDArray[np.uint64]
    start: int
    stop: int
    slots: NDArray[np.int32]
    reason: StopReason
    tree: RadixTree

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class PutPlan:
    """Blocks of a sequence that have a slot each, in state writing, until ``end_put``.

    Attributes
    ----------
    keys : (n, 2) uint64
        The sequence up to the last block to write.
    blocks : (m,) int32
        Positions of the blocks to write, ascending.
    slots : (m,) int32
        Their host slots.
    """

    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    slots: NDArray[np.int32]
    tree: RadixTree

    def __len__(self) -> int:
        return len(self.blocks)

    def slots_by_position(self, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int32]:
        """(n,) int32: the slot at each chosen block's position, -1 elsewhere, as the index wants it."""
        by_position = np.full(len(self.keys), -1, dtype=np.int32)
        if chosen is None:
            by_position[self.blocks] = self.slots
        else:
            by_position[self.blocks[chosen]] = self.slots[chosen]
        return by_position
