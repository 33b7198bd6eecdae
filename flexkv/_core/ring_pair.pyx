"""One end of two shared-memory rings between two processes, one for each direction."""
import os

from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from flexkv._core.csrc.ring cimport (
    FLEXKV_RING_HEADER,
    flexkv_ring_attach,
    flexkv_ring_create,
    flexkv_ring_max_record,
    flexkv_ring_readable,
    flexkv_ring_set_waiting,
)
from flexkv._core.mapping cimport SharedMapping
from flexkv._core.sealed_memory import check_sealed, sealed_memfd
from flexkv.errors import RingCorruptedError

HEADER_BYTES = FLEXKV_RING_HEADER


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class RingPair:
    """One end of two rings in one memfd, with an eventfd for each; the base of those that send and receive.

    Each ring has one sender and one receiver; a caller that shares an end between threads must lock.

    Attributes
    ----------
    fd, sending_event_fd, receiving_event_fd : int
        Memfd, and the eventfds of the rings that this end sends to and receives from; owned by this object.
    ring_bytes : int
        Size of each ring, its header included.
    max_record : int
        Bytes of the largest record.
    """

    def __cinit__(self):
        self.fd = self.sending_event_fd = self.receiving_event_fd = -1
        self.buffer = NULL

    cdef open(self, str name, Py_ssize_t data_bytes, bint sends_first, fds=None):
        """Make the memory, or map that of ``fds``, which this object owns from here on, also if it raises.

        Parameters
        ----------
        name : str
            Name of the memory, for diagnosis.
        data_bytes : int
            Data bytes of each ring; a power of two, at least 4096.
        sends_first : bool
            Whether this end sends to the first ring of the memory; else to the second.
        fds : sequence of int, optional
            ``fds`` of the other end.

        Raises
        ------
        OSError
            No descriptor is free.
        RegistrationError
            The memory has another size, or can be resized.
        RingCorruptedError
            The memory holds no rings of this version.
        """
        self.sends_first = sends_first
        if fds is not None:
            self.fd, first, second = fds
            self.sending_event_fd, self.receiving_event_fd = (first, second) if sends_first else (second, first)
        try:
            if data_bytes < 4096 or data_bytes & (data_bytes - 1):
                raise ValueError(f"a ring of {data_bytes} bytes; give a power of two, at least 4096")
            self.ring_bytes = FLEXKV_RING_HEADER + data_bytes
            self.buffer = <uint8_t *>malloc(self.ring_bytes)
            if self.buffer == NULL:
                raise MemoryError(f"no memory for a ring of {data_bytes} bytes")
            if fds is None:
                self.fd = sealed_memfd(f"flexkv-{name}", 2 * self.ring_bytes)
                self.sending_event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self.receiving_event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            else:
                check_sealed(self.fd, 2 * self.ring_bytes, f"the memory of the {name}")
            self.memory = SharedMapping(self.fd, 2 * self.ring_bytes)
            if fds is None:
                flexkv_ring_create(self.memory.data, self.ring_bytes)
                flexkv_ring_create(self.memory.data + self.ring_bytes, self.ring_bytes)
            self.attach()
        except BaseException:
            self.close()
            raise

    cdef attach(self):
        cdef uint8_t *first = self.memory.data
        cdef uint8_t *second = first + self.ring_bytes
        if (
            flexkv_ring_attach(&self.sending, first if self.sends_first else second, self.ring_bytes,
                               self.sending_event_fd)
            or flexkv_ring_attach(&self.receiving, second if self.sends_first else first, self.ring_bytes,
                                  self.receiving_event_fd)
        ):
            raise RingCorruptedError("the memory holds no rings of this version")
        self.max_record = flexkv_ring_max_record(&self.sending)

    def __dealloc__(self):
        free(self.buffer)

    @property
    def fds(self):
        """Memfd, eventfd of the first ring, eventfd of the second: for the other end."""
        if self.sends_first:
            return self.fd, self.sending_event_fd, self.receiving_event_fd
        return self.fd, self.receiving_event_fd, self.sending_event_fd

    def close(self):
        """Close the descriptors. The memory is unmapped with the object, because a thread may be watching it. Can be
        called again."""
        for fd in (self.fd, self.sending_event_fd, self.receiving_event_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.sending_event_fd = self.receiving_event_fd = -1

    def set_waiting(self, bint waiting):
        """Ask for a write to ``receiving_event_fd`` at the next record, or waive it; True if a record is there now."""
        return bool(flexkv_ring_set_waiting(&self.receiving, waiting))

    def spin(self, Py_ssize_t spin_ns):
        """Watch for a record for up to ``spin_ns`` nanoseconds, without the GIL; True if there is one. Other threads
        that wait for this processor run meanwhile: the sender may be one of them."""
        cdef int64_t until
        cdef bint found = False
        with nogil:
            until = now_ns() + spin_ns
            while not found:
                found = flexkv_ring_readable(&self.receiving)
                if not found:
                    if now_ns() >= until:
                        break
                    sched_yield()
        return found
