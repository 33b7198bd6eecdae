"""Two shared-memory rings of records between an engine and the daemon: requests one way, replies the other."""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EMSGSIZE, ENOSPC
from libc.stdint cimport int64_t, uint32_t, uint64_t

from flexkv._core.csrc.ring cimport (
    flexkv_part,
    flexkv_ring_note,
    flexkv_ring_pop,
    flexkv_ring_push,
    flexkv_ring_read_note,
)
from flexkv._core.ring_pair cimport RingPair
from flexkv.errors import RingCorruptedError

cdef enum:
    MAX_PARTS = 4


cdef class RecordRings(RingPair):
    """One end of the rings of a session.

    The end that is made without ``fds`` makes the memory: it receives requests and sends replies. The other end is made
    from its descriptors, in another process: it sends requests and receives replies.

    Parameters
    ----------
    data_bytes : int
        Data bytes of each ring; a power of two, at least 4096.
    fds : sequence of int, optional
        ``fds`` of the other end: memfd, eventfd of requests, eventfd of replies. The object owns them from here on,
        also if it raises.

    Raises
    ------
    RegistrationError
        The memory has another size, or can be resized.
    RingCorruptedError
        The memory holds no rings of this version.
    """

    def __cinit__(self, Py_ssize_t data_bytes, fds=None):
        self.open("session", data_bytes, fds is not None, fds)

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
