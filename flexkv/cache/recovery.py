"""From the records of single blocks back to sequences."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def chains(keys: NDArray[np.uint64], parents: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.intp], int]]:
    """Sequences of blocks of which each names the one before it.

    Parameters
    ----------
    keys, parents : (n, 2) uint64
        No key twice; the parent of a first block is zero. What no sequence from a first block leads to is left out.

    Yields
    ------
    path : (m,) intp
        Indices of the blocks of a sequence, from its first to one that none follows on.
    known : int
        So many leading blocks of it were in earlier paths.
    """
    num = len(keys)
    first, children = _children(keys, parents)
    path = np.empty(num, dtype=np.intp)
    stack = [(block, 0) for block in children[first[num] : first[num + 1]].tolist()]
    known = 0
    while stack:
        block, depth = stack.pop()
        path[depth] = block
        known = min(known, depth)
        below = children[first[block] : first[block + 1]].tolist()
        if below:
            stack += [(child, depth + 1) for child in below]
        else:
            yield path[: depth + 1].copy(), known
            known = depth + 1


def _children(
    keys: NDArray[np.uint64], parents: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """``children[first[i]:first[i + 1]]`` follow on block i; i = n stands for the start of a sequence."""
    num = len(keys)
    names, wanted = (np.ascontiguousarray(array).view("S16").ravel() for array in (keys, parents))
    order = np.argsort(names)
    place = np.minimum(np.searchsorted(names[order], wanted), max(num - 1, 0))
    parent = np.full(num, num + 1, dtype=np.intp)               # nobody's
    if num:
        found = names[order[place]] == wanted
        parent[found] = order[place[found]]
    parent[(parents == 0).all(axis=1)] = num
    children = np.argsort(parent, kind="stable")
    return np.searchsorted(parent[children], np.arange(num + 2)), children
