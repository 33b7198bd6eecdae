"""Blocks that a store recovers when it is opened, assembled into sequences.

A record names the key of its block and the key of its parent, and records are in no order. Equal keys are found by
sorting, and depths by pointer doubling. Without a hash table, keys that were made to collide cost nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Recovered:
    """Blocks of a store, the oldest first. Their slots are allocated; the receiver must free the slots of blocks
    that it does not use.

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
        """Indices of the blocks of each sequence, from its first block to its last; the sequence with the oldest last
        block comes first. A block that several sequences share is in the paths of all of them."""
        return iter(self._sequences)

    @property
    def cut_off(self) -> NDArray[np.intp]:
        """Indices of blocks that are in no path because a block before them is missing: no prompt can reach them."""
        return self._sequences.cut_off


def nothing_recovered() -> Recovered:
    """The contents of an empty store."""
    none = np.zeros((0, 2), dtype=np.uint64)
    return Recovered(none, none, np.zeros(0, dtype=np.int32))


class Sequences:
    """Iterates over paths of records, each from a first block to a block without children, in the order of these last
    blocks.

    A path is made only when the iterator reaches it, because all paths with a shared long prefix together are much
    larger than the records.

    Parameters
    ----------
    keys, parents : (n, 2) uint64
        A parent of zeros: the first block of a sequence.

    Attributes
    ----------
    cut_off : (m,) intp
        Indices of records that are in no path: a parent is missing, the key occurs twice, or parents form a ring.
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
    """(n,) intp: index of each record's parent; n for a first block, n + 1 if the parent is missing or the record's key
    occurred before."""
    n = len(keys)
    order, is_new = _sorted(np.concatenate([keys, parents]))
    number = np.empty(2 * n, dtype=np.intp)
    number[order] = np.cumsum(is_new) - 1              # equal keys have one number
    record = np.full(2 * n, n + 1)
    record[number[:n][::-1]] = np.arange(n)[::-1]      # the first of the records with one key
    found = np.where((parents == 0).all(axis=1), n, record[number[n:]])
    return np.where(record[number[:n]] == np.arange(n), found, n + 1)


def _sorted(keys: NDArray[np.uint64], *by: NDArray[np.uint64 | np.intp]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Order of keys ((m, 2) uint64), equal keys by ``by``, of which the last is the most significant; and (m,) bool,
    the places in that order at which a new key begins."""
    order = np.lexsort((*by, keys[:, 1], keys[:, 0]))
    is_new = np.ones(len(keys), dtype=np.bool_)
    is_new[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    return order, is_new


def _walk_up(above: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Follow ``above`` from each of n records to its end; returns the number of steps and the end of each walk.

    A walk ends at n, at n + 1, or at a record whose ``above`` is itself. A walk in a ring ends somewhere in the ring.
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
    """Select the record with the highest sequence of each key.

    Parameters
    ----------
    keys : (n, 2) uint64
    sequences : (n,) uint64

    Returns
    -------
    (n,) bool
        Records to keep.
    """
    n = len(keys)
    if keys.shape[1:] != (2,) or sequences.shape != (n,):
        raise ValueError(f"keys of shape {keys.shape} with sequences of shape {sequences.shape}")
    order, is_new = _sorted(keys, np.arange(n)[::-1], sequences)
    keep = np.zeros(n, dtype=np.bool_)
    keep[order[np.append(is_new[1:], True)[:n]]] = True          # the last of each key
    return keep
