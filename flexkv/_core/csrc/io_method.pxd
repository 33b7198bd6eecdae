from flexkv._core.csrc.io_queue cimport flexkv_io_method


cdef extern from "io_method.h" nogil:
    const flexkv_io_method flexkv_io_uring
    const flexkv_io_method flexkv_io_threads
