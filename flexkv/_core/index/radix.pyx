"""The one index: a path-compressed radix tree over chained block keys that answers for every tier in one walk.

A key names a block *and its whole prefix*, so two facts keep the tree simple and fast. A node is found by the key of
its first block alone, in one hash table for the whole tree; and if block *i* of a sequence equals block *i* of a node,
all blocks before it do too, so the point where they part is found by bisection.

A node holds arrays: keys; for each tier the slot of each block (-1: absent); reference counts; ready bits. A block is
*absent*, *writing* (it has a slot) or *ready* on each tier. A block that is absent everywhere stays in the tree only
while something below it, or a reference to it, needs it.

No method locks: the caller holds one lock around all of them.
"""
import numpy as np

cimport cython
from libc.math cimport INFINITY, NAN
from libc.string cimport memcpy, memset

from flexkv._core.buffers cimport data_of
from flexkv._core.index.checks cimport FLEXKV_CHECKS
from flexkv._core.index.eviction cimport Evictor, Pieces
from flexkv._core.index.eviction_queues cimport EvictionQueues, unpark
from flexkv._core.index.node cimport Node
from flexkv._core.index.nodes cimport (
    FULL_HIT, MISS_EVICTED, MISS_EXPIRED, MISS_FAILED, MISS_NEVER_SEEN, MISS_NOT_READY, Forgotten, NodeStore,
)
from flexkv.errors import CapacityError, InvariantError

INT8, INT32 = np.dtype(np.int8), np.dtype(np.int32)      # an array is made sooner of a dtype than of its name

cdef enum:
    ROOT = 0

(REASON_FULL_HIT, REASON_NOT_READY, REASON_NEVER_SEEN, REASON_EVICTED, REASON_FAILED, REASON_EXPIRED,
 REASON_OVER_QUOTA, REASON_NOT_ADMITTED) = range(8)              # the numbers of nodes.pxd


cdef class Match:
    """The result of one walk over ``num_blocks`` keys.

    Attributes
    ----------
    num_ready : int
        Leading blocks that are ready on at least one tier.
    slots : ndarray of int32, shape (num_ready,)
        Slot of each block on its best (lowest-numbered) ready tier.
    tiers : ndarray of int8, shape (num_ready,)
        That tier.
    reason : int
        Why the match stops after ``num_ready`` blocks: one of ``REASON_*``.
    evicted_at : float
        Time in seconds when the block after them was removed; nan if it was not.
    """
    cdef readonly Py_ssize_t num_blocks, num_ready
    cdef readonly int reason
    cdef readonly double evicted_at
    cdef readonly object slots, tiers

    def __init__(self, Py_ssize_t num_blocks, Py_ssize_t num_ready, int reason, slots, tiers, double evicted_at=NAN):
        self.evicted_at = evicted_at
        self.num_blocks = num_blocks
        self.num_ready = num_ready
        self.reason = reason
        self.slots = slots
        self.tiers = tiers


def by_position(Py_ssize_t n, const int32_t[::1] blocks not None, const int32_t[::1] slots not None,
                const uint8_t[::1] chosen=None):
    """(n,) int32: the slots ((m,) int32) of blocks at these positions ((m,) int32), -1 elsewhere; of those ``chosen``
    ((m,) bool) alone, if it is given."""
    cdef Py_ssize_t i, m = blocks.shape[0]
    cdef bint all_of_them = chosen is None
    if slots.shape[0] != m or not (all_of_them or chosen.shape[0] == m):
        raise ValueError(f"{slots.shape[0]} slots for {m} blocks, or not as many to choose from")
    placed_array = np.empty(n, INT32)
    cdef int32_t *placed = <int32_t *>data_of(placed_array, True)
    memset(placed, 0xff, 4 * n)
    for i in range(m):
        if not 0 <= blocks[i] < n:
            raise ValueError(f"block {blocks[i]} of {n}")
        if all_of_them or chosen[i]:
            placed[blocks[i]] = slots[i]
    return placed_array


@cython.no_gc                          # it refers to nothing that could refer to it
cdef class RadixTree:
    """Radix tree of at most ``max_blocks`` blocks on ``num_tiers`` tiers (tier 0 is the fastest).

    ``keys`` arguments are C-contiguous ``uint64`` arrays of shape (n, 2), as the hashing module makes them.

    Raises
    ------
    CapacityError
        From ``insert`` and ``acquire``, when a fixed limit is reached; nothing has changed then.
    InvariantError
        A caller broke the contract of a method; nothing has changed then.
    """

    def __cinit__(self, Py_ssize_t max_blocks, int num_tiers=1):
        cdef int t
        self.store = NodeStore(max_blocks, num_tiers)
        self.evictor = Evictor(self.store)
        self.queues = [EvictionQueues.of(&self.store.queues[t], self.store) for t in range(num_tiers)]

    @property
    def num_tiers(self):
        return self.store.num_tiers

    @property
    def max_blocks(self):
        return self.store.max_blocks

    @property
    def num_blocks(self):
        return self.store.num_blocks

    @property
    def num_nodes(self):
        return self.store.num_nodes

    @property
    def num_holes(self):
        """Number of nodes listed for ``reclaim``: a block of them may have left all tiers, with blocks behind it."""
        return self.store.num_holes

    def configure(self, num_queues, ttl_s=(INFINITY,)):
        """Queues of the policy of each tier, and seconds after its last use that a block of each tenant may be
        offered. Tenants can be added at any time; queues while the tier is empty."""
        self.evictor.configure(num_queues, ttl_s)

    def eviction_queues(self, int tier):
        """The ``EvictionQueues`` of a tier: the order in which its blocks are evicted."""
        self.store.check_tier(tier)
        return self.queues[tier]

    def match(self, const uint64_t[:, ::1] keys not None, double now=-INFINITY, int tenant=-1):
        """Leading blocks of ``keys`` that are ready, the best source of each, and why the match stops there.

        ``now``: seconds; a block is not offered after the TTL of its own tenant or of ``tenant``, the tenant that asks
        (a block found on disk is another tenant's until it is used). Reads only: it changes, counts and evicts nothing.
        """
        if tenant >= self.evictor.num_tenants:
            raise ValueError(f"tenant {tenant}: there are {self.evictor.num_tenants}")
        cdef Py_ssize_t n = keys.shape[0], ready = 0
        cdef uint32_t reason
        slots_array, tiers_array = np.empty(n, INT32), np.empty(n, INT8)
        cdef int32_t *slots = <int32_t *>data_of(slots_array, True)
        cdef int8_t *tiers = <int8_t *>data_of(tiers_array, True)
        if n == 0:
            return Match(0, 0, FULL_HIT, slots_array, tiers_array)
        with nogil:
            reason = self.match_ready(&keys[0, 0], n, now, tenant, slots, tiers, &ready)
        evicted_at = self.store.began + (reason >> 4) if reason & 15 > MISS_NEVER_SEEN else NAN
        return Match(n, ready, reason & 15, slots_array[:ready], tiers_array[:ready], evicted_at)

    cdef uint32_t match_ready(self, const uint64_t *keys, Py_ssize_t n, double now, int tenant, int32_t *slots,
                              int8_t *tiers, Py_ssize_t *num_ready) noexcept nogil:
        """Returns why it stops, in the lowest 4 bits, and when that came to be."""
        cdef Py_ssize_t pos = 0, m, i
        cdef int32_t node = ROOT
        cdef Node *p
        cdef uint8_t *state
        cdef int t
        while pos < n:
            m = self.store.advance(keys, n, pos, &node)
            if m == 0:
                break
            p = &self.store.nodes[node]
            if self.evictor.expires_at(p, tenant) < now:
                num_ready[0] = pos
                return MISS_EXPIRED | <uint32_t>max(0.0, self.evictor.expires_at(p, tenant) - self.store.began) << 4
            if p.ready[0] == p.length:
                memcpy(slots + pos, self.store.slots_of(p, 0), 4 * m)
                memset(tiers + pos, 0, m)
            else:
                state = self.store.state_of(p)
                for i in range(m):
                    if state[i] == 0:
                        num_ready[0] = pos + i
                        for t in range(self.store.num_tiers):
                            if self.store.slots_of(p, t)[i] >= 0:
                                return MISS_NOT_READY
                        return self.store.recall(keys + 2 * (pos + i))
                    t = 0
                    while not state[i] >> t & 1:
                        t += 1
                    tiers[pos + i] = <int8_t>t
                    slots[pos + i] = self.store.slots_of(p, t)[i]
            pos += m
            if m < p.length:
                break
        num_ready[0] = pos
        return FULL_HIT if pos == n else self.store.recall(keys + 2 * pos)

    def absent(self, const uint64_t[:, ::1] keys not None):
        """Positions (int32, ascending) of the blocks that have a slot on no tier, neither ready nor being written."""
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m, i, count = 0
        cdef int32_t node = ROOT
        cdef Node *p
        cdef int t
        out_array = np.empty(n, INT32)
        cdef int32_t *out = <int32_t *>data_of(out_array, True)
        with nogil:
            while pos < n:
                m = self.store.advance(&keys[0, 0], n, pos, &node)
                if m == 0:
                    break
                p = &self.store.nodes[node]
                if p.resident[0] < p.length:
                    for i in range(m):
                        for t in range(self.store.num_tiers):
                            if self.store.slots_of(p, t)[i] >= 0:
                                break
                        else:
                            out[count] = <int32_t>(pos + i)
                            count += 1
                pos += m
                if m < p.length:
                    break
            for i in range(pos, n):
                out[count] = <int32_t>i
                count += 1
        return out_array[:count]

    def num_fitting(self, const uint64_t[:, ::1] keys not None):
        """How many leading blocks of ``keys`` are in the tree, or could be added to it."""
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m
        cdef int32_t node = ROOT
        with nogil:
            while pos < n:
                m = self.store.advance(&keys[0, 0], n, pos, &node)
                pos += m
                if m == 0 or m < self.store.nodes[node].length:
                    break
        return min(n, pos + max(self.store.max_blocks - self.store.num_blocks, 0))

    def slots(self, const uint64_t[:, ::1] keys not None, int tier):
        """(n,) int32: the slot of each block of ``keys`` on ``tier``, ready or being written; -1 where it has none."""
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m
        cdef int32_t node = ROOT
        self.store.check_tier(tier)
        out_array = np.full(n, -1, dtype=np.int32)
        cdef int32_t[::1] out = out_array
        with nogil:
            while pos < n:
                m = self.store.advance(&keys[0, 0], n, pos, &node)
                if m == 0:
                    break
                memcpy(&out[pos], self.store.slots_of(&self.store.nodes[node], tier), 4 * m)
                pos += m
                if m < self.store.nodes[node].length:
                    break
        return out_array

    def insert(self, const uint64_t[:, ::1] keys not None, const int32_t[::1] slots not None, int tier, double now,
               int tenant=0):
        """Give blocks slots on ``tier``, in state *writing*; blocks that the tree lacks are added.

        Parameters
        ----------
        keys : (n, 2) uint64
            From the first block of the sequence.
        slots : (n,) int32
            -1 leaves a block that is in the tree as it is.
        now : float
            Seconds, for the age of the added blocks.
        tenant : int
            Tenant of the added blocks.
        """
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m = 0, i
        cdef int32_t node = ROOT
        self.store.check_tier(tier)
        if slots.shape[0] != n:
            raise ValueError(f"{slots.shape[0]} slots for {n} keys")
        if not 0 <= tenant < self.evictor.num_tenants:
            raise ValueError(f"tenant {tenant}: there are {self.evictor.num_tenants}")
        cdef const int32_t *mine
        cdef int clash = 0
        if n == 0:
            return
        cdef const int32_t *wanted = &slots[0]
        with nogil:
            self.store.tick(now)
            while pos < n:
                m = self.store.advance(&keys[0, 0], n, pos, &node)
                if m == 0:
                    break
                mine = self.store.slots_of(&self.store.nodes[node], tier)
                for i in range(m):
                    clash |= (wanted[pos + i] >= 0) & (mine[i] >= 0)
                pos += m
                if m < self.store.nodes[node].length:
                    break
            for i in range(pos, n):
                clash |= wanted[i] < 0
        if clash:
            raise InvariantError("insert: a block has a slot on the tier already, or a new block got none")
        if self.store.num_blocks + n - pos > self.store.max_blocks:
            raise CapacityError(f"the index is full: {self.store.max_blocks} blocks")
        with nogil:
            if pos < n:
                if node != ROOT and m > 0 and m < self.store.nodes[node].length:
                    self.store.split(node, <uint32_t>m)
                    node = self.store.nodes[node].parent
                self.store.append(node, &keys[pos, 0], wanted + pos, n - pos, tier, now, <uint16_t>tenant)
            self.fill(&keys[0, 0], pos, wanted, tier)
        if FLEXKV_CHECKS:
            self.store.check_integrity()

    cdef void fill(self, const uint64_t *keys, Py_ssize_t n, const int32_t *slots, int tier) noexcept nogil:
        cdef Py_ssize_t pos = 0, m, i
        cdef int32_t node = ROOT
        while pos < n:
            m = self.store.advance(keys, n, pos, &node)
            for i in range(m):
                if slots[pos + i] >= 0:
                    self.store.set_slot(node, <uint32_t>i, tier, slots[pos + i])
            pos += m

    def set_ready(self, const uint64_t[:, ::1] keys not None, const int32_t[::1] slots not None, int tier):
        """Blocks whose write on ``tier`` into ``slots`` is complete become ready (-1: leave alone).

        Returns
        -------
        int
            Blocks made ready. A block that is not in the tree with that very slot, in state writing, is left alone.
        """
        return self.finish(keys, slots, tier, True, 0)

    def drop(self, const uint64_t[:, ::1] keys not None, const int32_t[::1] slots not None, int tier,
             bint failed=False):
        """Blocks that hold ``slots`` on ``tier`` (-1: leave alone) become absent there, whatever their state.

        ``failed`` is remembered as the reason. Returns the number of blocks dropped; the caller frees the slots.
        """
        return self.finish(keys, slots, tier, False, MISS_FAILED if failed else 0)

    cdef Py_ssize_t finish(self, const uint64_t[:, ::1] keys, const int32_t[::1] slots, int tier, bint ready,
                           uint32_t why) except -1:
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m, count = 0
        cdef int32_t node = ROOT, last = ROOT
        self.store.check_tier(tier)
        if slots.shape[0] != n:
            raise ValueError(f"{slots.shape[0]} slots for {n} keys")
        with nogil:
            while pos < n:
                m = self.store.advance(&keys[0, 0], n, pos, &node)
                if m == 0:
                    break
                last = node
                if ready:
                    count += self.store.mark_ready(node, m, &slots[pos], tier)
                else:
                    count += self.store.mark_absent(node, m, &slots[pos], tier, why)
                pos += m
                if m < self.store.nodes[node].length:
                    break
            if not ready:
                self.store.prune(last)
        if FLEXKV_CHECKS:
            self.store.check_integrity()
        return count

    def acquire(self, const uint64_t[:, ::1] keys not None, Py_ssize_t start, Py_ssize_t stop):
        """Keep blocks [start, stop) of the sequence from eviction until ``release`` of the same range."""
        self.add_references(keys, start, stop, 1)

    def release(self, const uint64_t[:, ::1] keys not None, Py_ssize_t start, Py_ssize_t stop):
        self.add_references(keys, start, stop, -1)

    cdef int add_references(self, const uint64_t[:, ::1] keys, Py_ssize_t start, Py_ssize_t stop, int delta) except -1:
        cdef Py_ssize_t pos = 0, m, i
        cdef int32_t node = ROOT
        cdef Node *p
        cdef uint32_t *references
        cdef bint bad = False
        cdef int apply, t
        if not 0 <= start <= stop <= keys.shape[0]:
            raise ValueError(f"blocks [{start}, {stop}) of {keys.shape[0]}")
        if start == stop:
            return 0
        with nogil:
            for apply in range(2):                     # check all, then change all
                pos = 0
                while pos < stop:
                    m = self.store.advance(&keys[0, 0], stop, pos, &node)
                    if m == 0:
                        bad = True
                        break
                    p = &self.store.nodes[node]
                    references = self.store.references_of(p)
                    for i in range(max(start - pos, 0), m):
                        if not apply:
                            bad |= references[i] == (~<uint32_t>0 if delta > 0 else 0)
                        else:
                            p.referenced -= references[i] > 0
                            references[i] += <uint32_t>delta
                            p.referenced += references[i] > 0
                    if apply and p.parked:
                        for t in range(self.store.num_tiers):
                            unpark(&self.store.queues[t], node)
                    pos += m
                if bad:
                    break
            if not bad and delta < 0:
                self.store.prune(node)
        if bad:
            raise InvariantError("acquire or release of a block that is absent, not acquired, or acquired too often")
        if FLEXKV_CHECKS:
            self.store.check_integrity()
        return 0

    def pin(self, const uint64_t[:, ::1] keys not None):
        """Pin blocks, from the first of a sequence on, and keep them from going out of date, until ``unpin`` of the
        same blocks. A pin counts for a whole node: the last one is split where the blocks end."""
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m
        cdef int32_t node = ROOT
        self.add_references(keys, 0, n, 1)
        try:
            with nogil:
                while pos < n:
                    m = self.store.advance(&keys[0, 0], n, pos, &node)
                    if m < self.store.nodes[node].length:
                        self.store.split(node, <uint32_t>m)
                    pos += m
        except BaseException:
            self.add_references(keys, 0, n, -1)
            raise
        self.add_pins(keys, 1)

    def unpin(self, const uint64_t[:, ::1] keys not None):
        """Undo ``pin``; returns the number of blocks that have no pin left."""
        cdef Py_ssize_t count = self.add_pins(keys, -1)
        self.add_references(keys, 0, keys.shape[0], -1)
        return count

    def num_unpinned(self, const uint64_t[:, ::1] keys not None):
        """Count the blocks among these that are in the tree and have no pin."""
        return self.add_pins(keys, 0)

    cdef Py_ssize_t add_pins(self, const uint64_t[:, ::1] keys, int delta) noexcept nogil:
        """Returns the number of blocks that get their first pin or lose their last; with 0, that have none."""
        cdef Py_ssize_t pos = 0, m, count = 0
        cdef int32_t node = ROOT
        cdef Node *p
        while pos < keys.shape[0]:
            m = self.store.advance(&keys[0, 0], keys.shape[0], pos, &node)
            if m == 0:
                break
            p = &self.store.nodes[node]
            count += m if p.pins == (1 if delta < 0 else 0) else 0
            p.pins += delta
            pos += m
            if m < p.length:
                break
        return count

    def touch(self, const uint64_t[:, ::1] keys not None, double now, bint hit=True, int tenant=-1):
        """Record a use at ``now`` (seconds) of all blocks of ``keys`` that are in the tree. A node that is used in
        part is split, so that all blocks of a node have one history. ``tenant``: whose they are from now on."""
        cdef Py_ssize_t n = keys.shape[0], pos = 0, m
        cdef int32_t node = ROOT
        cdef Node *p
        cdef int t
        if tenant >= self.evictor.num_tenants:
            raise ValueError(f"tenant {tenant}: there are {self.evictor.num_tenants}")
        with nogil:
            self.store.tick(now)
            while pos < n:
                m = self.store.advance(&keys[0, 0], n, pos, &node)
                if m == 0:
                    break
                if m < self.store.nodes[node].length:
                    self.store.split(node, <uint32_t>m)
                    for t in range(self.store.num_tiers):
                        if self.store.nodes[node].resident[t]:
                            self.store.change(node, t, False)    # the policy may count the unused part
                    node = self.store.nodes[node].parent
                p = &self.store.nodes[node]
                if hit:
                    p.hits += 1
                p.last_access = max(p.last_access, now)
                if tenant >= 0 and p.tenant != tenant:
                    self.store.set_tenant(node, <uint16_t>tenant)
                for t in range(self.store.num_tiers):
                    if p.resident[t]:
                        self.store.change(node, t, False)
                pos += m

    # ---- eviction ----------------------------------------------------------------------------------------------

    def evict(self, int tier, int tenant, int queue, Py_ssize_t want, double now, int64_t leave=0, int spare_to=-1,
              uint32_t why=MISS_EVICTED, double below=INFINITY, Pieces pieces=None):
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
        return self.evictor.evict(tier, tenant, queue, want, now, leave, spare_to, why, below, pieces)

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
        return self.evictor.reclaim(tier, want, tenant)

    def expire(self, int tier, double now, Py_ssize_t num_nodes, Py_ssize_t want=1 << 16):
        """Free slots of blocks that their tenant keeps no longer, looking at the next ``num_nodes`` nodes.

        Returns
        -------
        ndarray of int32
            The slots that are free now, ``want`` at most.
        """
        return self.evictor.expire(tier, now, num_nodes, want)

    def withdraw(self, int tier, Py_ssize_t bound, Py_ssize_t num_nodes, Py_ssize_t want=1 << 16):
        """Free slots of ``tier`` from slot ``bound`` on, looking at the next ``num_nodes`` nodes. Blocks that are used
        or being written stay. Returns the slots that are free now (int32), ``want`` at most."""
        return self.evictor.withdraw(tier, bound, num_nodes, want)

    def discard(self, int tier):
        """Free all slots of ``tier`` but those of blocks that are in use or being written, and of blocks before them.
        For a tree that is out of use. Returns the slots that are free now (int32)."""
        return self.evictor.discard(tier)

    # ---- counts ------------------------------------------------------------------------------------------------

    def check_integrity(self):
        """Recount everything. Returns, for each tier, the sorted slots (int32) that blocks hold.

        Raises
        ------
        InvariantError
            Naming the first node that is wrong.
        """
        return self.store.check_integrity()

    def resident(self, int tier):
        """Blocks that hold a slot on ``tier``."""
        self.store.check_tier(tier)
        return int(self.eviction_queues(tier).blocks().sum())

    @property
    def memory_bytes(self):
        """Bytes in use: node places, block arrays, key table, and the record of evicted blocks."""
        return (
            self.store.used_nodes * sizeof(Node) + self.store.block_storage * (16 + 4 * self.store.num_tiers + 5)
            + (self.store.table.mask + 1) * 4 + (self.store.forgotten_mask + 1) * sizeof(Forgotten)
        )

    def tenant_of(self, const uint64_t[:, ::1] keys not None):
        """The tenant of a sequence; 0 where none of it is in the tree."""
        cdef int32_t node = self.store.find(&keys[0, 0]) if keys.shape[0] else ROOT
        return self.store.nodes[node].tenant if node > ROOT else 0

    def miss_reason(self, const uint64_t[:, ::1] keys not None, Py_ssize_t position):
        """The recorded reason (``REASON_*``) of a block that is not in the tree; REASON_NEVER_SEEN without a record."""
        return self.store.recall(&keys[position, 0]) & 15 if 0 <= position < keys.shape[0] else REASON_NEVER_SEEN

    def remember(self, const uint64_t[:, ::1] keys not None, Py_ssize_t start, int why):
        """Blocks from ``start`` on, which are not in the tree, were not stored: record the reason for a later miss."""
        cdef Py_ssize_t i
        for i in range(start, keys.shape[0]):
            self.store.forget(&keys[i, 0], why)
