"""What is used again, and after how long: statistics by class of use, from which follows what is worth its place.

Every node has a *class*: by what its last use was like. Of each class is counted how many blocks were used, and at
which age how many of them were used again, cached or evicted meanwhile. From that follows the *hit density* of a class
at an age: the most hits per block and second that it can give if it is kept from then on for some time (the index of
Gittins; LHD: Beckmann, Chen, Cidon, NSDI 2018, has the mean for all time instead). What has the lowest goes first.

Ages are on a clock of its own: the engine's, which goes on by a little with each operation, so that there is an order
where it stands still.
"""
import numpy as np

from libc.math cimport INFINITY, fmax, fmin, log2, nextafter
from libc.stdint cimport int64_t, uint8_t, uint32_t

from flexkv._core.ranking cimport Event, Return

cdef enum:
    SHARES = 3                         # how much of the request was never seen before
    ROLES = 2
    GAPS = 5                           # time between the last two uses
    HUBS = 2                           # whether sequences part behind it
    LEFT = SHARES * ROLES * GAPS * HUBS     # the class of what was left aside when a node was used in part
    CLASSES = LEFT + 1
    AGES = 72
    FEATURES = 4

NUM_CLASSES = CLASSES

cdef double SMALL_SHARE = 0.1
cdef double LARGE_SHARE = 0.5
cdef double SHORT_GAP_S = 4.0
cdef double FIRST_AGE_S = 1e-3         # with two ages an octave, the last begins after two years
cdef double TICK_S = 0.0005            # of its own clock, for each operation
cdef double PRIOR = 0.01               # weight of what features tell apart from each other, as a share of all uses
cdef double MAX_RATIO = 20.0
cdef double DECAY = 0.99
cdef int64_t PERIOD = 100

cdef int[FEATURES] SIZES = [SHARES, ROLES, GAPS, HUBS]
cdef int[FEATURES] STRIDES = [ROLES * GAPS * HUBS, GAPS * HUBS, HUBS, 1]


cdef inline int age_of(double seconds) noexcept nogil:
    if seconds <= FIRST_AGE_S:
        return 0
    return <int>fmin(2 * log2(seconds / FIRST_AGE_S), AGES - 1)


cdef inline int gap_class(double seconds) noexcept nogil:
    if seconds < SHORT_GAP_S:
        return 1
    return 1 + <int>fmin(log2(seconds / SHORT_GAP_S), GAPS - 2)


cdef inline int part(uint32_t cls, int feature) noexcept nogil:
    """The value that a class has of a feature."""
    return 0 if cls == LEFT else <int>cls // STRIDES[feature] % SIZES[feature]


cdef class ReuseStatistics:
    """Of one tier and quota group; the caller locks."""
    cdef double[CLASSES][AGES] again      # blocks that were used again at an age
    cdef double[CLASSES] used             # blocks that were used
    cdef double[CLASSES][AGES] density
    cdef double[AGES + 1] starts          # of each age, in seconds
    cdef double seen                      # the last use, on the engine's clock
    cdef double now                       # the same on its own
    cdef int64_t operations
    cdef int64_t due
    cdef readonly bint learned

    def __cinit__(self):
        cdef int i
        self.seen = -INFINITY
        self.due = 20
        for i in range(1, AGES + 1):
            self.starts[i] = FIRST_AGE_S * 2 ** (0.5 * i)

    def place(self, events, returns):
        cdef Py_ssize_t n = len(events), i, start = 0
        if n == 0:
            return
        cdef int64_t[::1] order = np.argsort(events["last_access"], kind="stable")
        cdef int64_t[::1] firsts = np.searchsorted(returns["event"], np.arange(n + 1, dtype=np.uint32))
        cdef uint8_t[::1] raw = events.view(np.uint8)
        cdef uint8_t[::1] raw_returns = returns.view(np.uint8)
        cdef Event *all_events = <Event *>&raw[0]
        cdef Return *all_returns = <Return *>&raw_returns[0] if len(returns) else NULL
        with nogil:
            for i in range(1, n + 1):
                if i == n or all_events[order[i]].last_access > all_events[order[start]].last_access:
                    self.operation(all_events, &order[start], i - start, all_returns, &firsts[0])
                    start = i
            if self.operations >= self.due:
                self.due = self.operations + PERIOD
                self.learn()

    cdef void operation(self, Event *events, const int64_t *order, Py_ssize_t n, const Return *returns,
                        const int64_t *firsts) noexcept nogil:
        """Nodes that were used at one time."""
        cdef Py_ssize_t i
        cdef int64_t r
        cdef Event *e = &events[order[0]]
        cdef bint fresh = e.last_access > self.seen
        cdef double now, total = 0, new = 0
        cdef int share, role, gap, hub, request_gap = 0
        cdef int64_t deepest = -1
        cdef bint from_ghost = False
        cdef uint32_t cls
        if fresh:
            self.seen = e.last_access
            self.operations += 1
            now = fmax(self.now, e.last_access + TICK_S * self.operations)
            self.now = now
        else:
            now = fmin(self.now, e.last_access + TICK_S * self.operations)
        for i in range(n):
            e = &events[order[i]]
            total = fmax(total, e.depth + e.length)
            if e.is_new:
                new += e.length
                for r in range(firsts[order[i]], firsts[order[i] + 1]):
                    new -= returns[r].blocks
                    self.again[returns[r].mark][age_of(now - returns[r].value)] += returns[r].blocks
                    request_gap = gap_class(now - returns[r].value)
                    from_ghost = True
            elif not from_ghost and <int64_t>e.depth > deepest:
                deepest = e.depth
                request_gap = gap_class(now - e.rank) if e.new_hits else part(e.mark, 2)
        share = 0 if new <= SMALL_SHARE * total else 1 if new <= LARGE_SHARE * total else 2
        for i in range(n):
            e = &events[order[i]]
            if e.is_new:
                cls = self.class_of(share, 1, request_gap, 0)
            elif e.new_hits:
                self.again[e.mark][age_of(now - e.rank)] += e.length
                cls = self.class_of(share, 0, gap_class(now - e.rank), e.children > 1)
            else:
                self.used[e.mark] = fmax(self.used[e.mark] - e.length, 0)
                role = part(e.mark, 1)
                cls = self.class_of(max(share, part(e.mark, 0)), role, part(e.mark, 2), role == 0 and e.children > 1)
                if not fresh:
                    cls = LEFT
            self.used[cls] += e.length
            e.mark = cls
            e.queue = <uint8_t>cls
            if fresh or e.is_new:
                e.rank = now

    cdef uint32_t class_of(self, int share, int role, int gap, bint hub) noexcept nogil:
        return share * STRIDES[0] + role * STRIDES[1] + gap * STRIDES[2] + hub

    cdef void learn(self) noexcept nogil:
        cdef double[FEATURES][8][AGES] part_again
        cdef double[FEATURES][8] part_used
        cdef double[AGES] mean, odds
        cdef double total = 0, weight, sum_mean = 0, x, p
        cdef int c, a, f, v
        for c in range(CLASSES):
            total += self.used[c]
        if total <= 0:
            return
        for f in range(FEATURES):
            for v in range(8):
                part_used[f][v] = 0
                for a in range(AGES):
                    part_again[f][v][a] = 0
        for a in range(AGES):
            mean[a] = 0
        for c in range(CLASSES):
            for a in range(AGES):
                mean[a] += self.again[c][a] / total
            if c == LEFT:
                break
            for f in range(FEATURES):
                v = part(c, f)
                part_used[f][v] += self.used[c]
                for a in range(AGES):
                    part_again[f][v][a] += self.again[c][a]
        for a in range(AGES):
            sum_mean += mean[a]
        weight = PRIOR * total
        for f in range(FEATURES):
            for v in range(SIZES[f]):
                for a in range(AGES):
                    x = mean[a] + PRIOR * sum_mean / AGES + 1e-300
                    part_again[f][v][a] = fmin(MAX_RATIO, (part_again[f][v][a] + weight * x) / ((part_used[f][v] + weight) * x))
        for c in range(CLASSES):
            p = 0
            for a in range(AGES):
                odds[a] = mean[a]
                if c == LEFT:
                    x = mean[a] + PRIOR * sum_mean / AGES + 1e-300
                    odds[a] *= fmin(MAX_RATIO, (self.again[c][a] + weight * x) / ((self.used[c] + weight) * x))
                else:
                    for f in range(FEATURES):
                        odds[a] *= part_again[f][part(c, f)][a]
                p += odds[a]
            x = 0.999 / p if p > 0.999 else 1.0
            for a in range(AGES):
                odds[a] = self.again[c][a] + weight * odds[a] * x
            self.index(c, odds, self.used[c] + weight)
        for c in range(CLASSES):
            self.used[c] *= DECAY
            for a in range(AGES):
                self.again[c][a] *= DECAY
        self.learned = True

    cdef void index(self, int c, const double *again, double used) noexcept nogil:
        """Set the densities of a class."""
        cdef double[AGES + 1] hits, cost
        cdef double best
        cdef int a, e
        hits[0] = cost[0] = 0
        for a in range(AGES):
            cost[a + 1] = cost[a] + (self.starts[a + 1] - self.starts[a]) * fmax(used - hits[a] - again[a] / 2, 0.005 * used)
            hits[a + 1] = hits[a] + again[a]
        for a in range(AGES):
            best = 0
            for e in range(a + 1, AGES + 1):
                best = fmax(best, (hits[e] - hits[a]) / (cost[e] - cost[a]))
            self.density[c][a] = best + 1e-12 / self.starts[a + 1]

    def choose(self, const double[::1] heads not None):
        """The queue whose head is worth least; and up to which rank what follows there is worth no more."""
        cdef int c, a, best = 0
        cdef double lowest = INFINITY, second = INFINITY, value, oldest, below
        with nogil:
            for c in range(CLASSES):
                if heads[c] == INFINITY:
                    continue
                value = heads[c]
                if self.learned:
                    value = self.density[c][age_of(self.now - heads[c])] + 1e-13 / (1 + fmax(self.now - heads[c], 0))
                if value < lowest:
                    second, lowest, best = lowest, value, c
                elif value < second:
                    second = value
        if not self.learned:
            below = fmax(second, heads[best])
        else:
            below = fmax(heads[best], self.now - self.starts[age_of(self.now - heads[best])])
        return best, nextafter(below, INFINITY)
