"""Reuse statistics by class of use, and the eviction order that follows from them.

The properties of a node's last use give its *class*. Each class counts how many blocks were used, and at which
age how many of them were used again, whether cached or evicted meanwhile. From that, and from how long ago the uses
were (one of a minute ago says nothing yet about reuse after an hour), follows the *hit density* of a class at an age:
the most hits per block and second that it gives if it is kept from then on for some time. That is the index of Gittins
(Bandit processes and dynamic allocation indices, 1979); LHD (Beckmann, Chen, Cidon, NSDI 2018) takes the mean over all
time to come instead. That classes of requests differ in when they come back is from Wang et al.: KVCache cache in the
wild (ATC 2025).

A class whose density falls with age is evicted from its oldest on. One whose density rises, as that of a loop over more
than fits, is evicted from its newest on; the priority of such nodes is the negative time of their last use.

Times are on a clock of its own: the engine's, moved on a little with each operation, so that ages differ where that
stands still.
"""
import numpy as np

from libc.math cimport INFINITY, fabs, fmax, fmin, log2, nextafter, sqrt
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memset

from flexkv._core.buffers cimport data_of
from flexkv._core.index.eviction cimport Piece
from flexkv._core.index.ghosts cimport Ghosts
from flexkv._core.index.eviction_queues cimport Event, Return

INT64 = np.dtype(np.int64)

cdef enum:
    SHARES = 3                         # how much of the request was never seen before
    KINDS = 2                          # whether the node was hit, or is new
    GAPS = 4                           # how long before its last use it was used: terciles; 0: not known
    HUBS = 2                           # whether sequences part behind it
    LEFT = SHARES * KINDS * GAPS * HUBS     # the class of the unused part when a node was used in part
    CLASSES = LEFT + 1
    FEATURES = 4
    MAX_VALUES = 4                     # of a feature
    AGES = 72                          # half octaves
    SMOOTH = 2                         # ages on either side, over which features are compared
    CLASS_BITS = 8                     # of a mark
    MAX_COUNTED = (1 << 24) - 1

    HIT = 0
    NEW = 1
    PERIOD = 100                       # operations from which densities are derived anew
    FIRST = 20                         # the first time; until then it is LRU

NUM_QUEUES = 2 * CLASSES               # for each class: one evicted from the oldest on, one from the newest on

cdef int[FEATURES] SIZES = [SHARES, KINDS, GAPS, HUBS]
cdef int[FEATURES] STRIDES = [KINDS * GAPS * HUBS, GAPS * HUBS, HUBS, 1]

# Bounds of the shares: a turn adds little, another subject under the same prefix much, a new conversation all.
cdef double SMALL_SHARE = 0.1
cdef double LARGE_SHARE = 0.5
cdef double FIRST_AGE_S = 1e-3         # with 72 half octaves the last age begins after one year
cdef double TICK_S = 0.0005            # that each operation takes at least; a request has two, so that it is 1 ms
cdef double PRIOR = 0.01               # a class counts by itself from this share of all blocks on; else by its features
cdef double MAX_RATIO = 20.0           # by which a feature makes it likelier that a block is used again
cdef double MIN_LEFT = 0.005           # of a class are thought never to be used again, at any age
cdef double DECAY = 0.99               # each period; half of it is 7,000 operations ago
cdef double RISE = 1.1                 # of the density from first use to eviction: the newest is evicted first
cdef double NEAR_PRICE = 1.05          # times the price: a new node of that density would be evicted soon anyway
cdef double LOAD_PRICE = 0.02          # of a hit that the tier below would have given too: a load, not a computation
cdef double PRICE_WEIGHT = 0.05        # of the latest eviction


cdef inline int age_of(double seconds) noexcept nogil:
    return <int>fmin(2 * log2(fmax(seconds, FIRST_AGE_S) / FIRST_AGE_S), AGES - 1)


cdef inline uint32_t class_of(int share, int kind, int gap, bint is_hub) noexcept nogil:
    return share * STRIDES[0] + kind * STRIDES[1] + gap * STRIDES[2] + (kind == HIT and is_hub)


cdef inline int value_of(uint32_t cls, int feature) noexcept nogil:
    return 0 if cls == LEFT else <int>cls // STRIDES[feature] % SIZES[feature]


cdef inline uint32_t mark_of(uint32_t cls, uint32_t blocks) noexcept nogil:
    """The class of a node, and how many of its blocks were counted there."""
    return cls | min(blocks, <uint32_t>MAX_COUNTED) << CLASS_BITS


cdef inline uint32_t marked_class(uint32_t mark) noexcept nogil:
    return mark & ((1 << CLASS_BITS) - 1)


cdef inline uint32_t counted(const Event *e) noexcept nogil:
    """Blocks of a node that were counted before: others were added since, or it was split."""
    return 0 if e.is_new else min(e.mark >> CLASS_BITS, e.length)


cdef inline double price_of(const Event *e) noexcept nogil:
    """Return the cost that a hit of a node saves: ``LOAD_PRICE`` if the tier below has a copy, else 1."""
    return LOAD_PRICE if e.has_copy else 1


cdef void sort_by_time(const Event *events, Py_ssize_t n, int64_t *order) noexcept nogil:
    """The numbers of events by their last use; they come nearly in that order."""
    cdef Py_ssize_t i, at
    for i in range(n):
        at = i
        while at > 0 and events[order[at - 1]].last_access > events[i].last_access:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


def remember(pieces, Ghosts ghosts not None):
    """Record evicted ``pieces`` ((n,) of ``PIECE_DTYPE``): ``ghosts`` keep their last use and mark, for
    ``ReuseStatistics.place`` to count if they come back."""
    cdef const Piece *gone = <const Piece *>data_of(pieces)
    cdef Py_ssize_t i, n = len(pieces)
    with nogil:
        for i in range(n):
            ghosts.add_one(gone[i].first_key, gone[i].blocks, fabs(gone[i].priority), gone[i].mark)


cdef class ReuseStatistics:
    """The statistics of one tier and tenant: 100 KB, however much is cached. The caller locks."""
    cdef double[CLASSES][AGES] again      # blocks that were used again at an age, by the cost that it saved
    cdef double[CLASSES][AGES] used       # blocks that were used, at an age now, whether or not again since
    cdef double[CLASSES] recent           # those that were used since densities were derived
    cdef double[CLASSES][AGES] density    # hits per block and second
    cdef double[AGES + 1] starts          # of each age, in seconds
    cdef double[GAPS - 2] gaps            # terciles of the ages at which blocks were used again, in seconds
    cdef double[CLASSES] oldest           # age of the next to be evicted, for classes evicted from the oldest on
    cdef double price                     # density of current evictions
    cdef double seen                      # the last use, on the engine's clock
    cdef double now                       # the same on its own
    cdef double derived                   # when densities were, on its own clock
    cdef int64_t operations
    cdef int64_t due                      # operations at which densities are to be derived
    cdef readonly bint has_learned

    def __cinit__(self):
        cdef int i
        self.seen = -INFINITY
        self.due = FIRST
        for i in range(1, AGES + 1):
            self.starts[i] = FIRST_AGE_S * 2 ** (0.5 * i)

    def place(self, events, returns):
        """Count uses, and give each event its class (in ``mark``), ``queue`` and ``priority``.

        Parameters
        ----------
        events : (n,) of ``EVENT_DTYPE``
        returns : (m,) of ``RETURN_DTYPE``
            Pieces of new nodes that were evicted before, in the order of events: their last use as value, and mark.
        """
        cdef Py_ssize_t i, first = 0, n = len(events), num_returns = len(returns)
        if n == 0:
            return
        scratch = np.empty(2 * n + 1, INT64)
        cdef int64_t *order = <int64_t *>data_of(scratch, True)
        cdef int64_t *firsts = order + n                # of each event: its first return
        cdef Event *all_events = <Event *>data_of(events, True)
        cdef const Return *all_returns = <const Return *>data_of(returns)
        with nogil:
            sort_by_time(all_events, n, order)
            firsts[0] = 0
            for i in range(n):
                firsts[i + 1] = firsts[i]
                while firsts[i + 1] < num_returns and all_returns[firsts[i + 1]].event == <uint32_t>i:
                    firsts[i + 1] += 1
            for i in range(1, n + 1):
                if i == n or all_events[order[i]].last_access > all_events[order[first]].last_access:
                    self.operation(all_events, &order[first], i - first, all_returns, firsts)
                    first = i
            if self.operations >= self.due:
                self.due = self.operations + PERIOD
                self.learn()

    cdef void operation(self, Event *events, const int64_t *order, Py_ssize_t n, const Return *returns,
                        const int64_t *firsts) noexcept nogil:
        """Nodes that were used at one time, of one request."""
        cdef Event *e = &events[order[0]]
        cdef bint is_use = e.last_access > self.seen    # else they are listed because a part of them was used
        cdef Py_ssize_t i
        cdef int64_t r, deepest = -1
        cdef double total = 0, unseen = 0
        cdef int share, gap = 0                         # of new nodes: from the returned pieces, or the node before
        cdef bint came_back = False
        if is_use:
            self.seen = e.last_access
            self.operations += 1
            self.now = fmax(self.now, e.last_access + TICK_S * self.operations)
        for i in range(n):
            e = &events[order[i]]
            total = fmax(total, <double>e.depth + e.length)
            if e.length > counted(e):                   # new, or the next part of a prompt that is saved in parts
                unseen += e.length
            if e.is_new:
                for r in range(firsts[order[i]], firsts[order[i] + 1]):
                    unseen -= returns[r].blocks
                    self.again[marked_class(returns[r].mark)][age_of(self.now - returns[r].value)] += (
                        price_of(e) * returns[r].blocks)
                    gap = self.gap_of(self.now - returns[r].value)
                    came_back = True
            elif not came_back and <int64_t>e.depth > deepest:
                deepest = e.depth
                gap = self.gap_of(self.now - fabs(e.priority)) if e.new_hits else value_of(marked_class(e.mark), 2)
        share = 0 if unseen <= SMALL_SHARE * total else 1 if unseen <= LARGE_SHARE * total else 2
        for i in range(n):
            self.classify(&events[order[i]], share, gap, is_use)

    cdef void classify(self, Event *e, int share, int gap, bint is_use) noexcept nogil:
        cdef double last = fabs(e.priority)
        cdef uint32_t cls, was = marked_class(e.mark)
        if e.is_new:
            cls = class_of(share, NEW, gap, False)
        elif e.new_hits:
            self.again[was][age_of(self.now - last)] += price_of(e) * counted(e)
            cls = class_of(share, HIT, self.gap_of(self.now - last), e.children > 1)
        else:                                           # the put after the get, or the next part of a put
            self.count_use(was, last, -<double>counted(e))
            cls = class_of(max(share, value_of(was, 0)), value_of(was, 1), value_of(was, 2), e.children > 1)
            if not is_use:
                cls = LEFT
        if is_use or e.is_new:
            last = self.now
            e.priority = -self.now if self.newest_first(cls) else self.now
        self.count_use(cls, last, e.length)
        e.mark = mark_of(cls, e.length)
        e.queue = <uint8_t>(cls + (CLASSES if e.priority < 0 else 0))

    cdef inline int gap_of(self, double seconds) noexcept nogil:
        cdef int i = 0
        while i < GAPS - 2 and seconds >= self.gaps[i]:
            i += 1
        return 1 + i

    cdef inline void count_use(self, uint32_t cls, double at, double blocks) noexcept nogil:
        cdef double *used = &self.recent[cls]
        if at < self.derived:
            used = &self.used[cls][age_of(self.derived - at)]
        used[0] = fmax(used[0] + blocks, 0)

    cdef bint newest_first(self, uint32_t cls) noexcept nogil:
        cdef double at_first = self.density[cls][0]
        return at_first < NEAR_PRICE * self.price and (
            at_first * RISE < self.density[cls][age_of(self.oldest[cls])])

    def choose(self, const double[::1] heads not None):
        """Choose the queue to evict from, given the lowest priority of each (``heads``), and a priority: the nodes of
        that queue below this priority are worth no more than its first."""
        cdef int q, best = 0
        cdef double age, density, lowest = INFINITY, second = INFINITY, below
        with nogil:
            for q in range(2 * CLASSES):
                if heads[q] == INFINITY:
                    continue
                age = fmax(self.now - fabs(heads[q]), 0)
                if q < CLASSES:
                    self.oldest[q] = age
                # of equal ones the older; until something is known that is LRU
                density = self.density[q % CLASSES][age_of(age)] + 1e-13 / (1 + age)
                if density < lowest:
                    second, lowest, best = lowest, density, q
                elif density < second:
                    second = density
            if not self.has_learned:
                below = heads[best]
            elif best < CLASSES:
                below = self.now - self.starts[age_of(self.now - heads[best])]
            else:
                below = self.starts[age_of(self.now + heads[best]) + 1] - self.now
            if self.has_learned:
                self.price += PRICE_WEIGHT * (lowest - self.price)
        return best, nextafter(fmax(below, heads[best]), INFINITY)

    # ---- densities --------------------------------------------------------------------------------------------

    cdef void learn(self) noexcept nogil:
        cdef double[FEATURES + 1][MAX_VALUES][AGES] likelier
        cdef double[CLASSES][AGES] known
        cdef double[AGES] mean, chance
        cdef double weight, expected
        cdef int c, a, f
        self.grow_older()
        weight = PRIOR * self.count_known(known)
        if weight <= 0:
            return
        self.average(known, weight, mean)
        self.compare(known, mean, weight, likelier)
        for c in range(CLASSES):
            expected = 0
            for a in range(AGES):
                chance[a] = mean[a]
                if c == LEFT:
                    chance[a] *= likelier[FEATURES][0][a]
                else:
                    for f in range(FEATURES):
                        chance[a] *= likelier[f][value_of(c, f)][a]
                expected += chance[a]
            for a in range(AGES):
                chance[a] *= weight * fmin(1.0, 0.999 / fmax(expected, 1e-300))
                chance[a] = (self.again[c][a] + chance[a]) / (known[c][a] + weight)
            self.set_density(c, chance)
        for c in range(CLASSES):
            for a in range(AGES):
                self.used[c][a] *= DECAY
                self.again[c][a] *= DECAY
        self.has_learned = True

    cdef void grow_older(self) noexcept nogil:
        """Move used blocks to the ages that they have now, as if they were spread evenly within each age."""
        cdef double passed = fmax(self.now - self.derived, TICK_S)
        cdef double[AGES] stays, came
        cdef int[AGES] to
        cdef double start, moved
        cdef int c, a
        for a in range(AGES):
            start = self.starts[a] + passed
            to[a] = age_of(start)                       # and the next: ages are longer, the higher they are
            stays[a] = 1.0 if to[a] == AGES - 1 else fmax(
                0, fmin((self.starts[to[a] + 1] - start) / (self.starts[a + 1] - self.starts[a]), 1))
            came[a] = fmax(fmin(self.starts[a + 1], passed) - self.starts[a], 0) / passed
        for c in range(CLASSES):
            for a in range(AGES - 1, -1, -1):
                moved, self.used[c][a] = self.used[c][a], 0
                self.used[c][to[a]] += stays[a] * moved
                if stays[a] < 1:
                    self.used[c][to[a] + 1] += (1 - stays[a]) * moved
            for a in range(AGES):
                self.used[c][a] += came[a] * self.recent[c]
            self.recent[c] = 0
        self.derived = self.now

    cdef double count_known(self, double[AGES] *known) noexcept nogil:
        """Count the blocks for which reuse at each age is known; returns how many were used.

        A count of all blocks underrates high ages, which most have not reached; a count of those that have
        (Kaplan-Meier) rests on few and old ones. This is the geometric mean.
        """
        cdef double total = 0, used, older
        cdef int c, a
        for c in range(CLASSES):
            used = 0
            for a in range(AGES):
                used += self.used[c][a]
            older = used
            for a in range(AGES):
                known[c][a] = sqrt(used * fmax(older - self.used[c][a] / 2, 0))
                older -= self.used[c][a]
            total += used
        return total

    cdef void average(self, double[AGES] *known, double weight, double *mean) noexcept nogil:
        """The chance to be used again at each age, of all classes together; and the bounds of the gaps."""
        cdef double again, blocks, below = 0, total = 0
        cdef double[AGES] all_again
        cdef int c, a, i = 0
        for a in range(AGES):
            again = blocks = 0
            for c in range(CLASSES):
                again += self.again[c][a]
                blocks += known[c][a]
            mean[a] = again / (blocks + weight)
            all_again[a] = again
            total += again
        for a in range(AGES):
            while i < GAPS - 2 and below + all_again[a] > total * (i + 1) / (GAPS - 1):
                self.gaps[i] = self.starts[a] + (self.starts[a + 1] - self.starts[a]) * (
                    total * (i + 1) / (GAPS - 1) - below) / all_again[a]
                i += 1
            below += all_again[a]

    cdef void compare(self, double[AGES] *known, const double *mean, double weight,
                      double[MAX_VALUES][AGES] *likelier) noexcept nogil:
        """By how much a value of a feature makes a use at about each age likelier, taken by itself (naive Bayes)."""
        cdef double[FEATURES + 1][MAX_VALUES][AGES] again, expected
        cdef double[AGES] usual
        cdef double total = 0, some_again, some_expected
        cdef int c, a, b, f, v
        memset(again, 0, sizeof(again))
        memset(expected, 0, sizeof(expected))
        for a in range(AGES):
            total += mean[a]
        for a in range(AGES):
            usual[a] = mean[a] + PRIOR * total / AGES + 1e-300
        for c in range(CLASSES):
            for f in range(FEATURES + 1):
                if (f == FEATURES) != (c == LEFT):      # the last class has no features
                    continue
                v = value_of(c, f)
                for a in range(AGES):
                    again[f][v][a] += self.again[c][a]
                    expected[f][v][a] += known[c][a] * usual[a]
        for f in range(FEATURES + 1):
            for v in range(SIZES[f] if f < FEATURES else 1):
                for a in range(AGES):
                    some_again = some_expected = 0
                    for b in range(max(a - SMOOTH, 0), min(a + SMOOTH + 1, AGES)):
                        some_again += again[f][v][b] + weight * usual[b]
                        some_expected += expected[f][v][b] + weight * usual[b]
                    likelier[f][v][a] = fmin(MAX_RATIO, some_again / some_expected)

    cdef void set_density(self, int c, const double *chance) noexcept nogil:
        """The best slope from each age on is that to the next corner of the upper hull of hits over block seconds."""
        cdef double[AGES + 1] hits, block_seconds
        cdef int[AGES + 1] hull                         # from the last age: where the best time to stop may be
        cdef int a, top = 0
        hits[0] = block_seconds[0] = 0
        for a in range(AGES):
            block_seconds[a + 1] = block_seconds[a] + (self.starts[a + 1] - self.starts[a]) * fmax(
                1 - hits[a] - chance[a] / 2, MIN_LEFT)
            hits[a + 1] = hits[a] + chance[a]
        hull[0] = AGES
        for a in range(AGES - 1, -1, -1):
            while top and slope(hits, block_seconds, a, hull[top]) <= slope(hits, block_seconds, a, hull[top - 1]):
                top -= 1
            # of those without a use, the older is less
            self.density[c][a] = slope(hits, block_seconds, a, hull[top]) + 1e-12 / self.starts[a + 1]
            top += 1
            hull[top] = a


cdef inline double slope(const double *y, const double *x, int a, int b) noexcept nogil:
    return (y[b] - y[a]) / (x[b] - x[a])
