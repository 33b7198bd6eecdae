"""Keys of prompts that were searched for, so that many bits of the keys agree, cost the tables no more than others."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._core.index.ghosts import Ghosts
from flexkv._core.index.radix import RadixTree
from flexkv.storage.recovered import Sequences, newest

COUNT = 20_000


def random_numbers(seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(1, 2**64, COUNT, dtype=np.uint64)


def low_bits() -> NDArray[np.uint64]:
    """The lowest 36 bits are the same: 2^36 hashes a key, seconds of a GPU's time."""
    return random_numbers(0) << np.uint64(36)


def high_bits() -> NDArray[np.uint64]:
    return random_numbers(0) >> np.uint64(36)


def folded_bits() -> NDArray[np.uint64]:
    """The exclusive-or of both halves is the same."""
    high = random_numbers(0) >> np.uint64(32)
    return high << np.uint64(32) | high ^ np.uint64(0x5A5A5A5A)


def multiplied_bits() -> NDArray[np.uint64]:
    """Bits 20 to 48 of the product with a factor that everybody knows are the same."""
    inverse = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
    return (random_numbers(0) & ~np.uint64((1 << 48) - (1 << 20))) * inverse


def keys_of(first: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(COUNT, 2) uint64."""
    return np.stack([first, random_numbers(1) >> np.uint64(33)], axis=1)


def in_a_tree(keys: NDArray[np.uint64]) -> None:
    tree = RadixTree(2 * COUNT)
    for i in range(COUNT):
        tree.insert(keys[i : i + 1], np.array([i], dtype=np.int32), 0, 1.0)
    for i in range(COUNT):
        tree.match(keys[i : i + 1])


def in_ghosts(keys: NDArray[np.uint64]) -> None:
    ghosts = Ghosts(COUNT)
    first = np.ascontiguousarray(keys[:, 0])
    ghosts.add(first, np.ones(COUNT, dtype=np.uint32), np.ones(COUNT))
    assert not np.isnan(ghosts.take(first)).any()


def in_records(keys: NDArray[np.uint64]) -> None:
    assert newest(keys, np.arange(COUNT, dtype=np.uint64)).all()
    assert len(Sequences(keys, np.zeros_like(keys))) == COUNT


@pytest.mark.parametrize("use", [in_a_tree, in_ghosts, in_records])
@pytest.mark.parametrize("make", [low_bits, high_bits, folded_bits, multiplied_bits])
def test_made_keys_cost_as_much_as_others(
    use: Callable[[NDArray[np.uint64]], None], make: Callable[[], NDArray[np.uint64]]
) -> None:
    """All in one place would be 2 * 10^8 steps, 15 to 100 times as long."""
    took = []
    for first in (random_numbers(2), make()):
        keys = keys_of(first)
        start = time.process_time()
        use(keys)
        took.append(time.process_time() - start)
    assert took[1] < 8 * took[0] + 0.02
