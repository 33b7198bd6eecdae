"""Address space reserved once and touched on demand, so that an array can grow without ever moving."""
from cpython.buffer cimport PyBuffer_FillInfo

from flexkv._core.arena cimport Arena  # no-cython-lint


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    void *MAP_FAILED


cdef class Arena:
    """Zero-filled private memory of ``num_bytes`` bytes; pages cost memory only once written.

    Views taken from the buffer keep the arena alive, and its address never changes: a policy may hold a numpy
    view of the index across insertions.

    Raises
    ------
    MemoryError
        The kernel refused the reservation.
    """

    def __cinit__(self, size_t num_bytes):
        self.num_bytes = num_bytes
        self.data = NULL
        cdef void *data = mmap(
            NULL, max(num_bytes, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
        )
        if data == MAP_FAILED:
            raise MemoryError(f"cannot reserve {num_bytes} bytes of address space for the index")
        self.data = <char *>data

    def __dealloc__(self):
        if self.data != NULL:
            munmap(self.data, max(self.num_bytes, 1))

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.num_bytes, 0, flags)

    def __len__(self):
        return self.num_bytes
