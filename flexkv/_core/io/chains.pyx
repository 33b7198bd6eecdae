"""Chains of blocks put together again from records that each name their parent, in no order.

Both functions find keys in an open-addressing table of indices. A random factor decides where a key lies, so keys that
were made to agree in some bits do not meet there.
"""
import secrets

import numpy as np

from libc.stdint cimport int32_t, uint8_t, uint64_t

from flexkv._core.arena cimport Arena

cdef enum:
    NO_PARENT = -1             # the first block of a sequence
    LOST = -2                  # its parent is not among the records, or its key is there twice

cdef enum:
    UNKNOWN = 0
    CUT_OFF = -1               # no way up to a first block
    VISITING = -2


cdef class KeyIndex:
    """Finds the index of a key among the first ``len(keys)``."""
    cdef Arena arena
    cdef int32_t *table        # index + 1; 0: nothing
    cdef const uint64_t[:, ::1] keys
    cdef Py_ssize_t mask
    cdef uint64_t factor
    cdef int shift             # 64 - log2 of the size

    def __cinit__(self, const uint64_t[:, ::1] keys):
        cdef Py_ssize_t size = 16
        self.shift = 64 - 4
        self.factor = secrets.randbits(64) | 1
        while size < 2 * keys.shape[0]:
            size *= 2
            self.shift -= 1
        self.arena = Arena(size * sizeof(int32_t))
        self.table = <int32_t *>self.arena.data
        self.keys = keys
        self.mask = size - 1

    cdef inline int32_t *place(self, uint64_t low, uint64_t high) noexcept nogil:
        """Where the key is, or where it would go."""
        cdef Py_ssize_t at = <Py_ssize_t>(low * self.factor >> self.shift)
        cdef int32_t found
        while True:
            found = self.table[at]
            if found == 0 or (self.keys[found - 1, 0] == low and self.keys[found - 1, 1] == high):
                return &self.table[at]
            at = (at + 1) & self.mask


def newest(const uint64_t[:, ::1] keys not None, const uint64_t[::1] sequences not None):
    """Which records to keep: of each key, the one with the highest sequence.

    Parameters
    ----------
    keys : (n, 2) uint64
    sequences : (n,) uint64

    Returns
    -------
    (n,) bool
    """
    cdef Py_ssize_t i, n = keys.shape[0]
    if keys.shape[1] != 2 or sequences.shape[0] != n:
        raise ValueError(f"{n} keys of {keys.shape[1]} halves with {sequences.shape[0]} sequences")
    keep_array = np.ones(n, dtype=np.bool_)
    cdef uint8_t[::1] keep = keep_array.view(np.uint8)
    cdef KeyIndex index = KeyIndex(keys)
    cdef int32_t *place
    with nogil:
        for i in range(n):
            place = index.place(keys[i, 0], keys[i, 1])
            if place[0] and sequences[place[0] - 1] >= sequences[i]:
                keep[i] = 0
                continue
            if place[0]:
                keep[place[0] - 1] = 0
            place[0] = <int32_t>i + 1
    return keep_array


cdef class LeafPaths:
    """Iterates over the paths from a first block to a last one; made by ``leaf_paths``.

    Paths are made one at a time: together they can be much larger than what they are made from, when many share a
    long prefix.

    Attributes
    ----------
    cut_off : (m,) intp
        Indices of records that no path leads to: a parent is missing, the key is there twice, or parents go round.
    """
    cdef readonly object cut_off
    cdef int32_t[::1] parent
    cdef int32_t[::1] depth
    cdef Py_ssize_t[::1] leaves
    cdef Py_ssize_t next_leaf

    def __len__(self):
        return self.leaves.shape[0]

    def __iter__(self):
        self.next_leaf = 0
        return self

    def __next__(self):
        if self.next_leaf == self.leaves.shape[0]:
            raise StopIteration
        cdef Py_ssize_t at = self.leaves[self.next_leaf], i
        self.next_leaf += 1
        path_array = np.empty(self.depth[at], dtype=np.intp)
        cdef Py_ssize_t[::1] path = path_array
        for i in range(path.shape[0] - 1, -1, -1):
            path[i] = at
            at = self.parent[at]
        return path_array


cdef void find_parents(KeyIndex index, const uint64_t[:, ::1] keys, const uint64_t[:, ::1] parents, int32_t[::1] parent,
                       int32_t[::1] depth) noexcept nogil:
    cdef Py_ssize_t i, n = keys.shape[0]
    cdef int32_t *place
    for i in range(n):
        place = index.place(keys[i, 0], keys[i, 1])
        if place[0]:
            depth[i] = CUT_OFF
        else:
            place[0] = <int32_t>i + 1
    for i in range(n):
        if depth[i] == CUT_OFF:
            parent[i] = LOST
        elif parents[i, 0] == 0 and parents[i, 1] == 0:
            parent[i] = NO_PARENT
        else:
            place = index.place(parents[i, 0], parents[i, 1])
            parent[i] = place[0] - 1 if place[0] else LOST


cdef void find_depth(Py_ssize_t start, int32_t[::1] parent, int32_t[::1] depth) noexcept nogil:
    """Go up until something is known, then come again and write it down: each record is visited twice at most."""
    cdef Py_ssize_t at = start
    cdef int32_t steps = 0, above = UNKNOWN
    while above == UNKNOWN:
        depth[at] = VISITING
        steps += 1
        if parent[at] == NO_PARENT:
            break
        above = CUT_OFF if parent[at] == LOST else depth[parent[at]]
        if above == UNKNOWN:
            at = parent[at]
    at = start
    while steps > 0:
        depth[at] = CUT_OFF if above < 0 else above + steps
        steps -= 1
        at = parent[at]


def leaf_paths(const uint64_t[:, ::1] keys not None, const uint64_t[:, ::1] parents not None):
    """Paths through records, each from a first block to a block that is nobody's parent, in the order of the latter.

    Parameters
    ----------
    keys, parents : (n, 2) uint64
        A parent of zeros: the first block of a sequence.

    Returns
    -------
    LeafPaths
        Iterator of (length,) intp arrays of indices; every record but those in ``cut_off`` is on at least one.
    """
    cdef Py_ssize_t i, n = keys.shape[0]
    if keys.shape[1] != 2 or parents.shape[1] != 2 or parents.shape[0] != n:
        raise ValueError(f"keys and parents must be (n, 2); they have {n} and {parents.shape[0]} rows")
    cdef LeafPaths paths = LeafPaths()
    cdef KeyIndex index = KeyIndex(keys)
    paths.parent = np.empty(n, dtype=np.int32)
    depth_array = np.zeros(n, dtype=np.int32)
    paths.depth = depth_array
    has_child_array = np.zeros(n, dtype=np.bool_)
    cdef uint8_t[::1] has_child = has_child_array.view(np.uint8)
    cdef int32_t[::1] parent = paths.parent, depth = paths.depth
    with nogil:
        find_parents(index, keys, parents, parent, depth)
        for i in range(n):
            if depth[i] == UNKNOWN:
                find_depth(i, parent, depth)
            if parent[i] >= 0:
                has_child[parent[i]] = 1
    paths.leaves = np.flatnonzero((depth_array > 0) & ~has_child_array)
    paths.cut_off = np.flatnonzero(depth_array < 0)
    return paths
