"""Two shared-memory rings of records between an engine and the daemon: requests one way, replies the other."""
import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EMSGSIZE, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from flexkv._core.csrc.ring cimport (
    FLEXKV_RING_HEADER,
    flexkv_part,
    flexkv_ring,
    flexkv_ring_attach,
    flexkv_ring_create,
    flexkv_ring_max_record,
    flexkv_ring_note,
    flexkv_ring_pop,
    flexkv_ring_push,
    flexkv_ring_read_note,
    flexkv_ring_readable,
    flexkv_ring_set_waiting,
)
from flexkv._core.mapping cimport SharedMapping
from flexkv._core.sealed_memory import check_sealed, sealed_memfd
from flexkv.errors import RingCorruptedError

cdef enum:
    MAX_PARTS = 4

HEADER_BYTES = FLEXKV_RING_HEADER


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class RecordRings:
    """One end of two rings in one memfd, with an eventfd for each.

    The end that is made without ``fds`` makes the memory: it receives requests and sends replies. The other end is made
    from its descriptors, in another process: it sends requests and receives replies. Each ring has one sender and one
    receiver; a caller that shares an end between threads must lock.

    Parameters
    ----------
    data_bytes : int
        Data bytes of each ring; a power of two, at least 4096.
    fds : sequence of int, optional
        Memfd, eventfd of requests, eventfd of replies. The object owns them from here on, also if it raises.

    Attributes
    ----------
    fd, request_event_fd, reply_event_fd : int
        Owned by this object.
    ring_bytes : int
        Size of each ring, its header included.
    max_record : int
        Bytes of the largest record.

    Raises
    ------
    RegistrationError
        The memory has another size, or can be resized.
    RingCorruptedError
        The memory holds no rings of this version.
    """

    cdef readonly int fd, request_event_fd, reply_event_fd
    cdef readonly Py_ssize_t ring_bytes, max_record
    cdef SharedMapping memory
    cdef uint8_t *buffer
    cdef flexkv_ring sending, receiving

    def __cinit__(self, Py_ssize_t data_bytes, fds=None):
        self.fd = self.request_event_fd = self.reply_event_fd = -1
        self.buffer = NULL
        if fds is not None:
            self.fd, self.request_event_fd, self.reply_event_fd = fds
        try:
            if data_bytes < 4096 or data_bytes & (data_bytes - 1):
                raise ValueError(f"a ring of {data_bytes} bytes; give a power of two, at least 4096")
            self.ring_bytes = FLEXKV_RING_HEADER + data_bytes
            self.open(fds is None)
        except BaseException:
            self.close()
            raise

    cdef open(self, bint is_maker):
        cdef uint8_t *first
        cdef uint8_t *second
        if is_maker:
            self.fd = sealed_memfd("flexkv-session", 2 * self.ring_bytes)
            self.request_event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.reply_event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            check_sealed(self.fd, 2 * self.ring_bytes, "the memory of the session")
        self.memory = SharedMapping(self.fd, 2 * self.ring_bytes)
        first = self.memory.data
        second = first + self.ring_bytes
        if is_maker:
            flexkv_ring_create(first, self.ring_bytes)
            flexkv_ring_create(second, self.ring_bytes)
        if (
            flexkv_ring_attach(&self.receiving if is_maker else &self.sending, first, self.ring_bytes,
                               self.request_event_fd)
            or flexkv_ring_attach(&self.sending if is_maker else &self.receiving, second, self.ring_bytes,
                                  self.reply_event_fd)
        ):
            raise RingCorruptedError("the memory of the session holds no rings of this version")
        self.max_record = flexkv_ring_max_record(&self.sending)
        self.buffer = <uint8_t *>malloc(self.ring_bytes)
        if self.buffer == NULL:
            raise MemoryError(f"no memory for a ring of {self.ring_bytes} bytes")

    def __dealloc__(self):
        free(self.buffer)

    def close(self):
        """Close the descriptors. The memory is unmapped with the object. Can be called again."""
        for fd in (self.fd, self.request_event_fd, self.reply_event_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.request_event_fd = self.reply_event_fd = -1

    def push(self, uint32_t kind, *parts):
        """Send a record of up to four parts, each a contiguous buffer; False: the ring is full now.

        Raises
        ------
        ValueError
            The record is longer than ``max_record``.
        RingCorruptedError
            The other end's position is impossible.
        """
        cdef Py_buffer views[MAX_PARTS]
        cdef flexkv_part given[MAX_PARTS]
        cdef int count = 0, rc = -EMSGSIZE
        cdef uint64_t size = 0
        if len(parts) > MAX_PARTS:
            raise ValueError(f"a record of {len(parts)} parts; at most {MAX_PARTS}")
        try:
            for part in parts:
                PyObject_GetBuffer(part, &views[count], PyBUF_SIMPLE)
                count += 1
                size += views[count - 1].len
                if size > <uint64_t>self.max_record:
                    raise ValueError(f"a record of {size} bytes or more; the limit is {self.max_record}")
                given[count - 1].data, given[count - 1].size = views[count - 1].buf, <uint32_t>views[count - 1].len
            rc = flexkv_ring_push(&self.sending, kind, given, count, 0)
        finally:
            for i in range(count):
                PyBuffer_Release(&views[i])
        if rc == 0:
            return True
        if rc == -ENOSPC:
            return False
        raise RingCorruptedError("the position of the other end is impossible")

    def pop(self):
        """The next record, ``(kind, content)``, or None.

        Raises
        ------
        RingCorruptedError
            The other end has written an invalid record.
        """
        cdef uint32_t kind = 0
        cdef int64_t size = flexkv_ring_pop(&self.receiving, &kind, self.buffer, self.ring_bytes)
        if size == -EAGAIN:
            return None
        if size < 0:
            raise RingCorruptedError("the ring holds an invalid record")
        return kind, PyBytes_FromStringAndSize(<char *>self.buffer, size)

    def set_waiting(self, bint waiting):
        """Ask for a write to the eventfd of the ring that this end receives from, at the next record, or waive it; True
        if a record is there now."""
        return bool(flexkv_ring_set_waiting(&self.receiving, waiting))

    def spin(self, Py_ssize_t spin_ns):
        """Watch for a record for up to ``spin_ns`` nanoseconds, without the GIL; True if there is one."""
        cdef int64_t until
        cdef bint found = False
        with nogil:
            until = now_ns() + spin_ns
            while not found:
                found = flexkv_ring_readable(&self.receiving)
                if not found and now_ns() >= until:
                    break
        return found

    def note(self, uint32_t index, uint64_t value):
        """Publish a number under an index from 0 to 7, in place of the one before."""
        if index > 7:
            raise ValueError(f"index {index} of a note; the largest is 7")
        flexkv_ring_note(&self.sending, index, value)

    def read_note(self, uint32_t index):
        """The number that the other end has published under an index: any 64-bit number; 0: none yet."""
        if index > 7:
            raise ValueError(f"index {index} of a note; the largest is 7")
        return flexkv_ring_read_note(&self.receiving, index)
