"""Hash table from keys to the numbers of items, open addressing with linear probing.

The table keeps no keys: ``KeyOf`` finds the key of an item. All functions are inline, so that a constant ``KeyOf`` is
compiled into them. The owner allocates the places, and keeps the load at a half at most.
"""
from libc.stdint cimport int32_t, uint64_t

ctypedef const uint64_t *(*KeyOf)(const void *items, int32_t number) noexcept nogil

cdef struct KeyTable:
    int32_t *numbers                  # of the item at each place, from 1; 0: the place is free
    uint64_t mask                     # number of places - 1
    uint64_t factor                   # random and odd
    int shift                         # 64 - log2 of the number of places


cdef inline void set_places(KeyTable *table, int32_t *numbers, uint64_t num_places) noexcept nogil:
    """``numbers`` ((num_places,) zeros; a power of two, at least 2) are the places of the table from now on."""
    table.numbers = numbers
    table.mask = num_places - 1
    table.shift = 64
    while num_places > 1:
        num_places >>= 1
        table.shift -= 1


cdef inline uint64_t home(const KeyTable *table, const uint64_t *key) noexcept nogil:
    """Where the search for a key begins. Keys can be made whose bits agree (2^20 hashes for 20 bits), and would all
    meet in one place; where they lie depends on a random factor (multiply-shift, Dietzfelbinger 1997)."""
    return key[0] * table.factor >> table.shift


cdef inline uint64_t find_place(const KeyTable *table, const void *items, KeyOf key_of, const uint64_t *key,
                                int num_words) noexcept nogil:
    """The place of the item with a key of ``num_words`` words (1 or 2), or the free place where it would be."""
    cdef uint64_t at = home(table, key)
    cdef const uint64_t *other
    while table.numbers[at]:
        other = key_of(items, table.numbers[at])
        if other[0] == key[0] and (num_words == 1 or other[1] == key[1]):
            break
        at = (at + 1) & table.mask
    return at


cdef inline void put_number(KeyTable *table, const uint64_t *key, int32_t number) noexcept nogil:
    """Add an item with a key that the table lacks."""
    cdef uint64_t at = home(table, key)
    while table.numbers[at]:
        at = (at + 1) & table.mask
    table.numbers[at] = number


cdef inline void free_place(KeyTable *table, const void *items, KeyOf key_of, uint64_t hole) noexcept nogil:
    """Remove the item at a place, and shift back items that were placed past it."""
    cdef uint64_t at = hole, origin
    while True:
        at = (at + 1) & table.mask
        if not table.numbers[at]:
            break
        origin = home(table, key_of(items, table.numbers[at]))
        if ((at - origin) & table.mask) >= ((at - hole) & table.mask):
            table.numbers[hole] = table.numbers[at]
            hole = at
    table.numbers[hole] = 0
