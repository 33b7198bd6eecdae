"""The index as plainly as it can be said: a dict from each prefix to its one block."""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Prefix = tuple[int, ...]


def keys_of(sequence: Prefix) -> NDArray[np.uint64]:
    """(n, 2) uint64: a chained key for each block, here a digest of the whole prefix."""
    digests = [hashlib.blake2b(bytes(sequence[: i + 1]), digest_size=16).digest() for i in range(len(sequence))]
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2).copy()


@cache
def key_of(prefix: Prefix) -> bytes:
    """Key of the last block of a prefix."""
    return bytes(keys_of(prefix)[-1])


@dataclass
class ModelBlock:
    slot: int = -1
    ready: bool = False
    references: int = 0


class ModelTree:
    """Blocks by prefix; a block stays while it has a slot, a reference, or a block below it."""

    def __init__(self) -> None:
        self.blocks: dict[Prefix, ModelBlock] = {}

    def prefixes(self, sequence: Prefix) -> list[Prefix]:
        return [sequence[: i + 1] for i in range(len(sequence))]

    def present(self, sequence: Prefix) -> int:
        return next((i for i, p in enumerate(self.prefixes(sequence)) if p not in self.blocks), len(sequence))

    def ready(self, sequence: Prefix) -> list[int]:
        slots: list[int] = []
        for prefix in self.prefixes(sequence):
            block = self.blocks.get(prefix)
            if block is None or not block.ready:
                break
            slots.append(block.slot)
        return slots

    def absent(self, sequence: Prefix) -> list[int]:
        return [i for i, p in enumerate(self.prefixes(sequence)) if p not in self.blocks or self.blocks[p].slot < 0]

    def evict(self, slot: int) -> None:
        """Check that the block in ``slot`` may go now, and let it."""
        prefix, block = next((p, b) for p, b in self.blocks.items() if b.slot == slot)
        assert block.ready, prefix
        assert block.references == 0, prefix
        n = len(prefix)
        below = [p for p, b in self.blocks.items() if p[:n] == prefix and len(p) > n and b.slot >= 0]
        assert not below, (prefix, below)
        block.slot, block.ready = -1, False

    def out_of_reach(self) -> list[Prefix]:
        """Ready blocks without a reference that have a block before them that is on no tier."""
        return [
            prefix for prefix, block in self.blocks.items()
            if block.ready and block.references == 0 and any(
                self.blocks[p].slot < 0 for p in self.prefixes(prefix)[:-1]
            )
        ]

    def reclaim(self, slot: int) -> None:
        """Check that no match reaches the block in ``slot``, and let it go."""
        prefix, block = next((p, b) for p, b in self.blocks.items() if b.slot == slot)
        assert prefix in self.out_of_reach(), prefix
        block.slot, block.ready = -1, False

    def prune(self) -> None:
        for prefix in sorted(self.blocks, key=len, reverse=True):
            block = self.blocks[prefix]
            if block.slot < 0 and block.references == 0 and not any(
                len(p) == len(prefix) + 1 and p[:-1] == prefix for p in self.blocks
            ):
                del self.blocks[prefix]
