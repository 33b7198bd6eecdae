cdef class Arena:
    cdef char *data
    cdef readonly size_t num_bytes
