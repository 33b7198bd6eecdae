from libc.stdint cimport uint64_t


cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    """


cdef extern from "<xxhash.h>" nogil:
    ctypedef struct XXH128_hash_t:
        uint64_t low64
        uint64_t high64

    enum: XXH3_SECRET_DEFAULT_SIZE

    XXH128_hash_t XXH3_128bits(const void *data, size_t length)
    XXH128_hash_t XXH3_128bits_withSecret(const void *data, size_t length, const void *secret, size_t secret_size)
    uint64_t XXH3_64bits(const void *data, size_t length)
    uint64_t XXH3_64bits_withSeed(const void *data, size_t length, uint64_t seed)
    int XXH3_generateSecret(void *secret, size_t secret_size, const void *seed, size_t seed_size)
