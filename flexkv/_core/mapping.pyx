"""Memory of a memfd, shared with other processes; keeps no descriptor open, unlike ``mmap.mmap``."""
import os

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void *MAP_FAILED


cdef class SharedMapping:
    """The first ``num_bytes`` bytes of ``fd``, mapped until the object goes.

    Raises
    ------
    OSError
    """

    def __cinit__(self, int fd, uint64_t num_bytes):
        cdef void *data = mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        self.data = NULL
        if data == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.data = <uint8_t *>data
        self.num_bytes = num_bytes

    cdef void unmap(self) noexcept:
        if self.data != NULL:
            munmap(self.data, self.num_bytes)
            self.data = NULL

    def __dealloc__(self):
        self.unmap()
