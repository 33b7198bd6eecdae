from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

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


cdef struct TierQueues:               # the eviction queues of one tier
    Node *nodes
    int tier
    uint8_t bit                       # 1 << tier
    int num_queues
    int num_heaps                     # one for each queue of each tenant
    Heap *heaps
    int *num_active                   # of each tenant: queues that have an evictable node
    int32_t *changed                  # nodes that are listed for the policy
    int32_t num_changed
    uint32_t order
    double latest                     # priority of the node that was spared last

cdef int configure_queues(TierQueues *q, int num_tenants, int num_queues) except -1
cdef void free_queues(TierQueues *q) noexcept nogil
cdef void list_change(TierQueues *q, int32_t node, bint is_new) noexcept nogil
cdef void settle(TierQueues *q, int32_t node) noexcept nogil
cdef void remove_from_heap(TierQueues *q, int32_t node) noexcept nogil
cdef void unpark(TierQueues *q, int32_t node) noexcept nogil
cdef void move_to_queue(TierQueues *q, int32_t node, uint8_t queue) noexcept nogil
cdef void split_entry(TierQueues *q, int32_t head, int32_t tail) noexcept nogil
cdef int check_queues(TierQueues *q, Py_ssize_t num_nodes) except -1


cdef inline Heap *heap_of(TierQueues *q, Node *p) noexcept nogil:
    return &q.heaps[p.tenant * q.num_queues + p.queue[q.tier]]


cdef inline void count_blocks(TierQueues *q, Node *p, int64_t blocks) noexcept nogil:
    """Add ``blocks`` to the count of the node's queue; a negative number for blocks that leave the tier."""
    heap_of(q, p).blocks += blocks


cdef class EvictionQueues:
    cdef TierQueues *q
    cdef object owner                 # of the memory of ``q``
    cdef object few_events            # array that ``drain`` gives out again and again

    @staticmethod
    cdef EvictionQueues of(TierQueues *q, object owner)
