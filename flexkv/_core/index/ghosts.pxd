from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from flexkv._core.arena cimport Arena
from flexkv._core.index.key_table cimport KeyTable

cdef struct Ghost:
    uint64_t key
    double value
    uint32_t blocks                    # 0: has been taken
    uint32_t mark


cdef class Ghosts:
    cdef readonly int64_t num_blocks
    cdef Py_ssize_t size               # of the ring, and (twice that) of the table; a power of two
    cdef Arena ring_arena
    cdef Arena table_arena
    cdef Ghost *ring
    cdef KeyTable table                # from a key to its place in the ring + 1
    cdef int64_t first
    cdef int64_t last

    cdef uint64_t find(self, uint64_t key) noexcept nogil
    cdef Ghost *at_place(self, uint64_t place) noexcept nogil
    cdef void remove(self, uint64_t place) noexcept nogil
    cdef void drop_first(self) noexcept nogil
    cdef void add_one(self, uint64_t key, uint32_t blocks, double value, uint32_t mark) noexcept nogil
