"""Slots in GPU memory that files are read into and written from, and the pages that their blocks belong to."""
import numpy as np

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from flexkv._core.csrc.cuda_api cimport (
    CU_EVENT_DISABLE_TIMING,
    CU_STREAM_NON_BLOCKING,
    cu_event,
    cu_function,
    cu_stream,
    flexkv_cuda,
)
from flexkv._core.csrc.move_kernel cimport FLEXKV_MOVE_BLOCKS, flexkv_launch_move, flexkv_move
from flexkv._core.device.agent import REGION_DTYPE
from flexkv._core.device.cuda_driver cimport Device

MAX_SLOTS = FLEXKV_MOVE_BLOCKS
"""The most slots that one staging buffer can have: the move kernel copies no more blocks in one launch."""

cdef enum:
    CHECKSUM_THREADS = 512      # as in checksum_slots.cu


cdef class DeviceStaging:
    """A buffer of slots on a device, laid out as host slots are. Calls wait for the device, without the GIL.

    Not thread safe, but that ``follow`` may be called from another thread. The pages must stay valid until ``close``.

    Parameters
    ----------
    device : Device
    regions : ndarray of REGION_DTYPE
        Layout of the pages.
    num_pages : int
    slot_bytes : int
        A multiple of 1024, and no less than a block.
    num_slots : int
        At most MAX_SLOTS.
    move_function, checksum_function : int
        Handles of the kernels.
    num_ctas : int
        Thread blocks of the kernel that moves.

    Attributes
    ----------
    address : int
        Device address of slot 0.

    Raises
    ------
    CudaError
    """
    cdef Device device
    cdef readonly uint64_t address
    cdef readonly uint64_t slot_bytes
    cdef readonly int num_slots
    cdef flexkv_move move
    cdef uint64_t num_pages, checksums_at
    cdef cu_function checksum
    cdef cu_stream stream
    cdef cu_event event
    cdef object sums

    def __init__(self, Device device not None, regions, uint64_t num_pages, uint64_t slot_bytes, int num_slots,
                 uint64_t move_function, uint64_t checksum_function, uint32_t num_ctas):
        table = np.ascontiguousarray(regions, dtype=REGION_DTYPE)
        used = int((table["slot_offset"] + table["chunk_bytes"]).max())
        if not 0 < num_slots <= MAX_SLOTS or slot_bytes % 1024 or used > slot_bytes:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes for blocks of {used} bytes")
        self.device = device
        self.slot_bytes, self.num_slots, self.num_pages = slot_bytes, num_slots, num_pages
        self.checksum = <cu_function>checksum_function
        self.sums = np.zeros(num_slots, dtype=np.uint64)
        self.move.function = <cu_function>move_function
        self.move.num_regions, self.move.max_chunk = len(table), int(table["chunk_bytes"].max())
        self.move.num_ctas = num_ctas
        self.move.far_stride = slot_bytes
        self.device.enter()
        try:
            self.allocate(table.view(np.uint8), used)
        except BaseException:
            self.free()
            raise
        finally:
            self.device.leave()

    cdef allocate(self, const uint8_t[::1] regions, uint64_t used):
        cdef flexkv_cuda *api = &self.device.driver.table
        cdef int least = 0, greatest = 0, i
        cdef const uint8_t[::1] zeros = np.zeros(max(1, self.slot_bytes - used), dtype=np.uint8)
        check = self.device.driver.check
        check(api.cuCtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange")
        check(api.cuStreamCreateWithPriority(&self.stream, CU_STREAM_NON_BLOCKING, least), "cuStreamCreateWithPriority")
        check(api.cuEventCreate(&self.event, CU_EVENT_DISABLE_TIMING), "cuEventCreate")
        check(api.cuMemAlloc(&self.address, self.slot_bytes * self.num_slots), "cuMemAlloc")
        check(api.cuMemAlloc(&self.checksums_at, self.num_slots * sizeof(uint64_t)), "cuMemAlloc")
        check(api.cuMemAlloc(&self.move.regions, regions.shape[0]), "cuMemAlloc")
        check(api.cuMemcpyAsync(self.move.regions, <uint64_t>&regions[0], regions.shape[0], self.stream),
              "cuMemcpyAsync")
        for i in range(self.num_slots if used < self.slot_bytes else 0):     # else old contents go to disk
            check(api.cuMemcpyAsync(self.address + i * self.slot_bytes + used, <uint64_t>&zeros[0],
                                    self.slot_bytes - used, self.stream), "cuMemcpyAsync")
        check(api.cuStreamSynchronize(self.stream), "cuStreamSynchronize")

    def follow(self, uint64_t stream):
        """Make later calls wait for the work already queued on the compute stream; CudaError."""
        cdef flexkv_cuda *api = &self.device.driver.table
        self.device.enter()
        try:
            self.device.driver.check(api.cuEventRecord(self.event, <cu_stream>stream), "cuEventRecord")
            self.device.driver.check(api.cuStreamWaitEvent(self.stream, self.event, 0), "cuStreamWaitEvent")
        finally:
            self.device.leave()

    def gather(self, const int32_t[::1] slots not None, const int32_t[::1] pages not None):
        """Copy pages ((n,) int32) to slots ((n,) int32); CudaError."""
        self.copy(slots, pages, True)

    def scatter(self, const int32_t[::1] slots not None, const int32_t[::1] pages not None):
        """Copy slots ((n,) int32) to pages ((n,) int32); CudaError."""
        self.copy(slots, pages, False)

    cdef copy(self, const int32_t[::1] slots, const int32_t[::1] pages, bint gather):
        cdef int n = pages.shape[0]
        if slots.shape[0] != n or n > self.num_slots:
            raise ValueError(f"{slots.shape[0]} slots of {self.num_slots} for {n} pages")
        self.check_range("slot", slots, self.num_slots)
        self.check_range("page", pages, self.num_pages)
        if n:
            self.run(&slots[0], &pages[0], n, gather)

    cdef check_range(self, str name, const int32_t[::1] numbers, uint64_t limit):
        cdef Py_ssize_t i
        for i in range(numbers.shape[0]):
            if numbers[i] < 0 or <uint64_t>numbers[i] >= limit:
                raise ValueError(f"{name} {numbers[i]}: there are {limit}")

    cdef run(self, const int32_t *slots, const int32_t *pages, int count, bint gather):
        cdef flexkv_cuda *api = &self.device.driver.table
        cdef cu_stream stream = self.stream
        cdef int launched = 0, ended = 0
        self.move.far, self.move.gather = self.address, gather
        self.move.slots, self.move.pages, self.move.count = slots, pages, count
        self.device.enter()
        try:
            with nogil:
                launched = flexkv_launch_move(api, &self.move, stream)
                ended = api.cuStreamSynchronize(stream)
            self.device.driver.check(launched, "cuLaunchKernel")
            self.device.driver.check(ended, "cuStreamSynchronize")
        finally:
            self.device.leave()

    def checksums(self, int first, int count):
        """XXH3-64 of ``count`` slots, whole: (count,) uint64; CudaError."""
        cdef flexkv_cuda *api = &self.device.driver.table
        cdef cu_stream stream = self.stream
        cdef uint64_t[::1] sums = self.sums
        cdef void *parameters[3]
        cdef uint64_t start
        cdef int launched = 0, copied = 0, ended = 0
        if not 0 <= first <= first + count <= self.num_slots:
            raise ValueError(f"slots {first} to {first + count}: there are {self.num_slots}")
        if count == 0:
            return np.empty(0, dtype=np.uint64)
        start = self.address + first * self.slot_bytes
        parameters[0], parameters[1], parameters[2] = &start, &self.slot_bytes, &self.checksums_at
        self.device.enter()
        try:
            with nogil:
                launched = api.cuLaunchKernel(self.checksum, count, 1, 1, CHECKSUM_THREADS, 1, 1, 0, stream,
                                              parameters, NULL)
                copied = api.cuMemcpyAsync(<uint64_t>&sums[0], self.checksums_at, count * sizeof(uint64_t), stream)
                ended = api.cuStreamSynchronize(stream)
            self.device.driver.check(launched, "cuLaunchKernel")
            self.device.driver.check(copied, "cuMemcpyAsync")
            self.device.driver.check(ended, "cuStreamSynchronize")
        finally:
            self.device.leave()
        return self.sums[:count].copy()

    cdef void free(self) noexcept:
        cdef flexkv_cuda *api = &self.device.driver.table
        if self.stream != NULL:
            api.cuStreamSynchronize(self.stream)
            api.cuStreamDestroy(self.stream)
        if self.event != NULL:
            api.cuEventDestroy(self.event)
        for address in (self.address, self.checksums_at, self.move.regions):
            if address:
                api.cuMemFree(address)
        self.stream, self.event = NULL, NULL
        self.address = self.checksums_at = self.move.regions = 0

    def close(self):
        """Wait for the device and free the buffer. Can be called again."""
        self.device.enter()
        try:
            self.free()
        finally:
            self.device.leave()
