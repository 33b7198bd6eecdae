"""GPU memory between processes: exported as a handle of CUDA IPC or as a file descriptor, and mapped from one."""
import os
import sys
import warnings

from libc.stdint cimport int32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from flexkv._core.csrc.cuda_api cimport (
    CU_ACCESS_READ_WRITE,
    CU_ERROR_INVALID_VALUE,
    CU_HANDLE_FILE_DESCRIPTOR,
    CU_IPC_LAZY_PEER_ACCESS,
    CU_LOCATION_DEVICE,
    CU_MEMORYTYPE_DEVICE,
    CU_POINTER_DEVICE_ORDINAL,
    CU_POINTER_IPC_CAPABLE,
    CU_POINTER_MEMORY_TYPE,
    cu_access,
    cu_allocation_properties,
    cu_ipc_handle,
    flexkv_cuda,
)
from flexkv._core.device.cuda_driver cimport Device
from flexkv.errors import RegistrationError


cdef int32_t pointer_attribute(Device device, int attribute, uint64_t ptr) except? -1:
    cdef int32_t value = 0
    code = device.driver.table.cuPointerGetAttribute(&value, attribute, ptr)
    if code == CU_ERROR_INVALID_VALUE:
        raise RegistrationError(f"{ptr:#x} is not in memory of CUDA's; export a tensor that is on a GPU")
    device.driver.check(code, "cuPointerGetAttribute")
    return value


def export_memory(Device device not None, uint64_t ptr):
    """Make the allocation that has an address open to other processes.

    Parameters
    ----------
    device : Device
    ptr : int

    Returns
    -------
    handle : bytes or int
        64 bytes of CUDA IPC for memory of ``cudaMalloc``, or a file descriptor, for the caller to close, for memory of
        ``cuMemCreate``.
    num_bytes : int
        Size of the allocation.
    offset : int
        Position of ``ptr`` in the allocation.

    Raises
    ------
    RegistrationError
        The memory is not this device's, or of a kind that cannot be shared.
    CudaError
    """
    cdef uint64_t base = 0
    cdef size_t num_bytes = 0
    cdef flexkv_cuda *table = &device.driver.table
    device.enter()
    try:
        if pointer_attribute(device, CU_POINTER_MEMORY_TYPE, ptr) != CU_MEMORYTYPE_DEVICE:
            raise RegistrationError(f"{ptr:#x} is in host memory; export a tensor that is on a GPU")
        ordinal = pointer_attribute(device, CU_POINTER_DEVICE_ORDINAL, ptr)
        if ordinal != device.ordinal:
            raise RegistrationError(f"{ptr:#x} is on device {ordinal}, not {device.ordinal}")
        device.driver.check(table.cuMemGetAddressRange(&base, &num_bytes, ptr), "cuMemGetAddressRange")
        if pointer_attribute(device, CU_POINTER_IPC_CAPABLE, ptr) & 0xff:
            handle = export_ipc(device, base)
        else:
            handle = export_descriptor(device, base)
    finally:
        device.leave()
    return handle, num_bytes, ptr - base


cdef bytes export_ipc(Device device, uint64_t base):
    cdef cu_ipc_handle handle
    device.driver.check(device.driver.table.cuIpcGetMemHandle(&handle, base), "cuIpcGetMemHandle")
    return handle.bytes[:64]


cdef int export_descriptor(Device device, uint64_t base) except -1:
    cdef uint64_t allocation = 0
    cdef int fd = -1
    cdef cu_allocation_properties properties
    cdef flexkv_cuda *table = &device.driver.table
    code = table.cuMemRetainAllocationHandle(&allocation, <void *><uintptr_t>base)
    if code == CU_ERROR_INVALID_VALUE:
        raise RegistrationError(
            f"the memory at {base:#x} is neither from cudaMalloc nor from cuMemCreate (managed, or of a pool of "
            "cudaMallocAsync) and cannot be shared; allocate KV with cudaMalloc"
        )
    device.driver.check(code, "cuMemRetainAllocationHandle")
    try:
        device.driver.check(table.cuMemGetAllocationPropertiesFromHandle(&properties, allocation),
                            "cuMemGetAllocationPropertiesFromHandle")
        if not properties.handle_types & CU_HANDLE_FILE_DESCRIPTOR or properties.location.type != CU_LOCATION_DEVICE:
            raise RegistrationError(
                f"the memory at {base:#x} was made by cuMemCreate without a file descriptor among its handle types and "
                "cannot be shared; with torch, allocate KV without expandable_segments"
            )
        device.driver.check(
            table.cuMemExportToShareableHandle(&fd, allocation, CU_HANDLE_FILE_DESCRIPTOR, 0),
            "cuMemExportToShareableHandle",
        )
    finally:
        code = table.cuMemRelease(allocation)
    if code:
        os.close(fd)
        device.driver.check(code, "cuMemRelease")
    return fd


cdef class ImportedMemory:
    """Memory of another process, mapped into this one until ``close``.

    Parameters
    ----------
    device : Device
        The device that has the memory, or, with a handle of CUDA IPC, one that can access it.
    handle : bytes or int
        From ``export_memory``; a file descriptor stays the caller's.
    num_bytes : int
        Size of the allocation.

    Raises
    ------
    CudaError
    """

    cdef readonly Device device
    cdef readonly uint64_t address
    cdef readonly uint64_t num_bytes
    cdef bint is_ipc

    def __cinit__(self, Device device not None, handle, uint64_t num_bytes):
        self.device = device
        self.num_bytes = num_bytes
        self.is_ipc = isinstance(handle, bytes)
        device.enter()
        try:
            if self.is_ipc:
                self.open_ipc(handle)
            else:
                self.map_descriptor(handle)
        finally:
            device.leave()

    cdef int open_ipc(self, bytes handle) except -1:
        cdef cu_ipc_handle ipc
        cdef uint64_t address = 0
        if len(handle) != sizeof(ipc):
            raise RegistrationError(f"a handle of CUDA IPC has {sizeof(ipc)} bytes, not {len(handle)}")
        memcpy(&ipc, <const char *>handle, sizeof(ipc))
        self.device.driver.check(
            self.device.driver.table.cuIpcOpenMemHandle(&address, ipc, CU_IPC_LAZY_PEER_ACCESS), "cuIpcOpenMemHandle"
        )
        self.address = address
        return 0

    cdef int map_descriptor(self, int fd) except -1:
        cdef uint64_t allocation = 0, address = 0
        cdef flexkv_cuda *table = &self.device.driver.table
        check = self.device.driver.check
        check(table.cuMemImportFromShareableHandle(&allocation, <void *><uintptr_t>fd, CU_HANDLE_FILE_DESCRIPTOR),
              "cuMemImportFromShareableHandle")
        try:
            check(table.cuMemAddressReserve(&address, self.num_bytes, 0, 0, 0), "cuMemAddressReserve")
            self.map_allocation(address, allocation)
        finally:                                        # a mapping keeps the memory, with or without its handle
            code = table.cuMemRelease(allocation)
        self.address = address
        if code:
            self.release()
            check(code, "cuMemRelease")
        return 0

    cdef int map_allocation(self, uint64_t address, uint64_t allocation) except -1:
        cdef cu_access access
        cdef flexkv_cuda *table = &self.device.driver.table
        access.location.type = CU_LOCATION_DEVICE
        access.location.id = self.device.ordinal
        access.flags = CU_ACCESS_READ_WRITE
        function, code = "cuMemMap", table.cuMemMap(address, self.num_bytes, 0, allocation, 0)
        if code == 0:
            function, code = "cuMemSetAccess", table.cuMemSetAccess(address, self.num_bytes, &access, 1)
            if code:
                table.cuMemUnmap(address, self.num_bytes)
        if code:
            table.cuMemAddressFree(address, self.num_bytes)
        self.device.driver.check(code, function)
        return 0

    @property
    def mapped_bytes(self):
        """Size of the mapping as the driver reports it; 0 if the driver does not report one."""
        cdef uint64_t base = 0
        cdef size_t num_bytes = 0
        self.device.enter()
        try:
            code = self.device.driver.table.cuMemGetAddressRange(&base, &num_bytes, self.address)
        finally:
            self.device.leave()
        return num_bytes - (self.address - base) if code == 0 else 0

    cdef tuple release(self):
        """Unmap; (error, function) of the first call that failed. The context must be current."""
        cdef flexkv_cuda *table = &self.device.driver.table
        address, self.address = self.address, 0
        if self.is_ipc:
            return table.cuIpcCloseMemHandle(address), "cuIpcCloseMemHandle"
        unmapped = table.cuMemUnmap(address, self.num_bytes)
        freed = table.cuMemAddressFree(address, self.num_bytes)
        return (unmapped, "cuMemUnmap") if unmapped else (freed, "cuMemAddressFree")

    def close(self):
        """Unmap the memory; nothing may use it any more. Can be called again.

        Raises
        ------
        CudaError
        """
        if self.address == 0:
            return
        self.device.enter()
        try:
            code, function = self.release()
        finally:
            self.device.leave()
        self.device.driver.check(code, function)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def __del__(self):
        if self.address == 0 or sys is None or sys.is_finalizing():
            return
        try:
            warnings.warn(f"another process's memory at {self.address:#x} was not closed", ResourceWarning, source=self)
        finally:
            self.device.enter()
            self.release()
            self.device.leave()
