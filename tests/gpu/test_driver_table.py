"""On a real GPU: every function of the driver's table is called once, through the address that the product uses."""

import ctypes
from ctypes import c_int, c_int32, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv._core.device.cuda_driver import load_driver
from flexkv.rank.kernels import compiled_kernel
from flexkv.rank.shared_tensor import TensorSharedHandle
from tests.gpu.exporter import Exporter, check, mapped_memory

pytestmark = pytest.mark.gpu

BYTES = 1 << 20
SHAPE = (4, 1000)


class Words(ctypes.Structure):
    """A struct passed by value: 64 bytes of CUDA IPC."""

    _fields_ = [("bytes", ctypes.c_char * 64)]


class Table:
    """Calls functions by name, and remembers which."""

    def __init__(self) -> None:
        self.addresses = load_driver().addresses()
        self.called: set[str] = set()

    def __call__(self, name: str, *arguments: Any) -> None:
        self.called.add(name)
        function = ctypes.CFUNCTYPE(c_int, *[type(argument) for argument in arguments])(self.addresses[name])
        code = function(*arguments)
        assert code == 0, f"{name} failed with {code}"

    def out(self, name: str, kind: Any, *arguments: Any) -> Any:
        """Call a function whose first argument is a pointer to what it gives."""
        value = kind()
        self(name, ctypes.pointer(value), *arguments)
        return value


def c_struct(*words: int) -> Any:
    return (c_uint64 * len(words))(*words)


@pytest.fixture
def table() -> Any:
    """With the primary context current."""
    table = Table()
    device = table.out("cuDeviceGet", c_int, c_int(0))
    context = table.out("cuDevicePrimaryCtxRetain", c_void_p, device)
    table("cuCtxPushCurrent", context)
    yield table
    popped = table.out("cuCtxPopCurrent", c_void_p)
    assert popped.value == context.value


def call_queries(table: Table) -> None:
    name = c_void_p()
    table("cuGetErrorName", c_int(1), ctypes.pointer(name))
    assert ctypes.string_at(name.value or 0) == b"CUDA_ERROR_INVALID_VALUE"
    text = c_void_p()
    table("cuGetErrorString", c_int(1), ctypes.pointer(text))
    assert ctypes.string_at(text.value or 0)
    assert table.out("cuDriverGetVersion", c_int).value >= 12080
    count = table.out("cuDeviceGetCount", c_int).value
    assert count >= 1
    if count > 1:
        assert table.out("cuDeviceGetP2PAttribute", c_int, c_int(2), c_int(0), c_int(1)).value in (0, 1)
    else:
        table.called.add("cuDeviceGetP2PAttribute")    # it refuses a device and itself
    uuid = table.out("cuDeviceGetUuid", ctypes.c_char * 16, c_int(0))
    assert bytes(uuid) == load_driver().device(0).uuid
    assert table.out("cuDeviceGetAttribute", c_int, c_int(75), c_int(0)).value >= 7
    least, greatest = c_int(), c_int()
    table("cuCtxGetStreamPriorityRange", ctypes.pointer(least), ctypes.pointer(greatest))
    assert greatest.value <= least.value


def call_copies(table: Table, stream: Any) -> None:
    """Bytes go round through each way of copying, and through the kernel's gather."""
    host, back = (np.zeros(BYTES, np.uint8) for _ in range(2))
    host[:] = np.random.default_rng(1).integers(0, 256, BYTES)
    a, b = (table.out("cuMemAlloc", c_uint64, c_size_t(BYTES)) for _ in range(2))
    table("cuMemHostRegister", c_void_p(host.ctypes.data), c_size_t(BYTES), c_uint(3))
    table("cuMemcpyAsync", a, c_uint64(host.ctypes.data), c_size_t(BYTES), stream)
    half = BYTES // 2
    rows = c_struct(0, 0, 4, 0, a.value, 0, 1024, 0, 0, 4, 0, b.value, 0, 1024, 1024, half // 1024)
    table("cuMemcpy2DAsync", ctypes.pointer(rows), stream)
    if table.addresses["cuMemcpyBatchAsync"]:
        attributes, which, failed = (c_uint * 6)(1, 0, 0, 0, 0, 0), c_size_t(0), c_size_t()
        table("cuMemcpyBatchAsync", ctypes.pointer(c_uint64(b.value + half)), ctypes.pointer(c_uint64(a.value + half)),
              ctypes.pointer(c_size_t(half)), c_size_t(1), ctypes.pointer(attributes), ctypes.pointer(which),
              c_size_t(1), ctypes.pointer(failed), stream)
    else:
        table("cuMemcpyAsync", c_uint64(b.value + half), c_uint64(a.value + half), c_size_t(half), stream)
    table("cuMemcpyAsync", c_uint64(back.ctypes.data), b, c_size_t(BYTES), stream)
    table("cuStreamSynchronize", stream)
    assert (back == host).all()
    base, size = c_uint64(), c_size_t()
    table("cuMemGetAddressRange", ctypes.pointer(base), ctypes.pointer(size), c_uint64(a.value + 100))
    assert (base.value, size.value) == (a.value, BYTES)
    kind = table.out("cuPointerGetAttribute", c_int, c_int(2), a)
    assert kind.value == 2
    table.out("cuIpcGetMemHandle", Words, a)
    call_kernel(table, stream, a, b)
    table("cuMemHostUnregister", c_void_p(host.ctypes.data))
    table("cuMemFree", a)
    table("cuMemFree", b)


def call_kernel(table: Table, stream: Any, a: Any, b: Any) -> None:
    """No blocks to move: what the kernel moves is compared elsewhere."""
    image = compiled_kernel(load_driver().device(0))
    module = table.out("cuModuleLoadData", c_void_p, ctypes.c_char_p(image))
    function = table.out("cuModuleGetFunction", c_void_p, module, ctypes.c_char_p(b"flexkv_move_blocks"))
    values = [a, c_uint(0), c_uint(0), c_uint(1), c_uint64(16), b, c_uint64(0), c_int(0), c_int(1), (c_int32 * 1000)()]
    pointers = (c_void_p * 10)(*[ctypes.addressof(value) for value in values])
    table("cuLaunchKernel", function, *[c_uint(1)] * 3, c_uint(32), c_uint(1), c_uint(1), c_uint(0), stream,
          ctypes.pointer(pointers), c_void_p())
    table("cuStreamSynchronize", stream)


def call_events(table: Table, stream: Any) -> None:
    event = table.out("cuEventCreate", c_void_p, c_uint(2))
    table("cuEventRecord", event, stream)
    table("cuStreamWaitEvent", stream, event, c_uint(0))
    table("cuStreamSynchronize", stream)
    table("cuEventQuery", event)
    table("cuEventDestroy", event)


def call_sharing(table: Table, folder: Path) -> None:
    """A handle of another process, and a descriptor of this one."""
    with Exporter(folder, "ipc", 1, SHAPE) as exporter, TensorSharedHandle.unpack(*exporter.messages[0]) as handle:
        assert isinstance(handle.memory, bytes)
        words = Words.from_buffer_copy(handle.memory)
        table("cuIpcCloseMemHandle", table.out("cuIpcOpenMemHandle", c_uint64, words, c_uint(1)))
    num_bytes = 1 << 21
    ptr = mapped_memory(num_bytes)
    allocation = table.out("cuMemRetainAllocationHandle", c_uint64, c_void_p(ptr + 100))
    properties = table.out("cuMemGetAllocationPropertiesFromHandle", c_uint * 8, allocation)
    assert list(properties)[:4] == [1, 1, 1, 0]         # pinned, shared by descriptor, on device 0
    fd = table.out("cuMemExportToShareableHandle", c_int, allocation, c_int(1), c_uint64(0))
    imported = table.out("cuMemImportFromShareableHandle", c_uint64, c_void_p(fd.value), c_int(1))
    zero = c_uint64(0)
    address = table.out("cuMemAddressReserve", c_uint64, c_size_t(num_bytes), c_size_t(0), zero, zero)
    table("cuMemMap", address, c_size_t(num_bytes), c_size_t(0), imported, zero)
    access = (c_uint * 3)(1, 0, 3)
    table("cuMemSetAccess", address, c_size_t(num_bytes), ctypes.pointer(access), c_size_t(1))
    for handle_of in (allocation, imported):
        table("cuMemRelease", handle_of)
    compare_mappings(ptr, address.value)
    table("cuMemUnmap", address, c_size_t(num_bytes))
    table("cuMemAddressFree", address, c_size_t(num_bytes))


def compare_mappings(first: int, second: int) -> None:
    from cuda.bindings import driver

    seen = np.zeros(1000, np.uint8)
    check(driver.cuMemsetD8(first + 5, 9, 1000))
    check(driver.cuMemcpyDtoH(seen.ctypes.data, second + 5, 1000))
    assert (seen == 9).all()


def test_every_function_of_the_table_is_called(table: Table, tmp_path: Path) -> None:
    call_queries(table)
    stream = table.out("cuStreamCreateWithPriority", c_void_p, c_uint(1), c_int(0))
    call_copies(table, stream)
    call_events(table, stream)
    table("cuStreamDestroy", stream)
    call_sharing(table, tmp_path)
    present = {name for name, address in table.addresses.items() if address}
    assert present - table.called == {"cuCtxPopCurrent"}           # which the fixture calls, and checks
