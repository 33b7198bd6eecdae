"""An index with many sequences, for benchmarks."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.eviction import LRU

SEQUENCE = 2048
SHARED = 128
NEW = SEQUENCE - SHARED
NUM_TIERS = 3


def random_keys(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Random keys, (count, 2) uint64. They behave like real keys, which are digests."""
    return rng.integers(0, 1 << 63, (count, 2), dtype=np.uint64)


class FilledTree:
    """An index with about ``num_blocks`` blocks, in sequences of 2,048 blocks that share their first 128. Every block
    is in the first tier. There is room for ``spare`` more blocks.

    Attributes
    ----------
    sequences : list of (2048, 2) uint64
        Keys of up to 256 sequences, spread evenly over the index.
    """

    def __init__(self, num_blocks: int, spare: int = 0, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.tree = RadixTree(num_blocks + spare + 2 * SEQUENCE, NUM_TIERS)
        self.shared = random_keys(self.rng, SHARED)
        self._policy = LRU(num_blocks)
        self.sequences: list[NDArray[np.uint64]] = []
        self.now = 0.0
        total = max(1, (num_blocks - SHARED) // NEW)
        for i in range(total):
            keys = self.new_sequence()
            self.insert(keys)
            if i % max(1, total // 256) == 0:
                self.sequences.append(keys)

    def new_sequence(self) -> NDArray[np.uint64]:
        """Keys of a sequence whose blocks are not in the index, except for the shared blocks."""
        return np.concatenate([self.shared, random_keys(self.rng, NEW)])

    def slots_for(self, keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        """A slot for each block that is not in the index; -1 for the others."""
        slots = np.full(len(keys), -1, dtype=np.int32)
        absent = self.tree.absent(keys)
        slots[absent] = np.arange(len(absent)) + int(self.now) * SEQUENCE
        return slots

    def insert(self, keys: NDArray[np.uint64]) -> None:
        """Insert a sequence and make its blocks ready."""
        slots = self.slots_for(keys)
        self.now += 1
        self.tree.insert(keys, slots, 0, self.now)
        self.tree.set_ready(keys, slots, 0)

    def evict_oldest(self, count: int) -> None:
        """Evict ``count`` blocks of the least recently used sequences."""
        queues = self.tree.eviction_queues(0)
        events = queues.drain()
        self._policy.place(events)
        queues.place(events)
        freed = self.tree.evict(0, 0, 0, count, self.now)
        if len(freed) != count:
            raise AssertionError(f"{len(freed)} slots were freed, not {count}")
