"""Chains put together from records in any order."""

import time

import numpy as np
import pytest

from flexkv.storage.recovered import Sequences, newest
from tests.support.ssd_store import keys_of


def paths_of(blocks: list[int], parents: list[int]) -> tuple[list[list[int]], list[int]]:
    paths = Sequences(keys_of(blocks), keys_of(parents))
    found = [[blocks[i] for i in path] for path in paths]
    assert len(paths) == len(found)
    return found, paths.cut_off.tolist()


def test_paths_go_from_first_blocks_to_last_ones() -> None:
    assert paths_of([2, 0, 1, 3, 9], [1, -1, 0, 1, -1]) == ([[0, 1, 2], [0, 1, 3], [9]], [])


def test_nothing() -> None:
    assert paths_of([], []) == ([], [])


def test_without_a_parent_a_block_and_what_follows_it_is_left_out() -> None:
    assert paths_of([0, 2, 3], [-1, 1, 2]) == ([[0]], [1, 2])


def test_rings_and_blocks_that_are_their_own_parent_end() -> None:
    assert paths_of([0, 1, 2, 3, 4], [2, 0, 1, 3, 2]) == ([], [0, 1, 2, 3, 4])


def test_a_key_that_is_there_twice_counts_once() -> None:
    assert paths_of([0, 1, 1, 2], [-1, 0, -1, 1]) == ([[0, 1, 2]], [2])


def test_against_a_plain_walk() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.integers(1, 30))
        blocks = rng.permutation(n).tolist()
        parents = [int(rng.integers(-1, n + 2)) for _ in blocks]
        above = dict(zip(blocks, parents, strict=True))

        def way(block: int, above: dict[int, int] = above) -> list[int] | None:
            path = [block]
            while above[path[-1]] != -1:
                if above[path[-1]] not in above or len(path) > len(above):
                    return None
                path.append(above[path[-1]])
            return path[::-1]

        good = {block for block in blocks if way(block)}
        leaves = [block for block in blocks if block in good and block not in {above[b] for b in good}]
        found, cut_off = paths_of(blocks, parents)
        assert found == [way(block) for block in leaves]
        assert {blocks[i] for i in cut_off} == set(blocks) - good


def test_keys_that_fall_on_one_place_are_still_told_apart() -> None:
    keys = np.zeros((500, 2), dtype=np.uint64)
    keys[:, 1] = np.arange(500)                  # the low half is the same, the upper bits of the high half too
    keys[:, 0] = 7
    parents = np.vstack([np.zeros((1, 2), np.uint64), keys[:-1]])
    assert [path.tolist() for path in Sequences(keys, parents)] == [list(range(500))]


def test_newest_of_each_key() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        numbers = rng.integers(0, 10, 40)
        sequences = rng.permutation(40).astype(np.uint64)
        best = {}
        for i, number in enumerate(numbers.tolist()):
            if number not in best or sequences[i] > sequences[best[number]]:
                best[number] = i
        assert np.flatnonzero(newest(keys_of(numbers.tolist()), sequences)).tolist() == sorted(best.values())


def test_a_million_records() -> None:
    n = 1_000_000
    keys = np.random.default_rng(3).integers(1, 1 << 63, (n, 2), dtype=np.uint64)
    parents = np.vstack([np.zeros((1, 2), np.uint64), keys[:-1]])
    parents[::2000] = 0
    order = np.random.default_rng(4).permutation(n)
    start = time.perf_counter()
    shuffled = np.ascontiguousarray(keys[order]), np.ascontiguousarray(parents[order])
    total = sum(len(path) for path in Sequences(*shuffled))
    assert total == n
    assert time.perf_counter() - start < 20         # it takes 0.3 s; quadratic would be hours


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must be"):
        Sequences(keys_of([1, 2]), keys_of([1]))
    with pytest.raises(ValueError, match="sequences"):
        newest(keys_of([1, 2]), np.zeros(1, np.uint64))
