from libc.stdint cimport uint8_t

from flexkv._core.csrc.ring cimport flexkv_ring
from flexkv._core.mapping cimport SharedMapping


cdef class RingPair:
    cdef readonly int fd, sending_event_fd, receiving_event_fd
    cdef readonly Py_ssize_t ring_bytes, max_record
    cdef SharedMapping memory
    cdef uint8_t *buffer
    cdef flexkv_ring sending, receiving
    cdef bint sends_first
    cdef open(self, str name, Py_ssize_t data_bytes, bint sends_first, fds=*)
    cdef attach(self)
