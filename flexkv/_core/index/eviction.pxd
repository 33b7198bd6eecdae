cimport cython
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t

from flexkv._core.index.node cimport MAX_TIERS, Node
from flexkv._core.index.nodes cimport NodeStore
from flexkv._core.index.eviction_queues cimport TierQueues

# Mirrored field by field by PIECE_DTYPE in eviction.pyx.
cdef struct Piece:
    uint64_t first_key
    double priority
    uint32_t mark
    uint32_t blocks
    int32_t node
    uint8_t queue


cdef class Pieces:
    cdef Piece *items
    cdef Py_ssize_t size
    cdef Py_ssize_t capacity

    cdef int reserve(self, Py_ssize_t more) except -1
    cdef void add(self, const Piece *piece) noexcept nogil


@cython.final
cdef class Evictor:
    cdef NodeStore store
    cdef double *ttl                  # seconds, of each tenant; NULL: none expires
    cdef int num_tenants
    cdef int32_t hand[MAX_TIERS]      # the node that ``expire`` looked at last
    cdef int32_t withdraw_hand        # the same, of ``withdraw``

    cdef int configure(self, num_queues, ttl_s) except -1
    cdef object evict(self, int tier, int tenant, int queue, Py_ssize_t want, double now, int64_t leave, int spare_to,
                      uint32_t why, double below, Pieces pieces)
    cdef object reclaim(self, int tier, Py_ssize_t want, int tenant)
    cdef object expire(self, int tier, double now, Py_ssize_t num_nodes, Py_ssize_t want)
    cdef object withdraw(self, int tier, Py_ssize_t bound, Py_ssize_t num_nodes, Py_ssize_t want)
    cdef void free_slots_from(self, int32_t node, int tier, Py_ssize_t bound, Py_ssize_t want, int32_t *out,
                              Py_ssize_t *count) noexcept nogil
    cdef object discard(self, int tier)
    cdef double expires_at(self, Node *p, int tenant) noexcept nogil
    cdef Py_ssize_t take_from_end(self, int32_t node, int tier, Py_ssize_t want, int32_t *out, uint32_t why,
                                  int64_t *first) noexcept nogil
    cdef bint is_elsewhere(self, Node *p, int tier) noexcept nogil
    cdef uint32_t first_hole(self, Node *p) noexcept nogil
    cdef void free_behind(self, int32_t node, uint32_t at, int tier, Py_ssize_t want, int tenant, int32_t *out,
                          Py_ssize_t *count, Py_ssize_t *looked) noexcept nogil
    cdef int32_t deepest(self, int32_t node) noexcept nogil
    cdef void free_blocks(self, int32_t node, uint32_t start, int tier, Py_ssize_t want, int tenant, int32_t *out,
                          Py_ssize_t *count) noexcept nogil
    cdef bint is_in_use(self, Node *p, int tier) noexcept nogil
    cdef bint spare(self, int32_t node, TierQueues *queues, int spare_to, double now) noexcept nogil
    cdef bint evict_node(self, int32_t node, int tier, Py_ssize_t want, int32_t *out, Py_ssize_t *count,
                         Piece *piece, uint32_t why) noexcept nogil
