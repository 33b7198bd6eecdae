"""Eviction of blocks from the tree: by priority, by age, or of all blocks."""
import numpy as np

cimport cython
from libc.math cimport INFINITY, nextafter
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from flexkv._core.buffers cimport data_of
from flexkv._core.index.checks cimport FLEXKV_CHECKS
from flexkv._core.index.node cimport Node
from flexkv._core.index.nodes cimport HAS_HOLE, MISS_EVICTED, MISS_EXPIRED, NodeStore
from flexkv._core.index.eviction_queues cimport Heap, TierQueues, configure_queues, move_to_queue, settle

cdef enum:
    ROOT = 0
    NONE = -1
    MAX_SPARED = 1 << 16               # by one call
    MAX_LOOKED = 1 << 14               # nodes that one search for blocks out of reach looks at

PIECE_DTYPE = np.dtype(
    [("first_key", "u8"), ("priority", "f8"), ("mark", "u4"), ("blocks", "u4"), ("node", "i4"), ("queue", "u1")],
    align=True,
)

assert PIECE_DTYPE.itemsize == sizeof(Piece)

INT32 = np.dtype(np.int32)


cdef class Pieces:
    """A list of evicted pieces. Consecutive pieces of one node are merged into one."""

    def __dealloc__(self):
        free(self.items)

    def __len__(self):
        return self.size

    def array(self):
        """(n,) of ``PIECE_DTYPE``: a copy."""
        pieces = np.empty(self.size, PIECE_DTYPE)
        if self.size:
            memcpy(data_of(pieces, True), self.items, self.size * sizeof(Piece))
        return pieces

    cdef int reserve(self, Py_ssize_t more) except -1:
        cdef Piece *items
        if self.size + more > self.capacity:
            items = <Piece *>realloc(self.items, sizeof(Piece) * <size_t>(self.size + more))
            if items == NULL:
                raise MemoryError("no memory for the list of evicted blocks")
            self.items, self.capacity = items, self.size + more
        return 0

    cdef void add(self, const Piece *piece) noexcept nogil:
        """Append a piece; ``reserve`` has made room for it."""
        cdef uint32_t before = 0
        if self.size and self.items[self.size - 1].node == piece.node:
            self.size -= 1
            before = self.items[self.size].blocks
        self.items[self.size] = piece[0]
        self.items[self.size].blocks += before
        self.size += 1


@cython.no_gc                          # it refers to nothing that could refer to it
cdef class Evictor:
    """Frees slots of the nodes of a store, by priority, by age, or all. The caller locks. ``RadixTree`` documents the
    methods of the same name."""

    def __cinit__(self, NodeStore store not None):
        self.store = store
        self.num_tenants = 1

    def __dealloc__(self):
        free(self.ttl)

    cdef int configure(self, num_queues, ttl_s) except -1:
        cdef Py_ssize_t i
        if len(num_queues) != self.store.num_tiers or len(ttl_s) < self.num_tenants:
            raise ValueError(f"{len(num_queues)} tiers, {len(ttl_s)} tenants: there are {self.store.num_tiers}, "
                             f"{self.num_tenants}")
        for i in range(self.store.num_tiers):
            configure_queues(&self.store.queues[i], <int>len(ttl_s), num_queues[i])
        cdef double *ttl = <double *>realloc(self.ttl, sizeof(double) * len(ttl_s))
        if ttl == NULL:
            raise MemoryError("no memory for the index")
        self.ttl, self.num_tenants = ttl, <int>len(ttl_s)
        for i in range(self.num_tenants):
            ttl[i] = ttl_s[i]
        return 0

    cdef inline double expires_at(self, Node *p, int tenant) noexcept nogil:
        """``tenant``: the tenant that asks; if the node is another tenant's, the shorter time counts. -1: no tenant."""
        if self.ttl == NULL or p.pins:
            return INFINITY
        cdef double ttl_s = self.ttl[p.tenant]
        if tenant >= 0:
            ttl_s = min(ttl_s, self.ttl[tenant])
        return p.last_access + ttl_s

    cdef object discard(self, int tier):
        cdef NodeStore store = self.store
        store.check_tier(tier)
        out_array = np.empty(store.num_blocks + 1, dtype=np.int32)
        cdef int32_t[::1] out = out_array
        cdef Py_ssize_t count = 0, before = -1
        cdef int64_t first
        cdef int32_t node
        with nogil:
            while count > before:
                before = count
                for node in range(1, store.used_nodes):
                    if store.nodes[node].ready[tier] and store.nodes[node].live_children[tier] == 0:
                        count += self.take_from_end(node, tier, store.num_blocks, &out[count], MISS_EVICTED,
                                                    &first)
                        store.prune(node)
        if FLEXKV_CHECKS:
            store.check_integrity()
        return out_array[:count]

    cdef Py_ssize_t take_from_end(self, int32_t node, int tier, Py_ssize_t want, int32_t *out,
                                  uint32_t why, int64_t *first) noexcept nogil:
        """Free slots of a node from its end on, as far as no block is in use; returns how many. ``first``: the
        first block that lost its slot."""
        cdef Node *p = &self.store.nodes[node]
        cdef int64_t i = <int64_t>p.length - 1
        cdef Py_ssize_t count = 0
        cdef bint any_absent = False
        while i >= 0 and count < want and p.resident[tier]:
            if self.store.slots_of(p, tier)[i] >= 0:
                if self.store.references_of(p)[i] > 0 or not self.store.state_of(p)[i] >> tier & 1:
                    break
                out[count] = self.store.slots_of(p, tier)[i]
                count += 1
                first[0] = i
                self.store.clear_slot(node, <uint32_t>i, tier)
                if self.store.state_of(p)[i] == 0:
                    any_absent = True
                    self.store.forget(p.keys + 2 * i, why)
            i -= 1
        if any_absent and self.is_elsewhere(p, tier):
            self.store.note_hole(node)
        return count

    cdef inline bint is_elsewhere(self, Node *p, int tier) noexcept nogil:
        """Whether other tiers have anything of a node, or below it."""
        cdef int t
        for t in range(self.store.num_tiers):
            if t != tier and (p.resident[t] or p.live_children[t]):
                return True
        return False

    cdef object evict(self, int tier, int tenant, int queue, Py_ssize_t want, double now, int64_t leave, int spare_to,
                      uint32_t why, double below, Pieces pieces):
        self.store.check_tier(tier)
        cdef TierQueues *queues = &self.store.queues[tier]
        if not 0 <= tenant < self.num_tenants or not 0 <= queue < queues.num_queues or spare_to >= queues.num_queues:
            raise ValueError(f"tenant {tenant}, queue {queue}, spare to {spare_to}: {self.num_tenants} tenants "
                             f"of {queues.num_queues} queues")
        want = max(min(want, self.store.num_blocks), 0)
        out_array = np.empty(want, INT32)
        if want == 0:
            return out_array
        cdef bint is_listed = pieces is not None
        if is_listed:
            pieces.reserve(want)
        cdef int32_t *out = <int32_t *>data_of(out_array, True)
        cdef Piece piece
        cdef Py_ssize_t count = 0, spared = 0
        cdef int num_active = queues.num_active[tenant]
        cdef Heap *heap = &queues.heaps[tenant * queues.num_queues + queue]
        with nogil:
            self.store.tick(now)
            while count < want and heap.size and heap.entries[0].priority < below and heap.blocks > leave and (
                    spared < MAX_SPARED) and queues.num_active[tenant] <= num_active:
                if self.spare(heap.entries[0].node, queues, spare_to, now):
                    spared += 1
                    continue
                if self.evict_node(heap.entries[0].node, tier, min(want, count + heap.blocks - leave), out,
                                   &count, &piece, why) and is_listed:
                    pieces.add(&piece)
        if FLEXKV_CHECKS:
            self.store.check_integrity()
        return out_array[:count]

    cdef bint is_in_use(self, Node *p, int tier) noexcept nogil:
        """Whether the last block that a node has on the tier is in use or being written."""
        cdef int64_t i = <int64_t>p.length - 1
        while self.store.slots_of(p, tier)[i] < 0:
            i -= 1
        return self.store.references_of(p)[i] > 0 or not self.store.state_of(p)[i] >> tier & 1

    cdef bint spare(self, int32_t node, TierQueues *queues, int spare_to, double now) noexcept nogil:
        cdef Node *p = &self.store.nodes[node]
        cdef int t = queues.tier
        if spare_to < 0 or p.lives[t] == 0 or self.is_in_use(p, t):
            return False
        p.lives[t] = p.lives[t] - 1 if p.queue[t] == spare_to else 0
        queues.latest = max(now, nextafter(queues.latest, INFINITY))     # behind others of this time
        p.priority[t] = queues.latest
        move_to_queue(queues, node, <uint8_t>spare_to)
        settle(queues, node)
        return True

    cdef bint evict_node(self, int32_t node, int tier, Py_ssize_t want, int32_t *out, Py_ssize_t *count,
                         Piece *piece, uint32_t why) noexcept nogil:
        """Evict blocks of a node; returns whether any block was evicted."""
        cdef Node *p = &self.store.nodes[node]
        cdef int64_t first = 0
        piece.node, piece.priority, piece.mark, piece.queue = node, p.priority[tier], p.mark[tier], p.queue[tier]
        piece.blocks = <uint32_t>self.take_from_end(node, tier, want - count[0], out + count[0], why, &first)
        piece.first_key = p.keys[2 * first]
        count[0] += piece.blocks
        if p.ready[tier] and count[0] < want:           # its last block is in use
            p.parked |= 1 << tier
            settle(&self.store.queues[tier], node)
        cdef bint went = piece.blocks > 0
        self.store.prune(node)
        return went

    # ---- unreachable blocks ------------------------------------------------------------------------------------

    cdef object reclaim(self, int tier, Py_ssize_t want, int tenant):
        cdef NodeStore store = self.store
        store.check_tier(tier)
        want = max(min(want, store.num_blocks), 0)
        out_array = np.empty(want, INT32)
        if want == 0 or store.num_holes == 0:
            return out_array[:0]
        cdef int32_t *out = <int32_t *>data_of(out_array, True)
        cdef Py_ssize_t count = 0, looked = 0, tries = store.num_holes, before
        cdef int32_t node
        cdef uint32_t at
        with nogil:
            while tries > 0 and store.num_holes > 0 and looked < MAX_LOOKED and count < want:
                tries -= 1
                store.hole_hand %= store.num_holes
                node = store.holes[store.hole_hand]
                at = self.first_hole(&store.nodes[node])
                if at < store.nodes[node].length:
                    before = store.num_holes
                    self.free_behind(node, at, tier, want, tenant, out, &count, &looked)
                    tries += store.num_holes - before    # each freed block is a hole: they may take this place
                if self.first_hole(&store.nodes[node]) == store.nodes[node].length:        # free, or filled again
                    store.nodes[node].changed &= ~HAS_HOLE
                    store.num_holes -= 1
                    store.holes[store.hole_hand] = store.holes[store.num_holes]
                else:
                    store.hole_hand += 1
        if FLEXKV_CHECKS:
            store.check_integrity()
        return out_array[:count]

    cdef uint32_t first_hole(self, Node *p) noexcept nogil:
        """The first block of a node that is on no tier; its length, if there is none."""
        cdef uint32_t i
        for i in range(p.length):
            if self.store.is_absent(p, i):
                return i
        return p.length

    cdef void free_behind(self, int32_t node, uint32_t at, int tier, Py_ssize_t want, int tenant, int32_t *out,
                          Py_ssize_t *count, Py_ssize_t *looked) noexcept nogil:
        """Free slots of a node behind block ``at``, and of all nodes below it, children before parents."""
        cdef int32_t here = self.deepest(node), after
        while here != node and count[0] < want and looked[0] < MAX_LOOKED:
            looked[0] += 1
            after = self.store.nodes[here].next_sibling
            after = self.store.nodes[here].parent if after == NONE else self.deepest(after)
            self.free_blocks(here, 0, tier, want, tenant, out, count)
            if self.store.nodes[here].first_child == NONE:
                self.store.trim(here)
            here = after
        looked[0] += 1
        if here == node:
            self.free_blocks(node, at + 1, tier, want, tenant, out, count)
        self.store.prune(here)

    cdef int32_t deepest(self, int32_t node) noexcept nogil:
        while self.store.nodes[node].first_child != NONE:
            node = self.store.nodes[node].first_child
        return node

    cdef void free_blocks(self, int32_t node, uint32_t start, int tier, Py_ssize_t want, int tenant, int32_t *out,
                          Py_ssize_t *count) noexcept nogil:
        """Free slots of blocks from ``start`` on that are ready and not in use. Each freed block is a hole in front of
        the blocks that stay behind it, because an earlier hole may be filled again first."""
        cdef Node *p = &self.store.nodes[node]
        cdef uint32_t i
        if tenant >= 0 and p.tenant != tenant:
            return
        for i in range(start, p.length):
            if count[0] == want or p.ready[tier] == 0:
                break
            if self.store.state_of(p)[i] >> tier & 1 and self.store.references_of(p)[i] == 0:
                out[count[0]] = self.store.slots_of(p, tier)[i]
                count[0] += 1
                self.store.clear_slot(node, i, tier)
                if self.store.is_absent(p, i):
                    self.store.forget(p.keys + 2 * <size_t>i, MISS_EVICTED)
                    self.store.note_hole(node)

    cdef object withdraw(self, int tier, Py_ssize_t bound, Py_ssize_t num_nodes, Py_ssize_t want):
        cdef NodeStore store = self.store
        store.check_tier(tier)
        want = max(min(want, store.num_blocks), 0)
        out_array = np.empty(want, INT32)
        if want == 0:
            return out_array
        cdef int32_t *out = <int32_t *>data_of(out_array, True)
        cdef Py_ssize_t count = 0
        with nogil:
            for _ in range(min(num_nodes, <Py_ssize_t>store.used_nodes)):
                if count == want:
                    break
                self.withdraw_hand = (self.withdraw_hand + 1) % store.used_nodes
                if store.nodes[self.withdraw_hand].ready[tier]:
                    self.free_slots_from(self.withdraw_hand, tier, bound, want, out, &count)
                    store.prune(self.withdraw_hand)
            if count == want and self.withdraw_hand:       # more of this node may be left
                self.withdraw_hand -= 1
        if FLEXKV_CHECKS:
            store.check_integrity()
        return out_array[:count]

    cdef void free_slots_from(self, int32_t node, int tier, Py_ssize_t bound, Py_ssize_t want, int32_t *out,
                              Py_ssize_t *count) noexcept nogil:
        """Free slots of a node from slot ``bound`` on whose blocks are ready and not in use."""
        cdef Node *p = &self.store.nodes[node]
        cdef int32_t *slots = self.store.slots_of(p, tier)
        cdef bint any_absent = False
        cdef uint32_t i
        for i in range(p.length):
            if count[0] == want:
                break
            if slots[i] >= bound and self.store.state_of(p)[i] >> tier & 1 and self.store.references_of(p)[i] == 0:
                out[count[0]] = slots[i]
                count[0] += 1
                self.store.clear_slot(node, i, tier)
                if self.store.is_absent(p, i):
                    any_absent = True
                    self.store.forget(p.keys + 2 * <size_t>i, MISS_EVICTED)
        if any_absent:
            self.store.note_hole(node)

    cdef object expire(self, int tier, double now, Py_ssize_t num_nodes, Py_ssize_t want):
        cdef NodeStore store = self.store
        store.check_tier(tier)
        cdef Py_ssize_t count = 0, limit = min(want, store.num_blocks)
        out_array = np.empty(limit + 1, dtype=np.int32)
        cdef int32_t[::1] out = out_array
        cdef int64_t first
        cdef Node *p
        with nogil:
            store.tick(now)
            for _ in range(min(num_nodes, <Py_ssize_t>store.used_nodes)):
                self.hand[tier] = (self.hand[tier] + 1) % store.used_nodes
                p = &store.nodes[self.hand[tier]]
                if count < limit and p.ready[tier] and p.live_children[tier] == 0 and self.expires_at(p, -1) < now:
                    count += self.take_from_end(self.hand[tier], tier, limit - count, &out[count], MISS_EXPIRED, &first)
                    store.prune(self.hand[tier])
        if FLEXKV_CHECKS:
            store.check_integrity()
        return out_array[:count]
