"""The order in which the nodes of one tier are evicted: a heap for each queue of each tenant.

A node is in the heap of its queue while it is evictable: it has ready blocks, and no node below it has blocks on
the tier. It keeps its priority while it is not evictable, so that no policy is needed when the last node below it is
evicted. Nodes that were used, or came to the tier, are listed until the policy reads the list and sets their
priorities. So the cost of a put or an eviction does not depend on how much is cached.
"""
import numpy as np

cimport cython
from libc.math cimport INFINITY
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from flexkv._core.buffers cimport data_of
from flexkv._core.index.ghosts cimport Ghost, Ghosts
from flexkv.errors import InvariantError

EVENT_DTYPE = np.dtype(
    [
        ("first_key", "u8"), ("last_access", "f8"), ("priority", "f8"), ("node", "i4"), ("hits", "u4"),
        ("new_hits", "u4"), ("depth", "u4"), ("length", "u4"), ("children", "u4"), ("mark", "u4"),
        ("tenant", "u2"), ("queue", "u1"), ("lives", "u1"), ("is_new", "?"),
        ("has_copy", "?"),
    ],
    align=True,
)

assert EVENT_DTYPE.itemsize == sizeof(Event)

RETURN_DTYPE = np.dtype([("value", "f8"), ("event", "u4"), ("mark", "u4"), ("blocks", "u4")], align=True)

assert RETURN_DTYPE.itemsize == sizeof(Return)

cdef enum:
    FEW = 1024                         # events that one array is kept for: making one takes as long as filling it

INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)


cdef int configure_queues(TierQueues *q, int num_tenants, int num_queues) except -1:
    """Make queues; only while nothing is in them, or to add tenants."""
    cdef int num_heaps = num_tenants * num_queues, i
    if q.num_queues and num_queues != q.num_queues and any(q.heaps[i].blocks for i in range(q.num_heaps)):
        raise InvariantError("the queues of a tier cannot be changed while it holds blocks")
    if num_heaps < q.num_heaps:
        raise InvariantError(f"{num_tenants} tenants: they can only become more")
    cdef int old_tenants = q.num_heaps // max(q.num_queues, 1)
    cdef int *num_active = <int *>realloc(q.num_active, sizeof(int) * num_tenants)
    if num_active != NULL:
        q.num_active = num_active
    cdef Heap *heaps = <Heap *>realloc(q.heaps, sizeof(Heap) * num_heaps)
    if heaps != NULL:
        q.heaps = heaps
    if heaps == NULL or num_active == NULL:
        raise MemoryError("no memory for the index")
    memset(heaps + q.num_heaps, 0, sizeof(Heap) * (num_heaps - q.num_heaps))
    memset(num_active + old_tenants, 0, sizeof(int) * (num_tenants - old_tenants))
    q.num_heaps, q.num_queues = num_heaps, num_queues
    return 0


cdef void free_queues(TierQueues *q) noexcept nogil:
    cdef int i
    for i in range(q.num_heaps):
        free(q.heaps[i].entries)
    free(q.heaps)
    free(q.num_active)


cdef void list_change(TierQueues *q, int32_t node, bint is_new) noexcept nogil:
    """List a node for the policy, which sets its priority."""
    cdef Node *p = &q.nodes[node]
    if is_new:
        p.is_new |= q.bit
        p.came_as = p.keys[0]
        p.placed &= ~q.bit
        p.parked &= ~q.bit
        p.mark[q.tier] = 0
        p.lives[q.tier] = 0
        p.hits_told[q.tier] = p.hits
    if not p.changed & q.bit:
        p.changed |= q.bit
        q.changed[q.num_changed] = node
        q.num_changed += 1


cdef void settle(TierQueues *q, int32_t node) noexcept nogil:
    """Put a node into its heap, to its place there, or out of it, as it is now. A heap that cannot grow for want of
    memory leaves the node out: it is not evicted until it is used again."""
    cdef Node *p = &q.nodes[node]
    cdef int t = q.tier
    cdef Heap *heap
    cdef Entry *grown
    cdef Entry entry
    cdef int32_t at
    if p.ready[t] == 0 or p.live_children[t] > 0 or not p.placed & q.bit or p.parked & q.bit:
        remove_from_heap(q, node)
        return
    heap = heap_of(q, p)
    at = p.heap_at[t] - 1
    if at >= 0:
        entry = heap.entries[at]
        if entry.priority == p.priority[t]:
            return
        entry.priority = p.priority[t]
    else:
        if heap.size == heap.capacity:
            grown = <Entry *>realloc(heap.entries, sizeof(Entry) * <size_t>(2 * heap.capacity + 64))
            if grown == NULL:
                p.parked |= q.bit
                return
            heap.entries = grown
            heap.capacity = 2 * heap.capacity + 64
        at = heap.size
        heap.size += 1
        q.num_active[p.tenant] += heap.size == 1
        entry.priority = p.priority[t]
        entry.node = node
    entry.order = q.order
    q.order += 1
    sift_up(q, heap, at, entry)


cdef void remove_from_heap(TierQueues *q, int32_t node) noexcept nogil:
    """Take a node out of its heap, if it is in it."""
    cdef Node *p = &q.nodes[node]
    cdef int32_t at = p.heap_at[q.tier] - 1
    cdef Heap *heap
    if at < 0:
        return
    heap = heap_of(q, p)
    p.heap_at[q.tier] = 0
    heap.size -= 1
    q.num_active[p.tenant] -= heap.size == 0
    if at < heap.size:
        sift_up(q, heap, at, heap.entries[heap.size])


cdef void unpark(TierQueues *q, int32_t node) noexcept nogil:
    """Consider a node for eviction again: the use or write of its last blocks may have ended."""
    q.nodes[node].parked &= ~q.bit
    settle(q, node)


cdef void move_to_queue(TierQueues *q, int32_t node, uint8_t queue) noexcept nogil:
    """Move a node to another queue, with all its blocks; the caller settles it then."""
    cdef Node *p = &q.nodes[node]
    if p.queue[q.tier] != queue:
        remove_from_heap(q, node)
        count_blocks(q, p, -<int64_t>p.resident[q.tier])
        p.queue[q.tier] = queue
        count_blocks(q, p, p.resident[q.tier])


cdef void split_entry(TierQueues *q, int32_t head, int32_t tail) noexcept nogil:
    """``head`` was cut off the front of ``tail``: it gets the same queue and priority."""
    cdef Node *h = &q.nodes[head]
    cdef Node *p = &q.nodes[tail]
    cdef int t = q.tier
    h.priority[t], h.mark[t], h.queue[t], h.lives[t] = p.priority[t], p.mark[t], p.queue[t], p.lives[t]
    h.hits_told[t] = p.hits_told[t]
    h.placed |= p.placed & q.bit
    if p.changed & q.bit:
        list_change(q, head, False)
    h.is_new |= p.is_new & q.bit
    h.came_as = p.came_as
    settle(q, head)
    settle(q, tail)


cdef inline void sift_up(TierQueues *q, Heap *heap, int32_t at, Entry entry) noexcept nogil:
    """Place an entry at ``at``, where there is a hole, or nearer to the top, or, if need be, further down."""
    cdef int32_t above
    cdef Entry *entries = heap.entries
    while at > 0:
        above = (at - 1) >> 2
        if not goes_first(&entry, &entries[above]):
            break
        entries[at] = entries[above]
        q.nodes[entries[at].node].heap_at[q.tier] = at + 1
        at = above
    sift_down(q, heap, at, entry)


cdef inline void sift_down(TierQueues *q, Heap *heap, int32_t at, Entry entry) noexcept nogil:
    cdef Entry *entries = heap.entries
    cdef int32_t first, best, i
    while True:
        first = 4 * at + 1
        if first >= heap.size:
            break
        best = first
        for i in range(first + 1, min(first + 4, heap.size)):
            if goes_first(&entries[i], &entries[best]):
                best = i
        if not goes_first(&entries[best], &entry):
            break
        entries[at] = entries[best]
        q.nodes[entries[at].node].heap_at[q.tier] = at + 1
        at = best
    entries[at] = entry
    q.nodes[entry.node].heap_at[q.tier] = at + 1


cdef int check_queues(TierQueues *q, Py_ssize_t num_nodes) except -1:
    """Raise InvariantError unless the heaps hold exactly the evictable nodes, in order."""
    cdef int32_t node, at
    cdef Py_ssize_t i, in_heaps = 0
    cdef int t = q.tier, active
    cdef Heap *heap
    cdef Node *p
    counted = np.zeros(q.num_heaps, dtype=np.int64)
    for node in range(1, <int32_t>num_nodes):
        p = &q.nodes[node]
        if p.length == 0:
            if p.heap_at[t]:
                raise InvariantError(f"node {node} is free, and in a heap")
            continue
        counted[p.tenant * q.num_queues + p.queue[t]] += p.resident[t]
        able = p.ready[t] > 0 and p.live_children[t] == 0 and p.placed & q.bit and not p.parked & q.bit
        if bool(able) != (p.heap_at[t] > 0):
            raise InvariantError(f"node {node} is wrongly in a heap, or not in one")
        in_heaps += p.heap_at[t] > 0
        if p.resident[t] and not p.placed & q.bit and not p.changed & q.bit:
            raise InvariantError(f"node {node} has no priority, and will get none")
    for i in range(q.num_heaps):
        heap = &q.heaps[i]
        if heap.blocks != counted[i]:
            raise InvariantError(f"queue {i}: {counted[i]} blocks, and {heap.blocks} counted")
        in_heaps -= heap.size
        for at in range(heap.size):
            p = &q.nodes[heap.entries[at].node]
            if p.heap_at[t] != at + 1 or p.priority[t] != heap.entries[at].priority or (
                    at and goes_first(&heap.entries[at], &heap.entries[(at - 1) >> 2])):
                raise InvariantError(f"queue {i}: place {at} is wrong")
    if in_heaps:
        raise InvariantError("a heap holds a node that cannot be evicted")
    for i in range(q.num_heaps // q.num_queues):
        active = sum(q.heaps[i * q.num_queues + queue].size > 0 for queue in range(q.num_queues))
        if active != q.num_active[i]:
            raise InvariantError(f"tenant {i}: {active} queues may go, {q.num_active[i]} counted")
    return 0


@cython.no_gc                          # it refers to nothing that could refer to it
cdef class EvictionQueues:
    """The eviction queues of one tier of a ``RadixTree``, as policies and tiers see them. The caller locks."""

    @property
    def num_waiting(self):
        """Number of nodes that are listed for the policy."""
        return self.q.num_changed

    @staticmethod
    cdef EvictionQueues of(TierQueues *q, object owner):
        """A view of ``q``, which is part of ``owner``."""
        cdef EvictionQueues self = EvictionQueues()
        self.q, self.owner = q, owner
        return self

    def drain(self):
        """Nodes that were used, or came to the tier, since the last call; (n,) of ``EVENT_DTYPE``. The policy
        sets their priorities, and passes them to ``place``. The priority of new ones is when they came, in seconds, and
        their key that of the first block that came with them, though they may have been split since. ``has_copy``: the
        blocks that the tier holds of it are ready on the tier below as well. The array is good until the next call."""
        if self.few_events is None:
            self.few_events = np.empty(FEW, EVENT_DTYPE)
        events_array = self.few_events if self.q.num_changed <= FEW else np.empty(self.q.num_changed, EVENT_DTYPE)
        cdef Event *events = <Event *>data_of(events_array, True)
        cdef int32_t i, n = 0
        cdef int t = self.q.tier
        cdef Node *p
        cdef Event *e
        with nogil:
            for i in range(self.q.num_changed):
                p = &self.q.nodes[self.q.changed[i]]
                p.changed &= ~self.q.bit
                if p.length == 0 or p.resident[t] == 0:            # it was evicted meanwhile
                    continue
                e = &events[n]
                n += 1
                e.first_key, e.last_access, e.priority = p.came_as, p.last_access, p.priority[t]
                e.node, e.hits, e.new_hits = self.q.changed[i], p.hits, p.hits - p.hits_told[t]
                e.depth, e.length, e.children, e.mark = p.depth, p.length, p.live_children[t], p.mark[t]
                e.tenant, e.queue, e.lives, e.is_new = p.tenant, p.queue[t], p.lives[t], (p.is_new & self.q.bit) != 0
                e.has_copy = t + 1 < MAX_TIERS and p.ready[t + 1] >= p.resident[t]
                p.hits_told[t] = p.hits
                p.is_new &= ~self.q.bit
            self.q.num_changed = 0
        return events_array[:n]

    def returned(self, events, Ghosts ghosts not None):
        """Which pieces of ``ghosts`` are back in new nodes of ``events``, as ``drain`` gave them; they are no ghosts
        any more. (n,) of ``RETURN_DTYPE``: number of the event, and of the piece ``value``, ``mark`` and the
        blocks that are back."""
        cdef const Event *told = <const Event *>data_of(events)
        cdef Py_ssize_t i, n = len(events), count = 0, limit = 0
        cdef uint32_t block, step
        cdef uint64_t at
        cdef Ghost *ghost
        cdef Node *p
        for i in range(n):
            limit += told[i].length if told[i].is_new else 0
        returns_array = np.empty(min(limit, <Py_ssize_t>(ghosts.last - ghosts.first)), RETURN_DTYPE)
        cdef Return *returns = <Return *>data_of(returns_array, True)
        with nogil:
            for i in range(n):
                if not told[i].is_new:
                    continue
                p = &self.q.nodes[told[i].node]
                block = 0
                while block < p.length:
                    at = ghosts.find(p.keys[2 * block])
                    ghost = ghosts.at_place(at)
                    if ghost == NULL:
                        break
                    step = min(ghost.blocks, p.length - block)
                    returns[count].value, returns[count].mark = ghost.value, ghost.mark
                    returns[count].event, returns[count].blocks = <uint32_t>i, step
                    count += 1
                    block += step
                    ghosts.remove(at)
        return returns_array[:count]

    def place(self, events):
        """Take over ``priority``, ``queue``, ``mark`` and ``lives`` from events that ``drain`` returned."""
        cdef TierQueues *q = self.q
        cdef const Event *placed = <const Event *>data_of(events)
        cdef Py_ssize_t i, n = len(events)
        cdef int t = q.tier
        cdef const Event *e
        cdef Node *p
        for i in range(n):
            if placed[i].queue >= q.num_queues:
                raise InvariantError(f"queue {placed[i].queue}: there are {q.num_queues}")
        with nogil:
            for i in range(n):
                e = &placed[i]
                p = &q.nodes[e.node]
                move_to_queue(q, e.node, e.queue)
                p.priority[t], p.mark[t], p.lives[t] = e.priority, e.mark, e.lives
                p.placed |= q.bit
                settle(q, e.node)

    def blocks(self):
        """(tenants, queues) int64: blocks that each queue has on the tier."""
        out = np.empty((self.q.num_heaps // self.q.num_queues, self.q.num_queues), INT64)
        cdef int64_t *counts = <int64_t *>data_of(out, True)
        cdef int i
        for i in range(self.q.num_heaps):
            counts[i] = self.q.heaps[i].blocks
        return out

    def has_evictable(self, int tenant):
        """Whether any node of a tenant can be evicted."""
        return self.q.num_active[tenant] > 0

    def of_tenant(self, int tenant):
        """Return for each queue of a tenant its blocks ((queues,) int64), as ``blocks`` does, and the lowest priority
        ((queues,) float64), infinite where no node can be evicted."""
        cdef const Heap *heaps = &self.q.heaps[tenant * self.q.num_queues]
        blocks, heads = np.empty(self.q.num_queues, INT64), np.empty(self.q.num_queues, FLOAT64)
        cdef int64_t *counts = <int64_t *>data_of(blocks, True)
        cdef double *lowest = <double *>data_of(heads, True)
        cdef int i
        for i in range(self.q.num_queues):
            counts[i] = heaps[i].blocks
            lowest[i] = heaps[i].entries[0].priority if heaps[i].size else INFINITY
        return blocks, heads


cdef inline bint goes_first(const Entry *a, const Entry *b) noexcept nogil:
    return a.priority < b.priority or (a.priority == b.priority and <int32_t>(a.order - b.order) < 0)
