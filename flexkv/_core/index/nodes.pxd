cimport cython
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from flexkv._core.arena cimport Arena
from flexkv._core.index.node cimport MAX_TIERS, Node
from flexkv._core.index.eviction_queues cimport TierQueues
from flexkv._core.index.key_table cimport KeyTable

# Why a match stops. From MISS_EVICTED on the reason is recorded when the block is removed.
cdef enum:
    FULL_HIT = 0
    MISS_NOT_READY = 1
    MISS_NEVER_SEEN = 2
    MISS_EVICTED = 3
    MISS_FAILED = 4
    MISS_EXPIRED = 5
    MISS_OVER_QUOTA = 6
    MISS_NOT_ADMITTED = 7

# In Node.changed, beside the bits of the tiers: the number of the node is in the list of holes, also once it is free.
cdef enum:
    HAS_HOLE = 128

cdef struct Forgotten:                # 64 bits: the record of a block that is not in the tree
    uint32_t fingerprint              # of its key
    uint32_t reason                   # MISS_*, in the lowest 4 bits; above it seconds since the tree was made


@cython.final
cdef class NodeStore:
    cdef int num_tiers
    cdef Py_ssize_t max_blocks
    cdef Py_ssize_t num_blocks
    cdef Py_ssize_t num_nodes
    cdef Arena arena
    cdef Arena forgotten_arena
    cdef Node *nodes
    cdef Forgotten *forgotten
    cdef double began                 # the time of the first recorded reason, in seconds
    cdef double latest                # the last one
    cdef uint64_t forgotten_mask
    cdef size_t forgotten_present     # bytes of it that were made present
    cdef int32_t max_nodes
    cdef int32_t used_nodes
    cdef int32_t free_node
    cdef KeyTable table               # from the first key of a node to its number; the root is not in it
    cdef Py_ssize_t block_storage     # blocks allocated in all nodes
    cdef Py_ssize_t most_storage      # the most blocks that were allocated at any time
    cdef Arena holes_arena
    cdef int32_t *holes               # nodes of which a block may have left all tiers, with blocks behind it
    cdef Py_ssize_t num_holes
    cdef Py_ssize_t hole_hand         # where the next search among them starts
    cdef Arena changed_arena
    cdef TierQueues[MAX_TIERS] queues

    cdef inline int32_t *slots_of(self, Node *node, int tier) noexcept nogil:
        return <int32_t *>(node.keys + 2 * <size_t>node.capacity) + <size_t>tier * node.capacity

    cdef inline uint32_t *references_of(self, Node *node) noexcept nogil:
        return <uint32_t *>self.slots_of(node, self.num_tiers)

    cdef inline uint8_t *state_of(self, Node *node) noexcept nogil:
        """Bit t: ready on tier t."""
        return <uint8_t *>(self.references_of(node) + node.capacity)

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
    cdef void change(self, int32_t node, int tier, bint is_new) noexcept nogil
    cdef void set_tenant(self, int32_t node, uint16_t tenant) noexcept nogil
    cdef int check_tier(self, int tier) except -1
    cdef void went_live(self, int32_t node, int tier) noexcept nogil
    cdef void went_dead(self, int32_t node, int tier) noexcept nogil
    cdef void set_slot(self, int32_t node, uint32_t i, int tier, int32_t slot) noexcept nogil
    cdef void clear_slot(self, int32_t node, uint32_t i, int tier) noexcept nogil
    cdef Py_ssize_t mark_ready(self, int32_t node, Py_ssize_t m, const int32_t *slots, int tier) noexcept nogil
    cdef Py_ssize_t mark_absent(self, int32_t node, Py_ssize_t m, const int32_t *slots, int tier,
                                uint32_t why) noexcept nogil
    cdef int split(self, int32_t node, uint32_t at) except -1 nogil
    cdef int32_t grow_leaf(self, int32_t node, uint32_t extra) except -1 nogil
    cdef int append(self, int32_t last, const uint64_t *keys, const int32_t *slots, Py_ssize_t count, int tier,
                    double now, uint16_t tenant) except -1 nogil
    cdef void note_hole(self, int32_t node) noexcept nogil
    cdef bint is_absent(self, Node *p, uint32_t i) noexcept nogil
    cdef bint trim(self, int32_t node) noexcept nogil
    cdef void prune(self, int32_t node) noexcept nogil
    cdef list check_integrity(self)
    cdef int check_node(self, int32_t node, list held) except -1
    cdef void forget(self, const uint64_t *key, uint32_t why) noexcept nogil
    cdef uint32_t recall(self, const uint64_t *key) noexcept nogil
    cdef void prepare_to_forget(self) noexcept nogil
    cdef void tick(self, double now) noexcept nogil
