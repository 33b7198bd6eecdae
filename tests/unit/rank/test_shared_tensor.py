"""Tensors shared by handle, against the fake driver: round trips, refusals, damage, and each call failing."""

import ctypes
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv._core.device.cuda_driver import load_driver
from flexkv._core.device.cuda_memory import ImportedMemory
from flexkv.common.memory_handle import TensorSharedHandle
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import CudaError, FlexKVError, RegistrationError
from flexkv.rank.regions import TensorSpec
from flexkv.rank.tp_client import KVTPClient
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.support.harness import (
    LAYERS,
    PAGE_SHAPE,
    PAGES,
    TOKENS,
    check_drained,
    make_manager,
    mapping,
    tokens_of,
    until,
)

BYTES = 1 << 20
OFFSET = 4096
SPEC_SHAPE = (4, 100)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda().checked() as fake:
        before = open_files()
        yield fake
        gc.collect()
    assert open_files() == before


def check(result: Any) -> Any:
    assert int(result[0]) == 0, result
    return result[1] if len(result) > 1 else None


class Memory:
    """Device memory as an engine has it: NVIDIA's own binding made it, and it is bytes here."""

    def __init__(self, kind: str, num_bytes: int = BYTES, shareable: bool = True) -> None:
        from cuda.bindings import driver

        load_driver()
        self._free = ExitStack()
        check(driver.cuCtxPushCurrent(check(driver.cuDevicePrimaryCtxRetain(0))))
        self._free.callback(driver.cuCtxPopCurrent)
        if kind == "ipc":
            self.ptr = int(check(driver.cuMemAlloc(num_bytes)))
            self._free.callback(driver.cuMemFree, self.ptr)
        else:
            self._map(driver, num_bytes, shareable)
        buffer = (ctypes.c_uint8 * num_bytes).from_address(self.ptr)
        self.bytes: Any = np.frombuffer(buffer, np.uint8)

    def _map(self, driver: Any, num_bytes: int, shareable: bool) -> None:
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = 0
        if shareable:
            kinds = driver.CUmemAllocationHandleType
            properties.requestedHandleTypes = kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        access = driver.CUmemAccessDesc()
        access.location = properties.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        allocation = check(driver.cuMemCreate(num_bytes, properties, 0))
        self.ptr = int(check(driver.cuMemAddressReserve(num_bytes, 0, 0, 0)))
        self._free.callback(driver.cuMemAddressFree, self.ptr, num_bytes)
        check(driver.cuMemMap(self.ptr, num_bytes, 0, allocation, 0))
        self._free.callback(driver.cuMemUnmap, self.ptr, num_bytes)
        check(driver.cuMemSetAccess(self.ptr, num_bytes, [access], 1))
        check(driver.cuMemRelease(allocation))

    def spec(self, shape: tuple[int, ...] = SPEC_SHAPE, offset: int = OFFSET, **changes: Any) -> TensorSpec:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        return replace(TensorSpec(self.ptr + offset, shape, strides, 2, device=0), **changes)

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *error: object) -> None:
        del self.bytes
        self._free.close()


def foreign(handle: TensorSharedHandle) -> TensorSharedHandle:
    """As another process would see it."""
    return replace(handle, process=bytes(16))


def at(ptr: int, num_bytes: int) -> bytes:
    return ctypes.string_at(ptr, num_bytes)


KINDS = ["ipc", "vmm"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_sees_the_bytes(cuda: FakeCuda, kind: str) -> None:
    with Memory(kind) as memory:
        memory.bytes[:] = np.random.default_rng(1).integers(0, 256, BYTES)
        with TensorSharedHandle.export_spec(memory.spec()) as handle, foreign(handle).open() as opened:
            spec = opened.spec(1, 2)
            assert (spec.shape, spec.strides, spec.itemsize, spec.device) == (SPEC_SHAPE, (100, 1), 2, 0)
            assert (spec.page_dim, spec.tokens_per_page) == (1, 2)
            assert (spec.ptr == memory.ptr + OFFSET) == (kind == "ipc")          # the fake maps descriptors anew
            assert at(spec.ptr, 800) == memory.bytes[OFFSET : OFFSET + 800].tobytes()
            ctypes.memset(spec.ptr, 7, 800)
            assert (memory.bytes[OFFSET : OFFSET + 800] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_that_exported_uses_the_tensor_itself(cuda: FakeCuda, kind: str) -> None:
    with Memory(kind) as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        before = cuda.live
        with handle.open() as opened:
            assert opened.spec() == memory.spec()
            assert cuda.live == before


def test_a_fork_is_another_process(cuda: FakeCuda) -> None:
    with Memory("ipc") as memory:
        handle = TensorSharedHandle.export_spec(memory.spec())
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            from flexkv.rank import shared_tensor

            os.write(writer, b"same" if shared_tensor._process == handle.process else b"other")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 10) == b"other"
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("kind", KINDS)
def test_handles_travel_over_a_socket(cuda: FakeCuda, kind: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Memory(kind) as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        memory.bytes[:] = 9
        message, fds = handle.pack()
        socket.send_fds(ours, [message], fds)
        message, fds, _, _ = socket.recv_fds(theirs, 4096, 4)
        with TensorSharedHandle.unpack(message, fds) as got:
            assert (got.shape, got.strides, got.offset, got.num_bytes) == (SPEC_SHAPE, (100, 1), OFFSET, BYTES)
            assert (got.device_uuid, got.process, got.ptr) == (handle.device_uuid, handle.process, handle.ptr)
            opened = foreign(got).open()
        with opened:                                                           # outlives its handle
            assert at(opened.spec().ptr, 800) == bytes([9]) * 800


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_closed_stays_closed(cuda: FakeCuda, kind: str) -> None:
    with Memory(kind) as memory:
        handle = TensorSharedHandle.export_spec(memory.spec())
        opened = foreign(handle).open()
        for _ in range(2):
            handle.close()
            opened.close()
        with pytest.raises(RegistrationError, match="was closed"):
            opened.spec()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_forgotten_is_unmapped_with_a_warning(cuda: FakeCuda, kind: str) -> None:
    with Memory(kind) as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        before = cuda.live
        with pytest.warns(ResourceWarning, match="not closed"):
            foreign(handle).open()
        assert cuda.live == before


def test_what_cannot_be_shared_is_refused(cuda: FakeCuda) -> None:
    with Memory("ipc") as memory, Memory("vmm", shareable=False) as private:
        with pytest.raises(RegistrationError, match="expandable_segments"):
            TensorSharedHandle.export_spec(private.spec())
        with pytest.raises(RegistrationError, match="on the CPU"):
            TensorSharedHandle.export_spec(memory.spec(device=None))
        host = np.zeros(100, np.uint8)
        with pytest.raises(RegistrationError, match="not in memory of CUDA"):
            TensorSharedHandle.export_spec(memory.spec(ptr=host.ctypes.data))
        with pytest.raises(RegistrationError, match="spans several allocations"):
            TensorSharedHandle.export_spec(memory.spec((1, BYTES // 2)))
        handle = TensorSharedHandle.export_spec(memory.spec())
        with pytest.raises(RegistrationError, match="CUDA_VISIBLE_DEVICES"):
            replace(handle, device_uuid=bytes(16)).open()
        with pytest.raises(RegistrationError, match="has 64 bytes"):
            ImportedMemory(load_driver().device(0), b"short", BYTES)


def test_a_torch_tensor_on_the_cpu_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RegistrationError, match="on a GPU"):
        TensorSharedHandle.export(torch.zeros(3))


EXPORTING = {
    "ipc": ["cuCtxPushCurrent", "cuPointerGetAttribute", "cuMemGetAddressRange", "cuIpcGetMemHandle"],
    "vmm": ["cuMemRetainAllocationHandle", "cuMemGetAllocationPropertiesFromHandle", "cuMemExportToShareableHandle",
            "cuMemRelease"],
}
OPENING = {
    "ipc": ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid", "cuCtxPushCurrent", "cuIpcOpenMemHandle"],
    "vmm": ["cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemRelease"],
}
CLOSING = {"ipc": ["cuIpcCloseMemHandle"], "vmm": ["cuMemUnmap", "cuMemAddressFree"]}


def each(calls: dict[str, list[str]]) -> Any:
    return pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in calls for name in calls[kind]])


@each(EXPORTING)
def test_an_export_that_fails_leaves_nothing(cuda: FakeCuda, kind: str, name: str) -> None:
    with Memory(kind) as memory:
        before = cuda.live, open_files()
        cuda.fail(name)
        with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_FAKE"):
            TensorSharedHandle.export_spec(memory.spec())
        cuda.reset()
        assert (cuda.live, open_files()) == before


def test_the_address_of_memory_that_no_call_made_is_refused(cuda: FakeCuda) -> None:
    with Memory("vmm") as memory:
        cuda.fail("cuMemRetainAllocationHandle", code=1)
        with pytest.raises(RegistrationError, match="neither from cudaMalloc nor from cuMemCreate"):
            TensorSharedHandle.export_spec(memory.spec())


@each(OPENING)
def test_an_opening_that_fails_leaves_nothing(cuda: FakeCuda, kind: str, name: str) -> None:
    with Memory(kind) as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        before = cuda.live, open_files()
        cuda.fail(name)
        with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_FAKE"):
            foreign(handle).open()
        cuda.reset()
        assert (cuda.live, open_files()) == before


@each(CLOSING)
def test_a_closing_that_fails_says_so_once(cuda: FakeCuda, kind: str, name: str) -> None:
    with Memory(kind) as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        before = cuda.live, open_files()
        opened = foreign(handle).open()
        cuda.fail(name)
        with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_FAKE"):
            opened.close()
        opened.close()
        assert (cuda.live, open_files()) == before


def example() -> TensorSharedHandle:
    return TensorSharedHandle((4, 100), (100, 1), 2, b"u" * 16, b"p" * 16, 4096, BYTES, OFFSET, b"m" * 64)


@given(st.data())
def test_damaged_messages_are_refused(data: st.DataObject) -> None:
    message, _ = example().pack()
    changed = bytearray(message)
    what = data.draw(st.sampled_from(["flip", "cut", "add", "other"]))
    if what == "flip":
        changed[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    elif what == "cut":
        del changed[data.draw(st.integers(0, len(message) - 1)) :]
    elif what == "add":
        changed += data.draw(st.binary(min_size=1, max_size=200))
    else:
        changed[:] = data.draw(st.binary(max_size=400))
    with pytest.raises(RegistrationError):
        TensorSharedHandle.unpack(bytes(changed))


@given(
    shape=st.lists(st.integers(-1, 1 << 40), max_size=18), strides=st.lists(st.integers(-1, 1 << 40), max_size=18),
    itemsize=st.integers(0, 16), offset=st.integers(0, 1 << 30), num_bytes=st.integers(0, 1 << 50),
)
def test_a_handle_stays_within_its_allocation(
    shape: list[int], strides: list[int], itemsize: int, offset: int, num_bytes: int
) -> None:
    strides += [1] * (len(shape) - len(strides))
    changes: dict[str, Any] = {"shape": tuple(shape), "strides": tuple(strides), "itemsize": itemsize}
    try:
        handle = replace(example(), **changes, offset=offset, num_bytes=num_bytes)
    except FlexKVError:
        return
    again = TensorSharedHandle.unpack(*handle.pack())
    assert (again.shape, again.strides) == (tuple(shape), tuple(strides))
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) * itemsize
    assert last + itemsize <= num_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_descriptors_of_a_refused_message_are_closed(cuda: FakeCuda, kind: str) -> None:
    with Memory(kind) as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        message, fds = handle.pack()
        for wrong in (message[:-1], message[:8], b""):
            with pytest.raises(RegistrationError):
                TensorSharedHandle.unpack(wrong, [os.dup(fd) for fd in fds])
        with pytest.raises(RegistrationError, match="descriptors"):
            TensorSharedHandle.unpack(message, [os.dup(0)] if kind == "ipc" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_move_from_and_to_memory_of_another_process(tmp_path: Path, cuda: FakeCuda, kind: str) -> None:
    layout = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, PAGES, TOKENS, 2, 64)
    shape = (PAGES, *PAGE_SHAPE)
    size = int(np.prod(shape)) * 2
    manager, client = make_manager(tmp_path / "s"), KVTPClient(str(tmp_path / "s"))
    with ExitStack() as stack:
        stack.callback(client.close)
        stack.callback(manager.shutdown)
        memory = stack.enter_context(Memory(kind, LAYERS * size))
        specs = [memory.spec(shape, layer * size) for layer in range(LAYERS)]
        handles = [stack.enter_context(TensorSharedHandle.export_spec(spec)) for spec in specs]
        before = cuda.live
        for resume in (False, True):
            client.register_to_server([foreign(handle) for handle in handles], layout, resume=resume)
            until(lambda: manager.is_ready() and manager.stats()["num_slots"] == 48, 20)
            pages = memory.bytes.reshape(LAYERS, PAGES, -1)
            pages[:, :8] = np.random.default_rng(resume).integers(0, 256, (LAYERS, 8, size // PAGES))
            kept = pages[:, :8].copy()
            task = manager.put_async(tokens_of(8, int(resume)), mapping(range(8)))
            assert manager.wait(task)[task].status is Status.SUCCESS
            pages[:] = 0
            task = manager.get_async(tokens_of(8, int(resume)), mapping(range(20, 28)))
            assert manager.wait(task)[task].status is Status.SUCCESS
            assert (pages[:, 20:28] == kept).all()
            assert not pages[:, :20].any()
            del pages
            assert client.suspend_gpu_mappings() == LAYERS
            assert cuda.live == before
        check_drained(manager)


def test_tensors_that_do_not_fit_are_let_go(cuda: FakeCuda) -> None:
    layout = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, 1, PAGES, TOKENS, 2, 64)
    with Memory("vmm") as memory, TensorSharedHandle.export_spec(memory.spec()) as handle:
        before = cuda.live
        with pytest.raises(RegistrationError, match="neither 64 pages"):
            KVTPClient("unused").register_to_server([foreign(handle)], layout)
        assert cuda.live == before
