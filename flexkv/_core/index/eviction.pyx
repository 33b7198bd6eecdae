"""Eviction of blocks from the tree: by priority, by age, or of all blocks."""
import numpy as np

from libc.math cimport INFINITY, nextafter
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from flexkv._core.buffers cimport data_of
from flexkv._core.index.checks cimport FLEXKV_CHECKS
from flexkv._core.index.node cimport Node
from flexkv._core.index.nodes cimport HAS_HOLE, MISS_EVICTED, MISS_EXPIRED, NodeStore
from flexkv._core.index.eviction_queues cimport (
    Heap, TierQueues, configure_queues, count_blocks, move_to_queue, remove_from_heap, settle,
)

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


cdef class EvictableNodes(NodeStore):
    """Nodes with a tenant and an age, which can be evicted; the caller locks."""

    def __cinit__(self, *args, **kwargs):
        self.num_tenants = 1

    def __dealloc__(self):
        free(self.ttl)

    def configure(self, num_queues, ttl_s=(INFINITY,)):
        """Queues of the policy of each tier, and seconds after its last use that a block of each tenant may be
        offered. Tenants can be added at any time; queues while the tier is empty."""
        cdef Py_ssize_t i
        if len(num_queues) != self.num_tiers or len(ttl_s) < self.num_tenants:
            raise ValueError(f"{len(num_queues)} tiers, {len(ttl_s)} tenants: there are {self.num_tiers}, "
                             f"{self.num_tenants}")
        for i in range(self.num_tiers):
            configure_queues(&self.queues[i], <int>len(ttl_s), num_queues[i])
        cdef double *ttl = <double *>realloc(self.ttl, sizeof(double) * len(ttl_s))
        if ttl == NULL:
            raise MemoryError("no memory for the index")
        self.ttl, self.num_tenants = ttl, <int>len(ttl_s)
        for i in range(self.num_tenants):
            ttl[i] = ttl_s[i]

    cdef inline double expires_at(self, Node *p, int tenant) noexcept nogil:
        """``tenant``: the tenant that asks; if the node is another tenant's, the shorter time counts. -1: no tenant."""
        if self.ttl == NULL or p.pins:
            return INFINITY
        cdef double ttl_s = self.ttl[p.tenant]
        if tenant >= 0:
            ttl_s = min(ttl_s, self.ttl[tenant])
        return p.last_access + ttl_s

    cdef void set_tenant(self, int32_t node, uint16_t tenant) noexcept nogil:
        """Move a node to another tenant."""
        cdef Node *p = &self.nodes[node]
        cdef int t
        for t in range(self.num_tiers):
            remove_from_heap(&self.queues[t], node)
            count_blocks(&self.queues[t], p, -<int64_t>p.resident[t])
        p.tenant = tenant
        for t in range(self.num_tiers):
            count_blocks(&self.queues[t], p, p.resident[t])
            settle(&self.queues[t], node)

    def discard(self, int tier):
        """Free all slots of ``tier`` but those of blocks that are in use or being written, and of blocks before them.
        For a tree that is out of use.

        Returns
        -------
        ndarray of int32
            The slots that are free now.
        """
        self.check_tier(tier)
        out_array = np.empty(self.num_blocks + 1, dtype=np.int32)
        cdef int32_t[::1] out = out_array
        cdef Py_ssize_t count = 0, before = -1
        cdef int64_t first
        cdef int32_t node
        with nogil:
            while count > before:
                before = count
                for node in range(1, self.used_nodes):
                    if self.nodes[node].ready[tier] and self.nodes[node].live_children[tier] == 0:
                        count += self.take_from_end(node, tier, self.num_blocks, &out[count], MISS_EVICTED,
                                                    &first)
                        self.prune(node)
        if FLEXKV_CHECKS:
            self.check_integrity()
        return out_array[:count]

    cdef Py_ssize_t take_from_end(self, int32_t node, int tier, Py_ssize_t want, int32_t *out,
                                  uint32_t why, int64_t *first) noexcept nogil:
        """Free slots of a node from its end on, as far as no block is in use; returns how many. ``first``: the
        first block that lost its slot."""
        cdef Node *p = &self.nodes[node]
        cdef int64_t i = <int64_t>p.length - 1
        cdef Py_ssize_t count = 0
        cdef bint any_absent = False
        while i >= 0 and count < want and p.resident[tier]:
            if self.slots_of(p, tier)[i] >= 0:
                if self.references_of(p)[i] > 0 or not self.state_of(p)[i] >> tier & 1:
                    break
                out[count] = self.slots_of(p, tier)[i]
                count += 1
                first[0] = i
                self.clear_slot(node, <uint32_t>i, tier)
                if self.state_of(p)[i] == 0:
                    any_absent = True
                    self.forget(p.keys + 2 * i, why)
            i -= 1
        if any_absent and self.is_elsewhere(p, tier):
            self.note_hole(node)
        return count

    cdef inline bint is_elsewhere(self, Node *p, int tier) noexcept nogil:
        """Whether other tiers have anything of a node, or below it."""
        cdef int t
        for t in range(self.num_tiers):
            if t != tier and (p.resident[t] or p.live_children[t]):
                return True
        return False

    def evict(self, int tier, int tenant, int queue, Py_ssize_t want, double now, int64_t leave=0,
              int spare_to=-1, uint32_t why=MISS_EVICTED, double below=INFINITY, Pieces pieces=None):
        """Free up to ``want`` slots of a queue of ``tier``, lowest priority first, each node from its end on.

        Blocks that are in use or being written stay, and so do the blocks before them.

        Parameters
        ----------
        now : float
            Seconds.
        leave : int
            Number of blocks that stay in the queue, whether they can be evicted or not.
        spare_to : int
            A queue: nodes that have lives left move to its end instead, with ``now`` as their priority. They lose a
            life if it is the same queue, and all if it is another.
        why : int
            The recorded reason for a later miss of the block: evicted or over quota.
        below : float
            Only nodes of a lower priority are evicted.
        pieces : Pieces, optional
            The evicted pieces are added to it.

        Returns
        -------
        ndarray of int32
            The slots that are free now. Fewer than wanted also when another queue, which had no evictable node,
            now has one: the policy must choose again.
        """
        self.check_tier(tier)
        cdef TierQueues *queues = &self.queues[tier]
        if not 0 <= tenant < self.num_tenants or not 0 <= queue < queues.num_queues or spare_to >= queues.num_queues:
            raise ValueError(f"tenant {tenant}, queue {queue}, spare to {spare_to}: {self.num_tenants} tenants "
                             f"of {queues.num_queues} queues")
        want = max(min(want, self.num_blocks), 0)
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
            self.tick(now)
            while count < want and heap.size and heap.entries[0].priority < below and heap.blocks > leave and (
                    spared < MAX_SPARED) and queues.num_active[tenant] <= num_active:
                if self.spare(heap.entries[0].node, queues, spare_to, now):
                    spared += 1
                    continue
                if self.evict_node(heap.entries[0].node, tier, min(want, count + heap.blocks - leave), out,
                                   &count, &piece, why) and is_listed:
                    pieces.add(&piece)
        if FLEXKV_CHECKS:
            self.check_integrity()
        return out_array[:count]

    cdef bint is_in_use(self, Node *p, int tier) noexcept nogil:
        """Whether the last block that a node has on the tier is in use or being written."""
        cdef int64_t i = <int64_t>p.length - 1
        while self.slots_of(p, tier)[i] < 0:
            i -= 1
        return self.references_of(p)[i] > 0 or not self.state_of(p)[i] >> tier & 1

    cdef bint spare(self, int32_t node, TierQueues *queues, int spare_to, double now) noexcept nogil:
        cdef Node *p = &self.nodes[node]
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
        cdef Node *p = &self.nodes[node]
        cdef int64_t first = 0
        piece.node, piece.priority, piece.mark, piece.queue = node, p.priority[tier], p.mark[tier], p.queue[tier]
        piece.blocks = <uint32_t>self.take_from_end(node, tier, want - count[0], out + count[0], why, &first)
        piece.first_key = p.keys[2 * first]
        count[0] += piece.blocks
        if p.ready[tier] and count[0] < want:           # its last block is in use
            p.parked |= 1 << tier
            settle(&self.queues[tier], node)
        cdef bint went = piece.blocks > 0
        self.prune(node)
        return went

    # ---- unreachable blocks ------------------------------------------------------------------------------------

    def reclaim(self, int tier, Py_ssize_t want, int tenant=-1):
        """Free up to ``want`` slots of ``tier`` whose blocks lie behind a block that is on no tier, so that no match
        reaches them; of ``tenant`` only, if it is not -1. Blocks that are in use or being written stay.

        Blocks that nothing needs any more leave the tree. One call looks at a bounded number of nodes; the next call
        continues from there.

        Returns
        -------
        ndarray of int32
            The slots that are free now.
        """
        self.check_tier(tier)
        want = max(min(want, self.num_blocks), 0)
        out_array = np.empty(want, INT32)
        if want == 0 or self.num_holes == 0:
            return out_array[:0]
        cdef int32_t *out = <int32_t *>data_of(out_array, True)
        cdef Py_ssize_t count = 0, looked = 0, tries = self.num_holes, before
        cdef int32_t node
        cdef uint32_t at
        with nogil:
            while tries > 0 and self.num_holes > 0 and looked < MAX_LOOKED and count < want:
                tries -= 1
                self.hole_hand %= self.num_holes
                node = self.holes[self.hole_hand]
                at = self.first_hole(&self.nodes[node])
                if at < self.nodes[node].length:
                    before = self.num_holes
                    self.free_behind(node, at, tier, want, tenant, out, &count, &looked)
                    tries += self.num_holes - before        # each freed block is a hole: they may take this place
                if self.first_hole(&self.nodes[node]) == self.nodes[node].length:       # free, or filled again
                    self.nodes[node].changed &= ~HAS_HOLE
                    self.num_holes -= 1
                    self.holes[self.hole_hand] = self.holes[self.num_holes]
                else:
                    self.hole_hand += 1
        if FLEXKV_CHECKS:
            self.check_integrity()
        return out_array[:count]

    cdef uint32_t first_hole(self, Node *p) noexcept nogil:
        """The first block of a node that is on no tier; its length, if there is none."""
        cdef uint32_t i
        for i in range(p.length):
            if self.is_absent(p, i):
                return i
        return p.length

    cdef void free_behind(self, int32_t node, uint32_t at, int tier, Py_ssize_t want, int tenant, int32_t *out,
                          Py_ssize_t *count, Py_ssize_t *looked) noexcept nogil:
        """Free slots of a node behind block ``at``, and of all nodes below it, children before parents."""
        cdef int32_t here = self.deepest(node), after
        while here != node and count[0] < want and looked[0] < MAX_LOOKED:
            looked[0] += 1
            after = self.nodes[here].next_sibling
            after = self.nodes[here].parent if after == NONE else self.deepest(after)
            self.free_blocks(here, 0, tier, want, tenant, out, count)
            if self.nodes[here].first_child == NONE:
                self.trim(here)
            here = after
        looked[0] += 1
        if here == node:
            self.free_blocks(node, at + 1, tier, want, tenant, out, count)
        self.prune(here)

    cdef int32_t deepest(self, int32_t node) noexcept nogil:
        while self.nodes[node].first_child != NONE:
            node = self.nodes[node].first_child
        return node

    cdef void free_blocks(self, int32_t node, uint32_t start, int tier, Py_ssize_t want, int tenant, int32_t *out,
                          Py_ssize_t *count) noexcept nogil:
        """Free slots of blocks from ``start`` on that are ready and not in use. Each freed block is a hole in front of
        the blocks that stay behind it, because an earlier hole may be filled again first."""
        cdef Node *p = &self.nodes[node]
        cdef uint32_t i
        if tenant >= 0 and p.tenant != tenant:
            return
        for i in range(start, p.length):
            if count[0] == want or p.ready[tier] == 0:
                break
            if self.state_of(p)[i] >> tier & 1 and self.references_of(p)[i] == 0:
                out[count[0]] = self.slots_of(p, tier)[i]
                count[0] += 1
                self.clear_slot(node, i, tier)
                if self.is_absent(p, i):
                    self.forget(p.keys + 2 * <size_t>i, MISS_EVICTED)
                    self.note_hole(node)

    def expire(self, int tier, double now, Py_ssize_t num_nodes, Py_ssize_t want=1 << 16):
        """Free slots of blocks that their tenant keeps no longer, looking at the next ``num_nodes`` nodes.

        Returns
        -------
        ndarray of int32
            The slots that are free now, ``want`` at most.
        """
        self.check_tier(tier)
        cdef Py_ssize_t count = 0, limit = min(want, self.num_blocks)
        out_array = np.empty(limit + 1, dtype=np.int32)
        cdef int32_t[::1] out = out_array
        cdef int64_t first
        cdef Node *p
        with nogil:
            self.tick(now)
            for _ in range(min(num_nodes, <Py_ssize_t>self.used_nodes)):
                self.hand[tier] = (self.hand[tier] + 1) % self.used_nodes
                p = &self.nodes[self.hand[tier]]
                if count < limit and p.ready[tier] and p.live_children[tier] == 0 and self.expires_at(p, -1) < now:
                    count += self.take_from_end(self.hand[tier], tier, limit - count, &out[count], MISS_EXPIRED, &first)
                    self.prune(self.hand[tier])
        if FLEXKV_CHECKS:
            self.check_integrity()
        return out_array[:count]
