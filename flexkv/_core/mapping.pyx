"""Memory of a memfd, shared with other processes; keeps no descriptor open, unlike ``mmap.mmap``."""
import os

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int MADV_REMOVE
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE
    void *MAP_FAILED

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_mbind

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef enum:
    MPOL_PREFERRED = 1
    NODE_WORDS = 16                # of 64 nodes each; the kernel has 1,024 at most
    MADV_COLLAPSE = 25             # of Linux 6.1; not in the headers of every C library

cdef uint64_t HUGE_PAGES[2]        # bytes; larger first
HUGE_PAGES[0] = 1 << 30
HUGE_PAGES[1] = 1 << 21


cdef void *map_aligned(int fd, uint64_t num_bytes) noexcept nogil:
    """Map at a multiple of the largest huge page that the memory may consist of: others are mapped as small pages."""
    cdef uint64_t alignment = 0, whole_pages = (num_bytes + 4095) // 4096 * 4096, ahead, i
    cdef uint8_t *reserved
    for i in range(2):
        if alignment == 0 and num_bytes >= HUGE_PAGES[i]:
            alignment = HUGE_PAGES[i]
    if alignment == 0:
        return mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    reserved = <uint8_t *>mmap(NULL, whole_pages + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                               -1, 0)
    if reserved == MAP_FAILED:
        return MAP_FAILED
    ahead = (alignment - <uintptr_t>reserved % alignment) % alignment
    if mmap(reserved + ahead, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED:
        munmap(reserved, whole_pages + alignment)
        return MAP_FAILED
    if ahead:
        munmap(reserved, ahead)
    munmap(reserved + ahead + whole_pages, alignment - ahead)
    return reserved + ahead


cdef class SharedMapping:
    """The first ``num_bytes`` bytes of ``fd``, mapped until the object is freed. A buffer: ``memoryview`` takes it.

    Raises
    ------
    OSError
    """

    def __cinit__(self, int fd, uint64_t num_bytes):
        cdef void *data = map_aligned(fd, num_bytes)
        self.data = NULL
        if data == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.data = <uint8_t *>data
        self.num_bytes = num_bytes
        self.num_views = 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.data == NULL:
            raise ValueError("the memory is not mapped any more")
        PyBuffer_FillInfo(view, self, self.data, self.num_bytes, False, flags)
        self.num_views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.num_views -= 1

    def collapse(self, uint64_t offset, uint64_t num_bytes):
        """Make 2 MiB pages of the whole ones in a range, for every process that maps the memory.

        The small pages of the range must not be pinned. Pages that are absent become zeros, where their 2 MiB have at
        least one page that is there.

        Returns
        -------
        int
            0, or the errno with which the kernel refused; some of the range may be huge pages then.
        """
        cdef int rc
        if offset + num_bytes > self.num_bytes or self.data == NULL:
            raise ValueError(f"bytes {offset} to {offset + num_bytes} of {self.num_bytes}: not mapped")
        with nogil:
            rc = madvise(self.data + offset, num_bytes, MADV_COLLAPSE)
        return errno if rc else 0

    def place(self, uint64_t offset, uint64_t num_bytes, unsigned int node):
        """Prefer a NUMA node for memory of whole pages that is allocated later, in whichever process.

        Returns
        -------
        int
            0, or the errno with which the kernel refused: EINVAL, there is no such node with memory.
        """
        cdef unsigned long nodes[NODE_WORDS]
        cdef long rc
        cdef int i
        if offset + num_bytes > self.num_bytes or self.data == NULL or node >= 64 * NODE_WORDS:
            raise ValueError(f"bytes {offset} to {offset + num_bytes} of {self.num_bytes} on node {node}")
        for i in range(NODE_WORDS):
            nodes[i] = 1ul << node % 64 if i == <int>(node // 64) else 0
        rc = syscall(SYS_mbind, self.data + offset, num_bytes, <long>MPOL_PREFERRED, nodes, <long>(64 * NODE_WORDS + 1),
                     <long>0)
        return errno if rc else 0

    def free(self, uint64_t offset, uint64_t num_bytes):
        """Give the memory of whole pages back to the kernel, for every process that maps it: zeros are there then. A
        page that is pinned somewhere stays allocated until it is unpinned, and is not part of this memory any more.

        Raises
        ------
        OSError
        """
        cdef int rc
        if offset + num_bytes > self.num_bytes or self.data == NULL:
            raise ValueError(f"bytes {offset} to {offset + num_bytes} of {self.num_bytes}: not mapped")
        with nogil:
            rc = madvise(self.data + offset, num_bytes, MADV_REMOVE)
        if rc:
            raise OSError(errno, os.strerror(errno))

    def close(self):
        """Unmap, unless a view is in use: then the last one unmaps when the object is freed. Can be called again.

        Raises
        ------
        BufferError
            A view is in use; nothing has changed.
        """
        if self.num_views:
            raise BufferError(f"{self.num_views} views of the memory are in use")
        self.unmap()

    @property
    def closed(self):
        """Whether ``close`` has unmapped it."""
        return self.data == NULL

    cdef void unmap(self) noexcept:
        if self.data != NULL:
            munmap(self.data, self.num_bytes)
            self.data = NULL

    def __dealloc__(self):
        self.unmap()
