cimport cython
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from flexkv._core.index.eviction cimport Evictor
from flexkv._core.index.nodes cimport NodeStore


@cython.final
cdef class RadixTree:
    cdef NodeStore store
    cdef Evictor evictor
    cdef list queues                  # EvictionQueues of each tier

    cdef uint32_t match_ready(self, const uint64_t *keys, Py_ssize_t n, double now, int tenant, int32_t *slots,
                              int8_t *tiers, Py_ssize_t *num_ready) noexcept nogil
    cdef void fill(self, const uint64_t *keys, Py_ssize_t n, const int32_t *slots, int tier) noexcept nogil
    cdef Py_ssize_t finish(self, const uint64_t[:, ::1] keys, const int32_t[::1] slots, int tier, bint ready,
                           uint32_t why) except -1
    cdef int add_references(self, const uint64_t[:, ::1] keys, Py_ssize_t start, Py_ssize_t stop, int delta) except -1
    cdef Py_ssize_t add_pins(self, const uint64_t[:, ::1] keys, int delta) noexcept nogil
