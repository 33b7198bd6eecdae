from libc.stdint cimport uint64_t


cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    """


cdef extern from "<xxhash.h>" nogil:
    uint64_t XXH3_64bits(const void *data, size_t length)
    uint64_t XXH3_64bits_withSeed(const void *data, size_t length, uint64_t seed)
