from libc.stdint cimport uint8_t, uint64_t


cdef class SharedMapping:
    cdef uint8_t *data
    cdef readonly uint64_t num_bytes
    cdef Py_ssize_t num_views
    cdef void unmap(self) noexcept
