from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from flexkv._core.arena cimport Arena
from flexkv._core.index.node cimport MAX_TIERS, Node

# Mirrored field by field by EVENT_DTYPE in eviction_queues.pyx.
cdef struct Event:
    uint64_t first_key
    double last_access
    double priority
    int32_t node
    uint32_t hits
    uint32_t new_hits
    uint32_t depth
    uint32_t length
    uint32_t children
    uint32_t mark
    uint16_t tenant
    uint8_t queue
    uint8_t lives
    uint8_t is_new
    uint8_t has_copy

# Mirrored by RETURN_DTYPE.
cdef struct Return:
    double value
    uint32_t event
    uint32_t mark
    uint32_t blocks

cdef struct Entry:
    double priority
    uint32_t order                    # of equal priorities, the node that came first is evicted first
    int32_t node

cdef struct Heap:
    Entry *entries
    int32_t size
    int32_t capacity
    int64_t blocks                    # of all nodes of this queue, also of those that cannot be evicted


cdef class EvictionQueues:
    cdef Node *nodes
    cdef int tier
    cdef uint8_t bit
    cdef int num_queues
    cdef int num_heaps
    cdef Heap *heaps
    cdef int *num_active              # of each tenant: queues that have an evictable node
    cdef Arena changed_arena
    cdef int32_t *changed
    cdef int32_t num_changed
    cdef object few_events            # array that ``drain`` gives out again and again
    cdef uint32_t order
    cdef double latest                # priority of the node that was spared last

    cdef void bind(self, Node *nodes, int tier, int32_t max_nodes)
    cdef int configure(self, int num_tenants, int num_queues) except -1
    cdef Heap *heap_of(self, Node *p) noexcept nogil
    cdef void count(self, Node *p, int64_t blocks) noexcept nogil
    cdef void change(self, int32_t node, bint is_new) noexcept nogil
    cdef void settle(self, int32_t node) noexcept nogil
    cdef void remove(self, int32_t node) noexcept nogil
    cdef void move(self, int32_t node, uint8_t queue) noexcept nogil
    cdef void split(self, int32_t head, int32_t tail) noexcept nogil
    cdef void up(self, Heap *heap, int32_t at, Entry entry) noexcept nogil
    cdef void down(self, Heap *heap, int32_t at, Entry entry) noexcept nogil
