from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from flexkv._core.arena cimport Arena

cdef enum:
    MAX_TIERS = 3

# Why a block that was once here is not; kept as two bits beside a 30-bit fingerprint of its key.
cdef enum:
    WHY_EVICTED = 1
    WHY_FAILED = 2

# Mirrored field by field by NODE_DTYPE in nodes.pyx.
cdef struct Node:
    uint64_t *keys                    # one allocation: keys, slots of each tier, pins, state
    double last_access
    double created
    int32_t parent
    int32_t first_child
    int32_t next_sibling              # of a free node: the next free node
    int32_t prev_sibling
    uint32_t length                   # blocks in the node; 0: root or free
    uint32_t capacity                 # blocks allocated
    uint32_t depth                    # blocks above the node
    uint32_t hits
    uint32_t pinned                   # blocks with at least one pin
    uint32_t resident[MAX_TIERS]      # blocks with a slot on the tier, ready or being written
    uint32_t ready[MAX_TIERS]
    uint32_t live_children[MAX_TIERS]  # children whose subtree holds anything on the tier


cdef class NodeStore:
    cdef readonly int num_tiers
    cdef readonly Py_ssize_t max_blocks
    cdef readonly Py_ssize_t num_blocks
    cdef readonly Py_ssize_t num_nodes
    cdef Arena arena
    cdef Arena forgotten_arena
    cdef Node *nodes
    cdef uint32_t *forgotten
    cdef uint64_t forgotten_mask
    cdef int32_t max_nodes
    cdef int32_t used_nodes
    cdef int32_t free_node
    cdef int32_t *table
    cdef uint64_t table_mask
    cdef Py_ssize_t block_storage     # blocks allocated in all nodes
    cdef uintptr_t present_end        # memory of the heap up to here was used before
    cdef object view

    cdef int32_t *slots_of(self, Node *node, int tier) noexcept nogil
    cdef uint16_t *pins_of(self, Node *node) noexcept nogil
    cdef uint8_t *state_of(self, Node *node) noexcept nogil
    cdef uint64_t *new_storage(self, uint32_t capacity) noexcept nogil
    cdef void copy_blocks(self, Node *dst, uint32_t dst_at, Node *src, uint32_t src_at, uint32_t count) noexcept nogil

    cdef int32_t find(self, const uint64_t *key) noexcept nogil
    cdef int table_add(self, int32_t extra) except -1 nogil
    cdef void table_put(self, int32_t node) noexcept nogil
    cdef void table_remove(self, int32_t node) noexcept nogil
    cdef int32_t new_node(self, uint32_t capacity) except -1 nogil
    cdef void free_node_at(self, int32_t node) noexcept nogil
    cdef void link(self, int32_t node, int32_t parent) noexcept nogil
    cdef void unlink(self, int32_t node) noexcept nogil

    cdef Py_ssize_t advance(self, const uint64_t *keys, Py_ssize_t n, Py_ssize_t pos, int32_t *node) noexcept nogil
    cdef void went_live(self, int32_t node, int tier) noexcept nogil
    cdef void went_dead(self, int32_t node, int tier) noexcept nogil
    cdef void set_slot(self, int32_t node, uint32_t i, int tier, int32_t slot) noexcept nogil
    cdef void clear_slot(self, int32_t node, uint32_t i, int tier) noexcept nogil
    cdef int split(self, int32_t node, uint32_t at) except -1 nogil
    cdef int32_t grow_leaf(self, int32_t node, uint32_t extra) except -1 nogil
    cdef int append(self, int32_t last, const uint64_t *keys, const int32_t *slots, Py_ssize_t count, int tier,
                    double now) except -1 nogil
    cdef void prune(self, int32_t node) noexcept nogil
    cdef int check_node(self, int32_t node, list held) except -1
    cdef void forget(self, const uint64_t *key, uint32_t why) noexcept nogil
    cdef uint32_t recall(self, const uint64_t *key) noexcept nogil
