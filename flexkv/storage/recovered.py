"""What a store found when it was opened, put together again into sequences.

A record names the key of its block and the key of its parent, and records come in no order. Equal keys are found by
sorting, and depths by pointer doubling, so that keys that were made to collide in a hash table cost nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Recovered:
    """Blocks of a store, the oldest first. Their slots are allocated; the receiver frees those that it does not want.

    Attributes
    ----------
    keys, parents : (n, 2) uint64
        A parent of zeros: the first block of a sequence.
    slots : (n,) int32
    """

    keys: NDArray[np.uint64]
    parents: NDArray[np.uint64]
    slots: NDArray[np.int32]
    _sequences: "Sequences" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sequences", Sequences(self.keys, self.parents))

    def __len__(self) -> int:
        return len(self.slots)

    def paths(self) -> Iterator[NDArray[np.intp]]:
        """Indices of the blocks of each sequence, from its first block to a last one, those that ended longest ago
        first. A block that several sequences share is in the paths of all of them."""
        return iter(self._sequences)

    @property
    def cut_off(self) -> NDArray[np.intp]:
        """Indices of blocks that no path leads to, because one before them is gone: no prompt can reach them."""
        return self._sequences.cut_off


def nothing_recovered() -> Recovered:
    """The contents of an empty store."""
    none = np.zeros((0, 2), dtype=np.uint64)
    return Recovered(none, none, np.zeros(0, dtype=np.int32))


class Sequences:
    """Iterates over paths of records, each from a first block to a block without children, ordered by the latter.

    A path is made when it is asked for: together, paths that share a long prefix are much larger than the records.

    Parameters
    ----------
    keys, parents : (n, 2) uint64
        A parent of zeros: the first block of a sequence.

    Attributes
    ----------
    cut_off : (m,) intp
        Indices of records that no path leads to: a parent is missing, the key occurs twice, or parents form a ring.
    """

    def __init__(self, keys: NDArray[np.uint64], parents: NDArray[np.uint64]) -> None:
        if keys.shape != parents.shape or keys.shape[1:] != (2,):
            raise ValueError(f"keys and parents must be (n, 2); they are {keys.shape} and {parents.shape}")
        n = len(keys)
        every, root = np.arange(n), n
        parent = _parents(keys, parents)
        depth, end = _walk_up(parent)
        is_good = end == root
        self.cut_off = np.flatnonzero(~is_good)
        heir = np.full(n + 2, -1)                      # the child that continues the run of its parent
        heir[parent[is_good]] = every[is_good]
        heir[root] = -1
        is_head = heir[parent] != every
        place, head = _walk_up(np.where(is_head, every, parent))
        self._order = np.lexsort((place, head))        # each run is contiguous, from its head on
        self._start = np.zeros(n, dtype=np.intp)
        self._start[head[self._order][::-1]] = every[::-1]
        self._parent, self._head, self._place, self._depth, self._root = parent, head, place, depth, root
        self._leaves = np.flatnonzero(is_good & (heir[:n] < 0))

    def __len__(self) -> int:
        return len(self._leaves)

    def __iter__(self) -> Iterator[NDArray[np.intp]]:
        return map(self._path, self._leaves.tolist())

    def _path(self, leaf: int) -> NDArray[np.intp]:
        path, at, stop = np.empty(self._depth[leaf], dtype=np.intp), leaf, int(self._depth[leaf])
        while at != self._root:
            head, count = self._head[at], int(self._place[at]) + 1
            start = self._start[head]
            path[stop - count : stop] = self._order[start : start + count]
            at, stop = self._parent[head], stop - count
        return path


def _parents(keys: NDArray[np.uint64], parents: NDArray[np.uint64]) -> NDArray[np.intp]:
    """(n,) intp: index of each record's parent; n for a first block, n + 1 where there is none, or the record's key
    occurred before."""
    n = len(keys)
    order, is_new = _sorted(np.concatenate([keys, parents]))
    number = np.empty(2 * n, dtype=np.intp)
    number[order] = np.cumsum(is_new) - 1              # equal keys have one number
    record = np.full(2 * n, n + 1)
    record[number[:n][::-1]] = np.arange(n)[::-1]      # of records with one key, the first
    found = np.where((parents == 0).all(axis=1), n, record[number[n:]])
    return np.where(record[number[:n]] == np.arange(n), found, n + 1)


def _sorted(keys: NDArray[np.uint64], *by: NDArray[np.uint64 | np.intp]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """An order of keys ((m, 2) uint64), then by ``by``, the last first; and which in that order begins a new key."""
    order = np.lexsort((*by, keys[:, 1], keys[:, 0]))
    is_new = np.ones(len(keys), dtype=np.bool_)
    is_new[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    return order, is_new


def _walk_up(above: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Steps that each of n records takes to ``above`` it until it stays where it is, and where that is.

    ``above`` may be the record itself, n or n + 1, where a walk ends. A walk in a ring ends somewhere in the ring.
    """
    n = len(above)
    up = np.append(above, [n, n + 1])
    steps = (up != np.arange(n + 2)).astype(np.intp)
    for _ in range(n.bit_length() + 1):
        further = up[up]
        if np.array_equal(further, up):
            break
        steps += steps[up]
        up = further
    return steps[:n], up[:n]


def newest(keys: NDArray[np.uint64], sequences: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which records to keep: of each key the one with the highest sequence.

    Parameters
    ----------
    keys : (n, 2) uint64
    sequences : (n,) uint64

    Returns
    -------
    (n,) bool
    """
    n = len(keys)
    if keys.shape[1:] != (2,) or sequences.shape != (n,):
        raise ValueError(f"keys of shape {keys.shape} with sequences of shape {sequences.shape}")
    order, is_new = _sorted(keys, np.arange(n)[::-1], sequences)
    keep = np.zeros(n, dtype=np.bool_)
    keep[order[np.append(is_new[1:], True)[:n]]] = True          # the last of each key
    return keep
