"""Whether the index checks its invariants on every operation: `./build.sh --debug`, and builds with sanitizers."""
cdef extern from *:
    """
    #ifdef FLEXKV_DEBUG
    #define FLEXKV_CHECKS 1
    #else
    #define FLEXKV_CHECKS 0
    #endif
    """
    enum: FLEXKV_CHECKS
