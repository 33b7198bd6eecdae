"""CUDA: the driver's functions, found at run time. The only module that knows where they come from."""
from libc.stdint cimport uint64_t, uintptr_t

from flexkv._core.csrc.cuda_api cimport (
    CU_P2P_ACCESS_SUPPORTED,
    CU_P2P_NATIVE_ATOMIC_SUPPORTED,
    cu_context,
    cu_function,
    cu_module,
    cu_uuid,
    flexkv_cuda,
)
from flexkv.errors import CudaError, CudaUnavailableError


cdef extern from "cuda_table.h":
    const char *FLEXKV_CUDA_NAMES[]
    enum:
        FLEXKV_CUDA_NUM_REQUIRED
    const char flexkv_kernel_source[]


_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76

# The interface that the prototypes in cuda_api.h are of.
_INTERFACE = 12080


def kernel_source():
    """Source of the kernel that gathers and scatters, as bytes."""
    return <bytes>flexkv_kernel_source


cdef class Driver:
    """The table of the driver's functions.

    Raises
    ------
    CudaUnavailableError
        There is no usable driver, or it lacks a required function (CUDA 12.8 has all of them).
    """

    def __cinit__(self):
        cdef void **members = <void **>&self.table
        cdef int i = 0, code
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CudaUnavailableError(f"cuda-bindings is missing ({error}): pip install cuda-bindings") from error
        try:
            (result,) = driver.cuInit(0)
        except RuntimeError as error:
            raise CudaUnavailableError(f"no CUDA driver: {error}") from error
        if int(result):
            raise CudaUnavailableError(f"cuInit failed with {result.name}: is there a GPU that this process may use?")
        while FLEXKV_CUDA_NAMES[i] != NULL:
            name = <bytes>FLEXKV_CUDA_NAMES[i]
            result, address, _ = driver.cuGetProcAddress(name, _INTERFACE, 0)
            if (int(result) or not address) and i < FLEXKV_CUDA_NUM_REQUIRED:
                raise CudaUnavailableError(f"the CUDA driver has no {name.decode()}: CUDA 12.8 or later is needed")
            members[i] = <void *><uintptr_t>(0 if int(result) else int(address))
            i += 1
        self.devices = {}
        code = self.table.cuDriverGetVersion(&self.version)
        self.check(code, "cuDriverGetVersion")

    def check(self, int code, function):
        """Raise CudaError, with the driver's words, if ``code`` is an error."""
        cdef const char *name = NULL
        cdef const char *text = NULL
        if code == 0:
            return
        self.table.cuGetErrorName(code, &name)
        self.table.cuGetErrorString(code, &text)
        raise CudaError(function, (<bytes>name).decode() if name != NULL else str(code),
                        (<bytes>text).decode() if text != NULL else "unknown error")

    @property
    def has_batch_copy(self):
        """The driver has cuMemcpyBatchAsync."""
        return self.table.cuMemcpyBatchAsync != NULL

    def device(self, int ordinal):
        """The device, with its primary context, which torch uses too."""
        if ordinal not in self.devices:
            self.devices[ordinal] = Device(self, ordinal)
        return self.devices[ordinal]

    def find_device(self, bytes uuid not None):
        """Find the device with a UUID, at any ordinal of this process; None if the process does not see it."""
        cdef int ordinal, count = 0
        self.check(self.table.cuDeviceGetCount(&count), "cuDeviceGetCount")
        for ordinal in range(count):
            if self.uuid_of(ordinal) == uuid:
                return self.device(ordinal)
        return None

    def no_peer_access(self, Device device not None, bytes uuid not None):
        """Reason why a device must not read the memory of the GPU with a UUID: it cannot, or not over NVLink, so that a
        read would take as long as one of host memory. None: there is no such reason. Opens no context on that GPU.

        Raises
        ------
        CudaError
        """
        cdef int ordinal, count = 0, value = 0, mine = 0, theirs = 0
        if uuid == device.uuid:
            return None
        self.check(self.table.cuDeviceGetCount(&count), "cuDeviceGetCount")
        for ordinal in range(count):
            if self.uuid_of(ordinal) == uuid:
                break
        else:
            return f"GPU {uuid.hex()} is not visible to this process (CUDA_VISIBLE_DEVICES)"
        self.check(self.table.cuDeviceGet(&mine, device.ordinal), "cuDeviceGet")
        self.check(self.table.cuDeviceGet(&theirs, ordinal), "cuDeviceGet")
        for attribute, reason in ((CU_P2P_ACCESS_SUPPORTED, "cannot access"),
                                  (CU_P2P_NATIVE_ATOMIC_SUPPORTED, "has no NVLink to")):
            self.check(self.table.cuDeviceGetP2PAttribute(&value, attribute, mine, theirs), "cuDeviceGetP2PAttribute")
            if not value:
                return f"GPU {device.ordinal} {reason} GPU {ordinal}"
        return None

    cdef bytes uuid_of(self, int ordinal):
        cdef int handle = 0
        cdef cu_uuid uuid
        self.check(self.table.cuDeviceGet(&handle, ordinal), "cuDeviceGet")
        self.check(self.table.cuDeviceGetUuid(&uuid, handle), "cuDeviceGetUuid")
        return (<char *>uuid.bytes)[:16]

    def addresses(self):
        """Address of each function by its name, 0 if the driver lacks it: for tests that call every one."""
        cdef void **members = <void **>&self.table
        cdef int i = 0
        found = {}
        while FLEXKV_CUDA_NAMES[i] != NULL:
            found[(<bytes>FLEXKV_CUDA_NAMES[i]).decode()] = <uintptr_t>members[i]
            i += 1
        return found


cdef class Device:
    """One GPU. Its primary context is kept until the process ends.

    Raises
    ------
    CudaError
    """

    def __cinit__(self, Driver driver not None, int ordinal):
        cdef int handle = 0, major = 0, minor = 0
        cdef cu_context context = NULL
        cdef flexkv_cuda *table = &driver.table
        driver.check(table.cuDeviceGet(&handle, ordinal), "cuDeviceGet")
        driver.check(table.cuDeviceGetAttribute(&major, _COMPUTE_CAPABILITY_MAJOR, handle), "cuDeviceGetAttribute")
        driver.check(table.cuDeviceGetAttribute(&minor, _COMPUTE_CAPABILITY_MINOR, handle), "cuDeviceGetAttribute")
        driver.check(table.cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain")
        self.driver = driver
        self.ordinal = ordinal
        self.architecture = f"sm_{major}{minor}"
        self.uuid = driver.uuid_of(ordinal)
        self.context = context

    cdef int enter(self) except -1:
        """Make the context current, until ``leave``."""
        self.driver.check(self.driver.table.cuCtxPushCurrent(self.context), "cuCtxPushCurrent")
        return 0

    cdef void leave(self) noexcept:
        cdef cu_context popped = NULL
        self.driver.table.cuCtxPopCurrent(&popped)

    def __enter__(self):
        """The context is current on this thread until ``__exit__``; CudaError."""
        self.enter()
        return self

    def __exit__(self, *_):
        self.leave()

    def load_function(self, bytes image not None, bytes name not None):
        """Load a compiled module into the device, for as long as the process lives; return a function's handle."""
        cdef flexkv_cuda *table = &self.driver.table
        cdef cu_module module = NULL
        cdef cu_function function = NULL
        cdef const char *data = image
        self.enter()
        try:
            self.driver.check(table.cuModuleLoadData(&module, data), "cuModuleLoadData")
            self.driver.check(table.cuModuleGetFunction(&function, module, name), "cuModuleGetFunction")
        finally:
            self.leave()
        return <uint64_t>function


_driver = None


def load_driver():
    """The driver, found once.

    Raises
    ------
    CudaUnavailableError
    """
    global _driver
    if _driver is None:
        _driver = Driver()
    return _driver
