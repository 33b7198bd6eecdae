from libc.stdint cimport uint8_t

from flexkv._core.csrc.io_queue cimport flexkv_io_method, flexkv_io_options, flexkv_io_queue


cdef class IoQueue:
    cdef flexkv_io_queue *queue
    cdef const uint8_t[::1] memory
    cdef str refusal
    cdef readonly str method
    cdef readonly int event_fd

    cdef const flexkv_io_method *table(self) except NULL
    cdef int open(self, flexkv_io_options *options) except 1
    cdef flexkv_io_queue *opened(self) except NULL
