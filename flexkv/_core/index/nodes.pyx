"""Nodes of the radix tree: their arrays, links, the table that finds them, and the counts that must always hold."""
import secrets

import numpy as np

cimport cython
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from flexkv._core.arena cimport Arena
from flexkv._core.index.eviction_queues cimport (
    check_queues, configure_queues, count_blocks, free_queues, list_change, remove_from_heap, settle, split_entry,
    unpark,
)
from flexkv._core.index.key_table cimport find_place, free_place, put_number, set_places
from flexkv.errors import CapacityError, InvariantError

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)

cdef enum:
    ROOT = 0
    NONE = -1
    TABLE_PLACES = 1024                # of a new tree
    PAGE = 4096
    POPULATE_BYTES = 32768
    MADV_POPULATE_WRITE = 23           # of <linux/mman.h> 5.14; newer than Debian 12's libc headers need to be


cdef inline const uint64_t *first_key(const void *nodes, int32_t node) noexcept nogil:
    return (<const Node *>nodes)[node].keys


@cython.no_gc                          # nothing it refers to could refer to it; __dealloc__ reads the arena
cdef class NodeStore:
    """Nodes of at most ``max_blocks`` blocks on ``num_tiers`` tiers. The caller locks; every method leaves links,
    counts and eviction queues consistent."""

    def __cinit__(self, Py_ssize_t max_blocks, int num_tiers):
        if not 1 <= num_tiers <= MAX_TIERS:
            raise ValueError(f"num_tiers is {num_tiers}; allowed: 1 to {MAX_TIERS}")
        if not 1 <= max_blocks < 1 << 30:
            raise ValueError(f"max_blocks is {max_blocks}; allowed: 1 to 2**30 - 1")
        self.num_tiers = num_tiers
        self.max_blocks = max_blocks
        self.began = self.latest = -1.0
        self.max_nodes = <int32_t>(max_blocks + 2)     # the root, and one spare for a split
        self.arena = Arena(sizeof(Node) * <size_t>self.max_nodes)
        self.nodes = <Node *>self.arena.data
        cdef uint64_t size = 1024
        while 2 * size < <uint64_t>max_blocks:
            size *= 2
        self.forgotten_arena = Arena(size * sizeof(Forgotten))
        self.forgotten = <Forgotten *>self.forgotten_arena.data
        self.forgotten_mask = size - 1
        self.holes_arena = Arena(sizeof(int32_t) * <size_t>self.max_nodes)
        self.holes = <int32_t *>self.holes_arena.data
        self.table.factor = secrets.randbits(64) | 1
        cdef int32_t *numbers = <int32_t *>calloc(TABLE_PLACES, sizeof(int32_t))
        if numbers == NULL:
            raise MemoryError("no memory for the index")
        set_places(&self.table, numbers, TABLE_PLACES)
        self.used_nodes = 1
        self.free_node = NONE
        self.nodes[ROOT].parent = NONE
        self.nodes[ROOT].first_child = NONE
        self.nodes[ROOT].next_sibling = NONE
        self.nodes[ROOT].prev_sibling = NONE
        self.changed_arena = Arena(sizeof(int32_t) * <size_t>self.max_nodes * num_tiers)
        cdef int t
        for t in range(num_tiers):
            self.queues[t].nodes, self.queues[t].tier, self.queues[t].bit = self.nodes, t, <uint8_t>(1 << t)
            self.queues[t].changed = <int32_t *>self.changed_arena.data + <size_t>t * self.max_nodes
            configure_queues(&self.queues[t], 1, 1)

    def __dealloc__(self):
        cdef int32_t i
        if self.nodes != NULL:
            for i in range(self.used_nodes):
                free(self.nodes[i].keys)
        for i in range(MAX_TIERS):
            free_queues(&self.queues[i])
        free(self.table.numbers)

    # ---- block storage of a node ------------------------------------------------------------------------------

    cdef uint64_t *new_storage(self, uint32_t capacity) noexcept nogil:
        """Memory for ``capacity`` blocks; NULL if there is none. A tree with more storage than ever before takes memory
        that was never used: its pages are made present in one call, not by a fault for every page."""
        cdef size_t block_bytes = 16 + 4 * self.num_tiers + 4 + 1
        cdef size_t size = capacity * block_bytes
        cdef uint64_t *storage = <uint64_t *>malloc(size)
        cdef size_t unaligned = -<uintptr_t>storage % PAGE          # bytes before the first whole page
        cdef Py_ssize_t new_blocks = self.block_storage + capacity - self.most_storage
        if storage != NULL and new_blocks > 0:
            self.most_storage += new_blocks
            if new_blocks * block_bytes >= POPULATE_BYTES:          # a kernel before 5.14 refuses: no harm
                madvise(<char *>storage + unaligned, size - unaligned, MADV_POPULATE_WRITE)
        return storage

    cdef void copy_blocks(self, Node *dst, uint32_t dst_at, Node *src, uint32_t src_at, uint32_t count) noexcept nogil:
        cdef int t
        memcpy(dst.keys + 2 * dst_at, src.keys + 2 * src_at, 16 * <size_t>count)
        for t in range(self.num_tiers):
            memcpy(self.slots_of(dst, t) + dst_at, self.slots_of(src, t) + src_at, 4 * <size_t>count)
        memcpy(self.references_of(dst) + dst_at, self.references_of(src) + src_at, 4 * <size_t>count)
        memcpy(self.state_of(dst) + dst_at, self.state_of(src) + src_at, count)

    # ---- the table from first key to node ---------------------------------------------------------------------

    cdef int32_t find(self, const uint64_t *key) noexcept nogil:
        """The node that starts with the block of this key; NONE if there is none."""
        cdef int32_t node = self.table.numbers[find_place(&self.table, self.nodes, first_key, key, 2)]
        return node if node else NONE

    cdef int table_add(self, int32_t extra) except -1 nogil:
        """Make room for ``extra`` more nodes, so that ``table_put`` cannot fail; the load stays at most a half."""
        cdef uint64_t size = self.table.mask + 1
        cdef int32_t *old = self.table.numbers
        cdef int32_t *new
        cdef uint64_t i
        if <uint64_t>(self.num_nodes + extra) * 2 <= size:
            return 0
        new = <int32_t *>calloc(2 * size, sizeof(int32_t))
        if new == NULL:
            with gil:
                raise MemoryError("no memory for the index")
        set_places(&self.table, new, 2 * size)
        for i in range(size):
            if old[i]:
                self.table_put(old[i])
        free(old)
        return 0

    cdef void table_put(self, int32_t node) noexcept nogil:
        put_number(&self.table, self.nodes[node].keys, node)

    cdef void table_remove(self, int32_t node) noexcept nogil:
        free_place(&self.table, self.nodes, first_key,
                   find_place(&self.table, self.nodes, first_key, self.nodes[node].keys, 2))

    # ---- nodes ------------------------------------------------------------------------------------------------

    cdef int32_t new_node(self, uint32_t capacity) except -1 nogil:
        cdef int32_t node = self.free_node
        cdef Node *p
        if node == NONE and self.used_nodes == self.max_nodes:
            with gil:
                raise CapacityError(f"the index is full: {self.max_blocks} blocks")
        cdef uint64_t *keys = self.new_storage(capacity)
        if keys == NULL:
            with gil:
                raise MemoryError("no memory for the index")
        if node == NONE:
            node = self.used_nodes
            self.used_nodes += 1
        else:
            self.free_node = self.nodes[node].next_sibling
        p = &self.nodes[node]
        cdef uint8_t changed = p.changed               # its number is in that list already
        memset(p, 0, sizeof(Node))
        p.changed = changed
        p.keys = keys
        p.capacity = capacity
        p.parent = p.first_child = p.next_sibling = p.prev_sibling = NONE
        self.num_nodes += 1
        self.block_storage += capacity
        return node

    cdef void free_node_at(self, int32_t node) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        cdef uint8_t changed = p.changed
        self.num_nodes -= 1
        self.block_storage -= p.capacity
        free(p.keys)
        memset(p, 0, sizeof(Node))
        p.changed = changed
        p.next_sibling = self.free_node
        self.free_node = node

    cdef void link(self, int32_t node, int32_t parent) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        p.parent = parent
        p.prev_sibling = NONE
        p.next_sibling = self.nodes[parent].first_child
        if p.next_sibling != NONE:
            self.nodes[p.next_sibling].prev_sibling = node
        self.nodes[parent].first_child = node

    cdef void unlink(self, int32_t node) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        if p.prev_sibling != NONE:
            self.nodes[p.prev_sibling].next_sibling = p.next_sibling
        else:
            self.nodes[p.parent].first_child = p.next_sibling
        if p.next_sibling != NONE:
            self.nodes[p.next_sibling].prev_sibling = p.prev_sibling

    cdef Py_ssize_t advance(self, const uint64_t *keys, Py_ssize_t n, Py_ssize_t pos, int32_t *node) noexcept nogil:
        """Find the node that starts at ``keys[pos]``; return how many blocks of it match, 0 where there is none."""
        cdef int32_t found = self.find(keys + 2 * pos)
        if found == NONE:
            return 0
        node[0] = found
        cdef Node *p = &self.nodes[found]
        cdef const uint64_t *mine = p.keys
        cdef const uint64_t *theirs = keys + 2 * pos
        cdef Py_ssize_t low = 1, high = min(<Py_ssize_t>p.length, n - pos), mid = high
        while low < high:                              # mid starts at the end: a full match takes one comparison
            if mine[2 * mid - 2] == theirs[2 * mid - 2] and mine[2 * mid - 1] == theirs[2 * mid - 1]:
                low = mid
            else:
                high = mid - 1
            mid = (low + high + 1) // 2
        return low

    # ---- the eviction queues of each tier -------------------------------------------------------------------------

    cdef void change(self, int32_t node, int tier, bint is_new) noexcept nogil:
        """List a node for the policy of ``tier``; the time is the priority of a new node until the policy sets it."""
        if is_new:
            self.nodes[node].priority[tier] = self.latest
        list_change(&self.queues[tier], node, is_new)

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

    cdef int check_tier(self, int tier) except -1:
        if not 0 <= tier < self.num_tiers:
            raise ValueError(f"tier {tier}; this tree has tiers 0 to {self.num_tiers - 1}")
        return 0

    # ---- blocks of a tier --------------------------------------------------------------------------------------

    cdef void went_live(self, int32_t node, int tier) noexcept nogil:
        """The subtree of ``node`` now has blocks on ``tier``: update the ancestors, up to the first that has others."""
        cdef int32_t parent = self.nodes[node].parent
        cdef bint was
        while parent != NONE:
            was = self.nodes[parent].resident[tier] > 0 or self.nodes[parent].live_children[tier] > 0
            self.nodes[parent].live_children[tier] += 1
            settle(&self.queues[tier], parent)
            if was:
                return
            parent = self.nodes[parent].parent

    cdef void went_dead(self, int32_t node, int tier) noexcept nogil:
        cdef int32_t parent = self.nodes[node].parent
        while parent != NONE:
            self.nodes[parent].live_children[tier] -= 1
            settle(&self.queues[tier], parent)
            if self.nodes[parent].resident[tier] > 0 or self.nodes[parent].live_children[tier] > 0:
                return
            parent = self.nodes[parent].parent

    cdef void set_slot(self, int32_t node, uint32_t i, int tier, int32_t slot) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        self.slots_of(p, tier)[i] = slot
        p.resident[tier] += 1
        count_blocks(&self.queues[tier], p, 1)
        if p.resident[tier] == 1:
            self.change(node, tier, True)
            if p.live_children[tier] == 0:
                self.went_live(node, tier)

    cdef void clear_slot(self, int32_t node, uint32_t i, int tier) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        self.slots_of(p, tier)[i] = -1
        if self.state_of(p)[i] & (1 << tier):
            self.state_of(p)[i] &= ~(1 << tier)
            p.ready[tier] -= 1
            if p.ready[tier] == 0:
                settle(&self.queues[tier], node)
        p.resident[tier] -= 1
        count_blocks(&self.queues[tier], p, -1)
        if p.resident[tier] == 0 and p.live_children[tier] == 0:
            self.went_dead(node, tier)

    cdef Py_ssize_t mark_ready(self, int32_t node, Py_ssize_t m, const int32_t *slots, int tier) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        cdef const int32_t *mine = self.slots_of(p, tier)
        cdef uint8_t *state = self.state_of(p)
        cdef uint8_t changed, bit = 1 << tier
        cdef Py_ssize_t i, count = 0
        for i in range(m):                             # without branches, so that it runs as vectors
            changed = (slots[i] >= 0) & (mine[i] == slots[i]) & ~(state[i] >> tier) & 1
            state[i] |= changed * bit
            count += changed
        p.ready[tier] += <uint32_t>count
        unpark(&self.queues[tier], node)
        return count

    cdef Py_ssize_t mark_absent(self, int32_t node, Py_ssize_t m, const int32_t *slots, int tier,
                                uint32_t why) noexcept nogil:
        cdef Node *p = &self.nodes[node]
        cdef Py_ssize_t i, count = 0
        for i in range(m):
            if slots[i] >= 0 and self.slots_of(p, tier)[i] == slots[i]:
                self.clear_slot(node, <uint32_t>i, tier)
                if why:
                    self.forget(p.keys + 2 * i, why)
                count += 1
        if count:
            unpark(&self.queues[tier], node)
            self.note_hole(node)
        return count

    cdef int split(self, int32_t node, uint32_t at) except -1 nogil:
        """Put the first ``at`` blocks of ``node`` into a new parent; ``node`` keeps the rest and its children."""
        cdef int32_t head
        cdef Node *h
        cdef Node *p
        cdef Node tail
        cdef int t
        cdef uint32_t i
        self.table_add(1)
        head = self.new_node(at)
        memset(&tail, 0, sizeof(Node))
        tail.capacity = self.nodes[node].length - at
        tail.keys = self.new_storage(tail.capacity)
        if tail.keys == NULL:
            self.free_node_at(head)
            with gil:
                raise MemoryError("no memory for the index")
        h = &self.nodes[head]
        p = &self.nodes[node]
        self.copy_blocks(h, 0, p, 0, at)
        self.copy_blocks(&tail, 0, p, at, tail.capacity)
        self.table_remove(node)
        self.unlink(node)
        self.link(head, p.parent)
        h.length = at
        h.depth = p.depth
        h.last_access, h.hits, h.tenant = p.last_access, p.hits, p.tenant
        h.pins = p.pins
        for i in range(at):
            h.referenced += self.references_of(h)[i] > 0
        self.block_storage += <Py_ssize_t>tail.capacity - <Py_ssize_t>p.capacity
        free(p.keys)
        p.keys = tail.keys
        p.capacity = tail.capacity
        p.length = tail.capacity
        p.depth += at
        p.referenced -= h.referenced
        for t in range(self.num_tiers):
            for i in range(at):
                h.resident[t] += self.slots_of(h, t)[i] >= 0
                h.ready[t] += (self.state_of(h)[i] >> t) & 1
            p.resident[t] -= h.resident[t]
            p.ready[t] -= h.ready[t]
            h.live_children[t] = p.resident[t] > 0 or p.live_children[t] > 0
        if p.changed & HAS_HOLE:
            self.note_hole(head)
        self.link(node, head)
        self.table_put(head)
        self.table_put(node)
        for t in range(self.num_tiers):
            split_entry(&self.queues[t], head, node)
        return 0

    cdef int32_t grow_leaf(self, int32_t node, uint32_t extra) except -1 nogil:
        """Room for ``extra`` more blocks in a leaf; a leaf that grows block by block grows by an eighth."""
        cdef Node *p = &self.nodes[node]
        cdef Node bigger
        if p.length + extra <= p.capacity:
            return node
        memset(&bigger, 0, sizeof(Node))
        bigger.capacity = p.length + max(extra, p.length // 8)
        bigger.keys = self.new_storage(bigger.capacity)
        if bigger.keys == NULL:
            with gil:
                raise MemoryError("no memory for the index")
        self.copy_blocks(&bigger, 0, p, 0, p.length)
        self.block_storage += <Py_ssize_t>bigger.capacity - <Py_ssize_t>p.capacity
        free(p.keys)
        p.keys = bigger.keys
        p.capacity = bigger.capacity
        return node

    cdef int append(self, int32_t last, const uint64_t *keys, const int32_t *slots, Py_ssize_t count, int tier,
                    double now, uint16_t tenant) except -1 nogil:
        """Add ``count`` blocks below ``last``, which they follow: in place where it is a leaf that was not hit since
        it was written and is not held, so that all blocks of a node have one history; else as its child."""
        cdef int32_t node
        cdef Node *p
        cdef uint32_t at
        cdef int t
        if (last != ROOT and self.nodes[last].first_child == NONE and self.nodes[last].hits == 0
                and self.nodes[last].pins == 0):
            node = self.grow_leaf(last, <uint32_t>count)
        else:
            self.table_add(1)
            node = self.new_node(<uint32_t>count)
            p = &self.nodes[node]
            p.depth = self.nodes[last].depth + self.nodes[last].length
            p.tenant = tenant
            memcpy(p.keys, keys, 16)                   # the table reads the first key
            self.link(node, last)
            self.table_put(node)
        p = &self.nodes[node]
        at = p.length
        memcpy(p.keys + 2 * <size_t>at, keys, 16 * <size_t>count)
        for t in range(self.num_tiers):
            memset(self.slots_of(p, t) + at, 0xff, 4 * <size_t>count)
        memcpy(self.slots_of(p, tier) + at, slots, 4 * <size_t>count)
        memset(self.references_of(p) + at, 0, 4 * <size_t>count)
        memset(self.state_of(p) + at, 0, count)
        p.length += <uint32_t>count
        p.last_access = max(p.last_access, now)
        self.num_blocks += count
        self.prepare_to_forget()
        if p.resident[tier] == 0 and p.live_children[tier] == 0:
            self.went_live(node, tier)
        self.change(node, tier, p.resident[tier] == 0)
        p.resident[tier] += <uint32_t>count
        count_blocks(&self.queues[tier], p, count)
        return 0

    cdef void note_hole(self, int32_t node) noexcept nogil:
        """A block of a node may have left all tiers, and blocks behind it may remain."""
        cdef Node *p = &self.nodes[node]
        if not p.changed & HAS_HOLE:
            p.changed |= HAS_HOLE
            self.holes[self.num_holes] = node
            self.num_holes += 1

    cdef inline bint is_absent(self, Node *p, uint32_t i) noexcept nogil:
        """Whether a block has a slot on no tier."""
        cdef int t
        for t in range(self.num_tiers):
            if self.slots_of(p, t)[i] >= 0:
                return False
        return True

    cdef bint trim(self, int32_t node) noexcept nogil:
        """Drop blocks at the end of a leaf that are not in use; returns whether the node was empty, and is free."""
        cdef Node *p = &self.nodes[node]
        cdef uint32_t i = p.length
        while i > 0 and self.references_of(p)[i - 1] == 0 and self.is_absent(p, i - 1):
            i -= 1
        self.num_blocks -= p.length - i
        if i > 0:
            p.length = i
            return False
        self.table_remove(node)
        self.unlink(node)
        self.free_node_at(node)
        return True

    cdef void prune(self, int32_t node) noexcept nogil:
        """Drop blocks at the end of a leaf that are not in use, and then nodes that are empty, upwards."""
        cdef int32_t parent
        while node != ROOT and self.nodes[node].first_child == NONE:
            parent = self.nodes[node].parent
            if not self.trim(node):
                return
            node = parent

    cdef void tick(self, double now) noexcept nogil:
        if self.began < 0:
            self.began = now
        self.latest = max(self.latest, now)

    cdef void forget(self, const uint64_t *key, uint32_t why) noexcept nogil:
        cdef Forgotten *entry = &self.forgotten[key[0] & self.forgotten_mask]
        entry.fingerprint = <uint32_t>(key[1] >> 32)
        entry.reason = <uint32_t>(self.latest - self.began) << 4 | why

    cdef void prepare_to_forget(self) noexcept nogil:
        """Populate the record of evicted blocks by the time that the tree is half full, as it is when all slots are in
        use, bit by bit: the first evictions would take thousands of page faults each."""
        cdef size_t size = (self.forgotten_mask + 1) * sizeof(Forgotten)
        cdef size_t want = min(size, <size_t>(<double>size * 2 * self.num_blocks / self.max_blocks)) // PAGE * PAGE
        if want >= self.forgotten_present + POPULATE_BYTES:
            madvise(<char *>self.forgotten + self.forgotten_present, want - self.forgotten_present,
                    MADV_POPULATE_WRITE)
            self.forgotten_present = want

    cdef uint32_t recall(self, const uint64_t *key) noexcept nogil:
        """The recorded reason of a block that is not here, and its time; MISS_NEVER_SEEN without a record."""
        cdef Forgotten *entry = &self.forgotten[key[0] & self.forgotten_mask]
        return entry.reason if entry.reason and entry.fingerprint == <uint32_t>(key[1] >> 32) else MISS_NEVER_SEEN

    cdef list check_integrity(self):
        """Recount everything. Returns, for each tier, the sorted slots (int32) that blocks hold.

        Raises
        ------
        InvariantError
            Naming the first node that is wrong.
        """
        held = [[] for _ in range(self.num_tiers)]
        cdef Py_ssize_t blocks = 0, seen = 0
        cdef int t
        cdef int32_t node, child
        stack = [ROOT]
        while stack:
            node = stack.pop()
            if node != ROOT:
                seen += 1
                blocks += self.nodes[node].length
                self.check_node(node, held)
            child = self.nodes[node].first_child
            while child != NONE:
                if self.nodes[child].parent != node:
                    raise InvariantError(f"node {child}: parent link is wrong")
                stack.append(child)
                child = self.nodes[child].next_sibling
        if blocks != self.num_blocks or seen != self.num_nodes:
            raise InvariantError(f"{seen} nodes, {blocks} blocks found; {self.num_nodes}, {self.num_blocks} counted")
        result = []
        for t in range(self.num_tiers):
            slots = np.sort(np.concatenate(held[t]) if held[t] else np.empty(0, np.int32))
            if (np.diff(slots) == 0).any():
                raise InvariantError(f"tier {t}: two blocks hold one slot")
            result.append(slots)
            check_queues(&self.queues[t], self.used_nodes)
        return result

    cdef int check_node(self, int32_t node, list held) except -1:
        cdef Node *p = &self.nodes[node]
        cdef int32_t child
        cdef uint32_t i, resident, ready, live, referenced = 0
        cdef int t
        cdef bint wrong = p.length == 0 or p.length > p.capacity or self.find(p.keys) != node
        wrong |= p.depth != self.nodes[p.parent].depth + self.nodes[p.parent].length
        for i in range(p.length):
            referenced += self.references_of(p)[i] > 0
        wrong |= referenced != p.referenced or (p.pins > 0 and referenced < p.length)
        needed = p.first_child != NONE or self.references_of(p)[p.length - 1] > 0
        for t in range(self.num_tiers):
            slots = np.asarray(<int32_t[:p.length]>self.slots_of(p, t)).copy()
            needed = needed or slots[p.length - 1] >= 0
            held[t].append(slots[slots >= 0])
            resident = <uint32_t>(slots >= 0).sum()
            ready = live = 0
            for i in range(p.length):
                ready += self.state_of(p)[i] >> t & 1
                wrong |= bool(self.state_of(p)[i] >> t & 1) and slots[i] < 0
            child = p.first_child
            while child != NONE:
                live += self.nodes[child].resident[t] > 0 or self.nodes[child].live_children[t] > 0
                child = self.nodes[child].next_sibling
            wrong |= resident != p.resident[t] or ready != p.ready[t] or live != p.live_children[t]
        if wrong or not needed:
            raise InvariantError(f"node {node}: its counts, links or table entry are wrong")
        return 0
