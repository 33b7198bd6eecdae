"""Recently evicted pieces: keys with a value each, in the order of eviction; the oldest make room."""
import secrets

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from flexkv._core.arena cimport Arena
from flexkv._core.index.key_table cimport find_place, free_place, set_places


cdef inline const uint64_t *key_of(const void *ring, int32_t number) noexcept nogil:
    return &(<const Ghost *>ring)[number - 1].key


cdef class Ghosts:
    """At most ``max_pieces`` pieces, each with its number of blocks. The caller locks.

    A piece that is added again replaces the older one. Memory is taken as it is used.
    """

    def __cinit__(self, Py_ssize_t max_pieces):
        if not 1 <= max_pieces < 1 << 30:
            raise ValueError(f"max_pieces is {max_pieces}; allowed: 1 to 2**30 - 1")
        self.size = 64
        while self.size < max_pieces:
            self.size *= 2
        self.ring_arena = Arena(self.size * sizeof(Ghost))
        self.table_arena = Arena(2 * self.size * sizeof(int32_t))
        self.ring = <Ghost *>self.ring_arena.data
        self.table.factor = secrets.randbits(64) | 1
        set_places(&self.table, <int32_t *>self.table_arena.data, 2 * self.size)

    cdef uint64_t find(self, uint64_t key) noexcept nogil:
        """The place of a key in the table, or the free one where it would be."""
        return find_place(&self.table, self.ring, key_of, &key, 1)

    cdef Ghost *at_place(self, uint64_t place) noexcept nogil:
        """The ghost at a place of the table; NULL if the place is free."""
        return &self.ring[self.table.numbers[place] - 1] if self.table.numbers[place] else NULL

    cdef void remove(self, uint64_t place) noexcept nogil:
        cdef Ghost *ghost = self.at_place(place)
        self.num_blocks -= ghost.blocks
        ghost.blocks = 0
        free_place(&self.table, self.ring, key_of, place)

    cdef void drop_first(self) noexcept nogil:
        cdef Ghost *ghost = &self.ring[self.first & (self.size - 1)]
        if ghost.blocks:
            self.remove(self.find(ghost.key))
        self.first += 1

    def add(self, const uint64_t[:] keys not None, const uint32_t[:] blocks not None, const double[:] values not None):
        """Add evicted pieces ((n,) each); each has at least one block."""
        cdef Py_ssize_t i, n = keys.shape[0]
        if blocks.shape[0] != n or values.shape[0] != n:
            raise ValueError(f"{n} keys, {blocks.shape[0]} counts, {values.shape[0]} values")
        with nogil:
            for i in range(n):
                self.add_one(keys[i], blocks[i], values[i], 0)

    cdef void add_one(self, uint64_t key, uint32_t blocks, double value, uint32_t mark) noexcept nogil:
        cdef uint64_t at = self.find(key)
        cdef Ghost *ghost
        if self.at_place(at) != NULL:
            self.remove(at)
            at = self.find(key)
        if self.last - self.first == self.size:
            self.drop_first()
            at = self.find(key)
        ghost = &self.ring[self.last & (self.size - 1)]
        ghost.key, ghost.value, ghost.blocks, ghost.mark = key, value, max(1, blocks), mark
        self.table.numbers[at] = <int32_t>((self.last & (self.size - 1)) + 1)
        self.last += 1
        self.num_blocks += ghost.blocks

    def take(self, const uint64_t[:] keys not None):
        """(n,) float64: the value of each key, which is no longer here then; nan where it was not."""
        cdef Py_ssize_t i, n = keys.shape[0]
        cdef uint64_t at
        out = np.full(n, np.nan)
        cdef double[::1] values = out
        with nogil:
            for i in range(n):
                at = self.find(keys[i])
                if self.at_place(at) != NULL:
                    values[i] = self.at_place(at).value
            for i in range(n):                         # after all: a key may be asked for twice
                at = self.find(keys[i])
                if self.at_place(at) != NULL:
                    self.remove(at)
        return out

    def trim(self, int64_t max_blocks):
        """Drop the oldest until there are ``max_blocks`` blocks or fewer."""
        with nogil:
            while self.num_blocks > max(max_blocks, <int64_t>0):
                self.drop_first()
