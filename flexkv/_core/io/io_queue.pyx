"""The I/O queue: a native thread that moves pieces between memory and files, and computes the XXH3-64 of each."""
import errno
import os
import sys
import warnings

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from flexkv._core.csrc.io_method cimport flexkv_io_threads, flexkv_io_uring
from flexkv._core.csrc.io_queue cimport (
    flexkv_io_kind,
    flexkv_io_options,
    flexkv_io_pieces,
    flexkv_io_queue,
    flexkv_io_queue_busy,
    flexkv_io_queue_cancel,
    flexkv_io_queue_close,
    flexkv_io_queue_event_fd,
    flexkv_io_queue_open,
    flexkv_io_queue_ready,
    flexkv_io_queue_register,
    flexkv_io_queue_registered,
    flexkv_io_queue_submit,
    flexkv_io_queue_take,
    FLEXKV_IO_READ,
    FLEXKV_IO_WRITE,
)
from flexkv.errors import TransferError

READ = FLEXKV_IO_READ
WRITE = FLEXKV_IO_WRITE

METHODS = ("auto", "uring", "threads")


def _why_not_uring(int error):
    """Describe why io_uring cannot be used, with the setting to blame."""
    if error == errno.EPERM:
        try:
            with open("/proc/sys/kernel/io_uring_disabled") as file:
                disabled = file.read().strip()
        except OSError:
            disabled = "0"
        if disabled != "0":
            return f"io_uring is switched off here: sysctl kernel.io_uring_disabled is {disabled}; set it to 0"
        return "io_uring is refused, by seccomp: let the container's profile allow io_uring_setup, _enter and _register"
    if error == errno.ENOSYS:
        return "this kernel has no io_uring, or an old one: Linux 5.11 is needed (seccomp may say so, too)"
    return f"io_uring cannot be used: {os.strerror(error)}"


cdef class IoQueue:
    """Moves pieces from its own thread, until ``close``. Nothing here waits, except ``close``.

    A piece is a range of a file and one of memory, of the same size. Pieces that follow one another in a call and in a
    file are one I/O. Reads start before writes. An I/O that the kernel does in part continues where it stopped. If
    one of several neighbours fails, each has its own result.

    Parameters
    ----------
    files : sequence of int
        Descriptors, open as the caller wants them (O_DIRECT: all offsets and sizes, and the memory, must be aligned).
        They stay the caller's, and open until ``close``.
    memory : object with a writable buffer
        The host pool, mapped. It is held until ``close``.
    depth : int
        I/Os under way, of each file: a device that hangs takes nothing from another.
    method : {"auto", "uring", "threads"}
        "auto": io_uring, or where that is refused a few threads with preadv and pwritev; ``reason`` says why.
    deadline_s : float
        For an I/O to end. After that its pieces have -ETIMEDOUT as their result, and so has all that waits for the same
        file, until the kernel gives the I/O back.

    Attributes
    ----------
    event_fd : int
        Readable when ``take`` has something, and when ``busy`` has become less.
    method : str
        "uring" or "threads".
    reason : str
        Why not "uring", or why memory is not registered; empty if there is nothing to say.

    Raises
    ------
    OSError
        The method that was asked for cannot be used.
    """

    def __cinit__(self, files, memory, *, uint32_t depth=64, str method="auto", double deadline_s=10.0):
        self.queue = NULL
        self.event_fd = -1

    def __init__(self, files, memory, *, uint32_t depth=64, str method="auto", double deadline_s=10.0):
        cdef flexkv_io_options options
        cdef uint8_t[::1] writable = memory
        cdef int[::1] descriptors = np.array(list(files), dtype=np.intc)
        cdef int rc
        if self.queue != NULL:
            raise RuntimeError("an IoQueue is opened once")
        if method not in METHODS:
            raise ValueError(f"method = {method!r}: one of {', '.join(METHODS)}")
        if not len(descriptors) or not len(writable) or not 0 < depth <= 4096 or not 0 < deadline_s <= 1e6:
            raise ValueError("a queue needs files, memory, a depth of 1 to 4096, and a deadline of up to 1e6 seconds")
        options.memory = &writable[0]
        options.memory_bytes = len(writable)
        options.files = &descriptors[0]
        options.num_files = len(descriptors)
        options.depth = depth
        options.deadline_ns = <uint64_t>(deadline_s * 1e9)
        self.refusal = ""
        self.method = "threads" if method == "threads" else "uring"
        rc = self.open(&options)
        if rc and method == "auto":
            self.refusal = _why_not_uring(-rc)
            self.method = "threads"
            rc = self.open(&options)
        if rc:
            raise OSError(-rc, f"the I/O queue did not start ({self.method}): {os.strerror(-rc)}")
        self.memory = writable
        self.event_fd = flexkv_io_queue_event_fd(self.queue)

    cdef const flexkv_io_method *table(self) except NULL:
        """Functions of ``self.method``."""
        return &flexkv_io_threads if self.method == "threads" else &flexkv_io_uring

    cdef int open(self, flexkv_io_options *options) except 1:
        """Start the queue; returns 0, or the negative errno for which the method cannot be used."""
        cdef int rc
        options.method = self.table()
        with nogil:
            rc = flexkv_io_queue_open(&self.queue, options)
        if rc:
            self.queue = NULL
        return rc

    cdef flexkv_io_queue *opened(self) except NULL:
        if self.queue == NULL:
            raise ValueError("the I/O queue is closed")
        return self.queue

    @property
    def reason(self):
        cdef int error = 0
        if self.queue == NULL or self.refusal:
            return self.refusal
        flexkv_io_queue_registered(self.queue, &error)
        if not error:
            return ""
        if -error in (errno.ENOMEM, errno.EPERM):
            return "memory is not registered with io_uring, which costs CPU time: raise the memlock limit (ulimit -l)"
        return f"memory is not registered with io_uring, which costs CPU time: {os.strerror(-error)}"

    @property
    def registered_bytes(self):
        """Bytes of the memory that are registered with the kernel, from its start on."""
        cdef int error = 0
        return flexkv_io_queue_registered(self.queue, &error) if self.queue != NULL else 0

    def register(self, uint64_t upto_bytes):
        """Allow the first ``upto_bytes`` bytes of memory, which now exist, to be registered with the kernel.

        It happens in the queue's thread, in parts. If it is refused, the rest stays as it is, and ``reason`` says so.
        """
        flexkv_io_queue_register(self.opened(), upto_bytes)

    def submit(self, int kind, const uint64_t[::1] tags not None, const int32_t[::1] files not None,
               const int64_t[::1] file_offsets not None, const int64_t[::1] memory_offsets not None, uint64_t size):
        """Read or write pieces of ``size`` bytes each; ``take`` returns one result for each.

        Parameters
        ----------
        kind : READ or WRITE
        tags : (n,) uint64
            Identify the results.
        files : (n,) int32
            Indices of the descriptors.
        file_offsets, memory_offsets : (n,) int64
            Bytes.

        Raises
        ------
        ValueError
            A piece is outside of memory, or of no file. Nothing was submitted.
        """
        cdef flexkv_io_pieces pieces
        cdef flexkv_io_queue *queue = self.opened()
        cdef Py_ssize_t n = tags.shape[0]
        cdef int rc
        if kind not in (READ, WRITE):
            raise ValueError(f"kind = {kind}: READ or WRITE")
        if files.shape[0] != n or file_offsets.shape[0] != n or memory_offsets.shape[0] != n:
            raise ValueError("tags, files, file_offsets and memory_offsets must be of one length")
        if not n:
            return
        pieces.count = n
        pieces.kind = <flexkv_io_kind>kind
        pieces.size = size
        pieces.tags = &tags[0]
        pieces.files = &files[0]
        pieces.file_offsets = &file_offsets[0]
        pieces.memory_offsets = &memory_offsets[0]
        rc = flexkv_io_queue_submit(queue, &pieces)      # with the GIL: no thread can close the queue meanwhile
        if rc == -errno.ENOMEM:
            raise MemoryError
        if rc:
            raise ValueError("a piece is empty, larger than 1 GiB, outside of memory, or of a file that is not there")

    def cancel(self, const uint64_t[::1] tags not None):
        """Pieces with these tags ((n,) uint64) that have not begun end with -ECANCELED."""
        if tags.shape[0] and flexkv_io_queue_cancel(self.opened(), &tags[0], tags.shape[0]):
            raise MemoryError

    def take(self):
        """Return the pieces that have ended since the last call.

        Returns
        -------
        tags : (m,) uint64
        results : (m,) int32
            0, or a negative errno. After -ETIMEDOUT the kernel may still touch memory and file, see ``busy``.
        checksums : (m,) uint64
            XXH3-64 of the memory: before a write, after a read; 0 where a read failed.
        """
        cdef uint64_t count = flexkv_io_queue_ready(self.queue) if self.queue != NULL else 0
        cdef uint64_t[::1] tags_view, checksums_view
        cdef int32_t[::1] results_view
        tags, results, checksums = (np.empty(count, dtype=kind) for kind in (np.uint64, np.int32, np.uint64))
        if self.queue != NULL:
            tags_view, results_view, checksums_view = tags, results, checksums
            flexkv_io_queue_take(self.queue, count, &tags_view[0] if count else NULL,
                                 &results_view[0] if count else NULL, &checksums_view[0] if count else NULL)
        return tags, results, checksums

    def busy(self):
        """Tags ((m,) uint64) of pieces that ended with -ETIMEDOUT, and that the kernel has not given back: it may still
        touch their memory and their place in the file."""
        cdef uint64_t room = flexkv_io_queue_busy(self.queue, 0, NULL) if self.queue != NULL else 0
        cdef uint64_t[::1] view
        tags = np.empty(room, dtype=np.uint64)
        if not room:
            return tags
        view = tags
        return tags[:flexkv_io_queue_busy(self.queue, room, &view[0])]

    def close(self):
        """Wait for running I/O, no longer than twice the deadline; waiting pieces are dropped. Can be called again.

        Raises
        ------
        TransferError
            The kernel did not give everything back: memory and files must not be used for anything else, ever.
        """
        cdef flexkv_io_queue *queue = self.queue
        cdef uint64_t lost
        if queue == NULL:
            return
        self.queue = NULL
        self.event_fd = -1
        with nogil:
            lost = flexkv_io_queue_close(queue)
        if lost:
            raise TransferError(f"{lost} pieces are still with the kernel, which may yet write to their memory: "
                                f"do not use it again; see the kernel's log for the device that hangs")
        self.memory = None

    def __dealloc__(self):
        if self.queue != NULL:
            flexkv_io_queue_close(self.queue)

    def __del__(self):
        if sys is None or sys.is_finalizing():         # modules are empty; __dealloc__ closes the queue
            return
        if self.queue != NULL:
            warnings.warn("an IoQueue was not closed", ResourceWarning, stacklevel=2)
        self.close()
