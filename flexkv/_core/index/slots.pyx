"""Slots of a tier: a bitmap of the free slots, with a summary above it, that hands out contiguous runs where it can.

Runs matter because copies of neighbouring slots merge into one. The search starts where the last one ended, looks for
a run of the requested length, in a bounded stretch, and else takes the free runs as they come.
"""
import numpy as np

from libc.stdint cimport int32_t, uint32_t, uint64_t

from flexkv._core.arena cimport Arena
from flexkv._core.buffers cimport data_of
from flexkv._core.index.checks cimport FLEXKV_CHECKS
from flexkv.errors import InvariantError

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil
    int __builtin_popcountll(unsigned long long) nogil

INT32 = np.dtype(np.int32)
UINT32 = np.dtype(np.uint32)

cdef enum:
    SEARCH_RUNS = 256          # free runs looked at for one that is long enough


cdef class SlotAllocator:
    """Allocator of slots ``0`` to ``capacity - 1``; ``capacity`` can grow up to ``limit``, and shrink. The caller
    locks.

    Shrinking has two steps: after ``withdraw(bound)``, slots from ``bound`` on are not allocated; when all of them are
    free, ``settle`` ends the shrink. Each slot has a generation, which counts how often it was freed (modulo 2**32).

    Attributes
    ----------
    capacity : int
        Slots in use, and slots that can be allocated.
    bound : int
        Only slots below it are allocated.
    num_free : int
        Slots that can be allocated.

    Raises
    ------
    InvariantError
        A slot was freed that is not in use; nothing has changed then.
    """
    cdef readonly Py_ssize_t bound
    cdef readonly Py_ssize_t limit
    cdef readonly Py_ssize_t num_free
    cdef Py_ssize_t end        # slots below it exist
    cdef Py_ssize_t num_above  # free slots from ``bound`` on
    cdef Arena bits_arena
    cdef Arena summary_arena
    cdef Arena times_arena
    cdef uint64_t *bits        # bit set: free
    cdef uint64_t *summary     # bit set: the word has a free slot
    cdef uint32_t *times       # that each slot was freed
    cdef Py_ssize_t hint

    def __cinit__(self, Py_ssize_t capacity=0, limit=None):
        self.limit = capacity if limit is None else limit
        if not 0 <= capacity <= self.limit or self.limit >= 1 << 31:
            raise ValueError(f"capacity {capacity}, limit {self.limit}: need 0 <= capacity <= limit < 2**31")
        self.bits_arena = Arena((self.limit // 64 + 2) * 8)
        self.summary_arena = Arena((self.limit // 4096 + 2) * 8)
        self.bits = <uint64_t *>self.bits_arena.data
        self.summary = <uint64_t *>self.summary_arena.data
        self.times_arena = Arena((self.limit + 1) * 4)
        self.times = <uint32_t *>self.times_arena.data
        self.grow(capacity)

    @property
    def capacity(self):
        return self.end - self.num_above

    def grow(self, Py_ssize_t capacity):
        """Make slots up to ``capacity - 1`` available, also slots that were withdrawn."""
        if not self.bound <= capacity <= self.limit:
            raise ValueError(f"grow to {capacity}: allowed is {self.bound} to {self.limit}")
        cdef Py_ssize_t slot
        with nogil:
            for slot in range(self.end, capacity):
                self.set_free(slot)
        self.num_above += max(0, capacity - self.end)
        self.end = max(self.end, capacity)
        self.move_bound(capacity)

    def withdraw(self, Py_ssize_t bound):
        """Allocate no slot from ``bound`` on any more. Slots in use stay until they are freed."""
        if not 0 <= bound <= self.bound:
            raise ValueError(f"withdraw from {bound} on: allowed is 0 to {self.bound}")
        self.move_bound(bound)

    cdef void move_bound(self, Py_ssize_t bound) noexcept:
        cdef Py_ssize_t moved = self.count_free(min(bound, self.bound), max(bound, self.bound))
        if bound < self.bound:
            moved = -moved
        self.num_free += moved
        self.num_above -= moved
        self.bound = bound
        if self.hint >= bound:
            self.hint = 0

    def settle(self):
        """End a shrink: slots from ``bound`` on do not exist any more, until ``grow``. Returns False, and changes
        nothing, while one of them is in use."""
        cdef Py_ssize_t slot
        if self.num_above < self.end - self.bound:
            return False
        with nogil:
            for slot in range(self.bound, self.end):
                self.set_used(slot)
        self.end, self.num_above = self.bound, 0
        return True

    cdef Py_ssize_t count_free(self, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
        cdef Py_ssize_t word, count = 0
        cdef uint64_t bits
        for word in range(start >> 6, (stop + 63) >> 6):
            bits = self.bits[word]
            if word == start >> 6:
                bits &= ~<uint64_t>0 << (start & 63)
            if word == stop >> 6:
                bits &= ~(~<uint64_t>0 << (stop & 63))
            count += __builtin_popcountll(bits)
        return count

    cdef inline void set_free(self, Py_ssize_t slot) noexcept nogil:
        self.bits[slot >> 6] |= <uint64_t>1 << (slot & 63)
        self.summary[slot >> 12] |= <uint64_t>1 << ((slot >> 6) & 63)

    cdef inline void set_used(self, Py_ssize_t slot) noexcept nogil:
        self.bits[slot >> 6] &= ~(<uint64_t>1 << (slot & 63))
        if self.bits[slot >> 6] == 0:
            self.summary[slot >> 12] &= ~(<uint64_t>1 << ((slot >> 6) & 63))

    cdef Py_ssize_t next_free(self, Py_ssize_t slot) noexcept nogil:
        """The first free slot at or after ``slot``; ``bound`` if there is none."""
        cdef Py_ssize_t word, group
        cdef uint64_t found
        if slot >= self.bound:
            return self.bound
        word = slot >> 6
        found = self.bits[word] >> (slot & 63)
        if found:
            return slot + __builtin_ctzll(found)
        word += 1
        group = word >> 6
        found = self.summary[group] & (~<uint64_t>0 << (word & 63))
        while not found:
            group += 1
            if group << 12 >= self.bound:
                return self.bound
            found = self.summary[group]
        word = (group << 6) + __builtin_ctzll(found)
        return min((word << 6) + __builtin_ctzll(self.bits[word]), self.bound)

    cdef Py_ssize_t run_length(self, Py_ssize_t slot, Py_ssize_t enough) noexcept nogil:
        """Free slots from ``slot`` on, counted up to ``enough``."""
        cdef Py_ssize_t length = 0
        cdef uint64_t used
        enough = min(enough, self.bound - slot)
        while length < enough and slot < self.bound:
            used = ~(self.bits[slot >> 6] >> (slot & 63))
            if used and __builtin_ctzll(used) < 64 - (slot & 63):
                length += __builtin_ctzll(used)
                break
            length += 64 - (slot & 63)
            slot += 64 - (slot & 63)
        return min(length, enough)

    def allocate(self, Py_ssize_t count):
        """Take ``count`` slots.

        Returns
        -------
        (count,) int32 ndarray, or None if fewer are free (then none is taken)
        """
        if count < 0:
            raise ValueError(f"allocate {count} slots")
        if count > self.num_free:
            return None
        out_array = np.empty(count, INT32)
        if count == 0:
            return out_array
        cdef int32_t *out = <int32_t *>data_of(out_array, True)
        with nogil:
            self.take(out, count)
        if FLEXKV_CHECKS:
            self.check_integrity()
        return out_array

    cdef void take(self, int32_t *out, Py_ssize_t count) noexcept nogil:
        cdef Py_ssize_t start = self.hint, taken = 0, run, best = -1, best_run = 0, _
        for _ in range(SEARCH_RUNS):               # one run for all, or the longest of those seen
            start = self.next_free(start)
            if start == self.bound:
                if self.hint == 0:
                    break
                self.hint = start = 0
                continue
            run = self.run_length(start, count)
            if run > best_run:
                best, best_run = start, run
            if run == count:
                break
            start += run
        start = best
        while taken < count:
            start = self.next_free(start)
            if start == self.bound:
                start = 0
                continue
            run = self.run_length(start, count - taken)
            for start in range(start, start + run):
                out[taken] = <int32_t>start
                taken += 1
                self.set_used(start)
            start += 1
        self.hint = start
        self.num_free -= count

    def free(self, const int32_t[::1] slots not None):
        """Give slots back."""
        cdef Py_ssize_t i, n = slots.shape[0], bad = -1, above = 0
        with nogil:
            for i in range(n):
                if not 0 <= slots[i] < self.end or self.bits[slots[i] >> 6] >> (slots[i] & 63) & 1:
                    bad = i
                    break
                self.set_free(slots[i])
            if bad >= 0:
                for i in range(bad):
                    self.set_used(slots[i])
            else:
                for i in range(n):
                    self.times[slots[i]] += 1
                    above += slots[i] >= self.bound
                self.num_free += n - above
                self.num_above += above
        if bad >= 0:
            raise InvariantError(f"slot {slots[bad]} is not in use, and cannot be freed")
        if FLEXKV_CHECKS:
            self.check_integrity()

    def generations(self, const int32_t[::1] slots not None):
        """(n,) uint32: the generation of each slot; 0 for a negative number, which is no slot."""
        cdef Py_ssize_t i, n = slots.shape[0]
        out_array = np.empty(n, UINT32)
        if n == 0:
            return out_array
        cdef uint32_t *out = <uint32_t *>data_of(out_array, True)
        for i in range(n):
            if slots[i] >= self.limit:
                raise ValueError(f"slot {slots[i]}: there are {self.limit}")
            out[i] = self.times[slots[i]] if slots[i] >= 0 else 0
        return out_array

    def changed(self, const int32_t[::1] slots not None, const uint32_t[::1] generations not None):
        """(n,) bool: slots that were freed since they had these generations; None if no slot was."""
        cdef Py_ssize_t i, n = slots.shape[0], count = 0
        if generations.shape[0] != n:
            raise ValueError(f"{generations.shape[0]} generations for {n} slots")
        for i in range(n):
            if slots[i] >= self.limit:
                raise ValueError(f"slot {slots[i]}: there are {self.limit}")
            count += slots[i] >= 0 and self.times[slots[i]] != generations[i]
        if count == 0:
            return None
        return np.not_equal(self.generations(slots), generations)

    def is_free(self, Py_ssize_t slot):
        """Whether ``slot`` is free."""
        if not 0 <= slot < self.end:
            raise ValueError(f"slot {slot}: there are {self.end}")
        return bool(self.bits[slot >> 6] >> (slot & 63) & 1)

    def check_integrity(self):
        """Recount; raise InvariantError if a count or a summary bit is wrong."""
        cdef Py_ssize_t word, free = 0
        for word in range(self.limit // 64 + 1):
            free += __builtin_popcountll(self.bits[word])
            if bool(self.bits[word]) != bool(self.summary[word >> 6] >> (word & 63) & 1):
                raise InvariantError(f"slots: the summary of word {word} is wrong")
        if free != self.num_free + self.num_above or self.num_above != self.count_free(self.bound, self.end):
            raise InvariantError(f"slots: {free} are free, {self.num_free} + {self.num_above} counted")
        if self.next_free(0) < self.bound and self.num_free == 0:
            raise InvariantError("slots: one is free, none counted")
