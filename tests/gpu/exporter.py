"""A process that owns tensors on the GPU and shares them by handle."""

import multiprocessing
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from flexkv.errors import RegistrationError
from flexkv.rank.shared_tensor import TensorSharedHandle


def check(result: Any) -> Any:
    """What a function of cuda-bindings returned, if it succeeded."""
    assert int(result[0]) == 0, result
    return result[1] if len(result) > 1 else None


def mapped_memory(num_bytes: int) -> int:
    """Address of memory from cuMemCreate, on device 0, to be shared by descriptor; kept until the process ends."""
    from cuda.bindings import driver

    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 0
    properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    step = int(check(driver.cuMemGetAllocationGranularity(properties, minimum)))
    num_bytes = -(-num_bytes // step) * step
    access = driver.CUmemAccessDesc()
    access.location = properties.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    allocation = check(driver.cuMemCreate(num_bytes, properties, 0))
    ptr = int(check(driver.cuMemAddressReserve(num_bytes, 0, 0, 0)))
    check(driver.cuMemMap(ptr, num_bytes, 0, allocation, 0))
    check(driver.cuMemSetAccess(ptr, num_bytes, [access], 1))
    check(driver.cuMemRelease(allocation))
    return ptr


class _Raw:
    """Memory that torch takes as a tensor of int16."""

    def __init__(self, ptr: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<i2", "data": (ptr, False), "version": 3}


class _Owner:
    def __init__(self, kind: str, count: int, shape: tuple[int, ...]) -> None:
        torch.zeros(1, device="cuda")
        if kind == "vmm":
            size = 2 * int(torch.Size(shape).numel())
            ptr = mapped_memory(count * size)
            raws = [_Raw(ptr + number * size, shape) for number in range(count)]
            self.tensors = [torch.as_tensor(raw, device="cuda") for raw in raws]
            assert self.tensors[0].data_ptr() == ptr
        else:
            self.tensors = [torch.zeros(shape, dtype=torch.int16, device="cuda") for _ in range(count)]

    def fill(self, seed: int) -> None:
        torch.manual_seed(seed)
        for tensor in self.tensors:
            tensor.copy_(torch.randint(-30000, 30000, tensor.shape, dtype=torch.int16))
        torch.cuda.synchronize()

    def zero(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()
        torch.cuda.synchronize()

    def read(self, pages: list[int]) -> list[bytes]:
        return [tensor[pages].cpu().numpy().tobytes() for tensor in self.tensors]


def _serve(pipe: Connection, path: str, kind: str, count: int, shape: tuple[int, ...]) -> None:
    owner = _Owner(kind, count, shape)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        try:
            for tensor in owner.tensors:
                with TensorSharedHandle.export(tensor) as handle:
                    message, fds = handle.pack()
                    socket.send_fds(connection, [message], fds)
        except RegistrationError as error:
            connection.send(str(error).encode())
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(owner, name)(*args))


class Exporter:
    """Process with ``count`` tensors of int16 ``shape``, in memory of cudaMalloc ("ipc") or cuMemCreate ("vmm").

    Attributes
    ----------
    messages : list of (bytes, list of int)
        Packed handles; the text of the error instead, if it could not export.
    """

    def __init__(self, folder: Path, kind: str, count: int, shape: tuple[int, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        path = str(folder / "handles")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(120)
            self._process = context.Process(target=_serve, args=(theirs, path, kind, count, shape), daemon=True)
            self._process.start()
            theirs.close()
            connection, _ = listener.accept()
        self.messages: list[tuple[bytes, list[int]]] = []
        with connection:
            connection.settimeout(120)
            while True:
                message, fds, _, _ = socket.recv_fds(connection, 4096, 4)
                if not message:
                    break
                self.messages.append((message, fds))

    def __call__(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        assert self._pipe.poll(60), "the exporter does not answer"
        return self._pipe.recv()

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
