"""An I/O queue whose I/Os fail, come short or hang, on demand. Built only with ``FLEXKV_BUILD_TESTS=1``."""
from libc.stdint cimport int32_t, int64_t, uint32_t

from flexkv._core.csrc.io_queue cimport flexkv_io_kind, flexkv_io_method, flexkv_io_options
from flexkv._core.io.io_queue cimport IoQueue

cdef extern from "io_faulty.h" nogil:
    enum flexkv_io_fault:
        FLEXKV_IO_FAILS
        FLEXKV_IO_SHORT
        FLEXKV_IO_HANGS

    struct flexkv_io_faults:
        pass

    int flexkv_io_faults_create(flexkv_io_faults **result, const flexkv_io_method *inner)
    const flexkv_io_method *flexkv_io_faults_method(const flexkv_io_faults *faults)
    int flexkv_io_faults_plan(flexkv_io_faults *faults, flexkv_io_kind kind, int32_t file, flexkv_io_fault fault,
                              int64_t amount, uint32_t count)
    void flexkv_io_faults_release(flexkv_io_faults *faults)
    uint32_t flexkv_io_faults_left(flexkv_io_faults *faults)
    void flexkv_io_faults_free(flexkv_io_faults *faults)

FAILS = FLEXKV_IO_FAILS
SHORT = FLEXKV_IO_SHORT
HANGS = FLEXKV_IO_HANGS


cdef class FaultyIoQueue(IoQueue):
    """Twin of ``IoQueue``; its faults are around the functions of the method that the base class has chosen."""
    cdef flexkv_io_faults *faults

    cdef const flexkv_io_method *table(self) except NULL:
        if flexkv_io_faults_create(&self.faults, IoQueue.table(self)):
            raise MemoryError
        return flexkv_io_faults_method(self.faults)

    cdef int open(self, flexkv_io_options *options) except 1:
        cdef int rc = IoQueue.open(self, options)
        if rc:
            self.free_faults()
        return rc

    cdef void free_faults(self) noexcept:
        if self.faults != NULL:
            flexkv_io_faults_free(self.faults)
            self.faults = NULL

    def plan(self, int kind, int fault, int64_t amount=-1, uint32_t count=1, int32_t file=-1):
        """The next ``count`` I/Os of a kind, and of a file if it is not negative, have a fault.

        FAILS: with the errno ``amount``; SHORT: only ``amount`` bytes are moved; HANGS: for ``amount`` milliseconds, or
        until ``release``.
        """
        if fault == FAILS:
            amount = -amount
        self.opened()
        if flexkv_io_faults_plan(self.faults, <flexkv_io_kind>kind, file, <flexkv_io_fault>fault, amount, count):
            raise ValueError("too many faults are planned")

    def release(self):
        """I/Os that hang continue."""
        self.opened()
        flexkv_io_faults_release(self.faults)

    @property
    def num_planned(self):
        """Faults that have not happened yet."""
        return flexkv_io_faults_left(self.faults) if self.faults != NULL else 0

    def close(self):
        """As of ``IoQueue``. If the kernel keeps I/Os (TransferError), their faults stay allocated with them."""
        if self.queue != NULL:
            IoQueue.close(self)
            self.free_faults()
