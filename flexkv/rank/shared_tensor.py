"""GPU tensors of another process. A handle describes a tensor, is sent over a Unix socket, and maps the tensor."""

import io
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from flexkv._core.device.cuda_driver import load_driver
from flexkv._core.device.cuda_memory import ImportedMemory, export_memory
from flexkv.errors import RegistrationError
from flexkv.rank.kv_layout import KVCacheLayout
from flexkv.rank.regions import TensorSpec
from flexkv.rank.tensors import tensor_spec, upstream_spec

if TYPE_CHECKING:
    import torch

_MAGIC = b"FLEXKVT1"
_HEAD = struct.Struct("<8sBBxxI16s16s64sQQQ")
_MAX_DIMS = 16
_CHECKSUM = struct.Struct("<I")

_process = os.urandom(16)                               # not the pid, which may be equal in two containers


def _forked() -> None:
    global _process
    _process = os.urandom(16)


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True, eq=False)
class TensorSharedHandle:
    """A tensor in GPU memory that other processes of this host can open.

    A handle does not own the tensor. The exporting process must keep the tensor until every process that opened it has
    closed it.

    Attributes
    ----------
    shape, strides : tuple of int
        Strides in elements.
    itemsize : int
        Bytes of an element.
    device_uuid : bytes
        Identifies the GPU; its ordinal may differ between processes.
    process : bytes
        Random identity of the exporting process.
    ptr : int
        Address of the first element in the exporting process.
    num_bytes, offset : int
        Size of the allocation, and offset of the tensor in it: allocators put many tensors into one allocation.
    memory : bytes or FileIO
        The allocation: a CUDA IPC handle, or a file of CUDA's virtual memory management, which ``close`` closes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device_uuid: bytes
    process: bytes
    ptr: int
    num_bytes: int
    offset: int
    memory: bytes | io.FileIO

    def __post_init__(self) -> None:
        shape, strides = self.shape, self.strides
        if len(shape) != len(strides) or len(shape) > _MAX_DIMS or self.itemsize < 1 or min((1, *shape)) < 1:
            raise RegistrationError(f"shape {shape} with strides {strides} does not describe a tensor")
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if min((0, *strides)) < 0 or self.offset + (last + 1) * self.itemsize > self.num_bytes:
            raise RegistrationError(
                f"a tensor of shape {shape}, {self.offset} bytes into an allocation of {self.num_bytes}, extends past "
                "its end: a tensor that spans several allocations cannot be shared; with torch, allocate KV without "
                "expandable_segments"
            )

    @classmethod
    def export(cls, tensor: "torch.Tensor") -> "TensorSharedHandle":
        """Create a handle with which other processes can open a tensor.

        Raises
        ------
        RegistrationError
            The tensor is not on a GPU, or its memory cannot be shared.
        CudaUnavailableError, CudaError
        """
        return cls.export_spec(tensor_spec(tensor))

    @classmethod
    def export_spec(cls, spec: TensorSpec) -> "TensorSharedHandle":
        """Like ``export``, for memory that no framework owns."""
        if spec.device is None:
            raise RegistrationError("a tensor on the CPU cannot be shared by handle; export a tensor that is on a GPU")
        device = load_driver().device(spec.device)
        memory, num_bytes, offset = export_memory(device, spec.ptr)
        held = memory if isinstance(memory, bytes) else io.FileIO(memory)
        try:
            return cls(
                spec.shape, spec.strides, spec.itemsize, device.uuid, _process, spec.ptr, num_bytes, offset, held
            )
        except RegistrationError:
            if isinstance(held, io.FileIO):
                held.close()
            raise

    def open(self) -> "OpenedTensor":
        """Map the tensor into this process.

        Raises
        ------
        RegistrationError
            This process does not have the GPU.
        CudaUnavailableError, CudaError
        """
        return OpenedTensor(self)

    def close(self) -> None:
        """Close the file of the allocation, if it has one. Opened tensors stay open. Can be called again."""
        if isinstance(self.memory, io.FileIO):
            self.memory.close()

    def __enter__(self) -> "TensorSharedHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- between processes ------------------------------------------------------------------------------------

    def pack(self) -> tuple[bytes, list[int]]:
        """Returns a message and the descriptors to send with it (``socket.send_fds``). The handle keeps owning them."""
        is_ipc = isinstance(self.memory, bytes)
        head = _HEAD.pack(
            _MAGIC, not is_ipc, len(self.shape), self.itemsize, self.device_uuid, self.process,
            self.memory if isinstance(self.memory, bytes) else b"", self.ptr, self.num_bytes, self.offset,
        )
        message = head + struct.pack(f"<{2 * len(self.shape)}Q", *self.shape, *self.strides)
        fds = [] if isinstance(self.memory, bytes) else [self.memory.fileno()]
        return message + _CHECKSUM.pack(zlib.crc32(message)), fds

    @classmethod
    def unpack(cls, message: bytes, fds: Sequence[int] = ()) -> "TensorSharedHandle":
        """Read a handle from a message of ``pack``. The handle takes ownership of the descriptors; they are closed if
        the message is refused.

        Raises
        ------
        RegistrationError
            The message is damaged or of another version.
        """
        files = [io.FileIO(fd) for fd in fds]
        try:
            return cls._unpack(message, files)
        except RegistrationError:
            for file in files:
                file.close()
            raise

    @classmethod
    def _unpack(cls, message: bytes, files: list[io.FileIO]) -> "TensorSharedHandle":
        body, checksum = message[: -_CHECKSUM.size], message[-_CHECKSUM.size :]
        if len(body) < _HEAD.size or body[:8] != _MAGIC or checksum != _CHECKSUM.pack(zlib.crc32(body)):
            raise RegistrationError("the message is not a tensor handle of this version, or is damaged; export the "
                                    "tensor again, with this version")
        _, has_file, dims, itemsize, uuid, process, ipc, ptr, num_bytes, offset = _HEAD.unpack_from(body)
        if len(body) != _HEAD.size + 16 * dims or len(files) != has_file:
            raise RegistrationError(
                f"a tensor handle of {dims} dimensions has {len(body)} bytes and {len(files)} descriptors, expected "
                f"{_HEAD.size + 16 * dims} and {has_file}; export the tensor again"
            )
        numbers = struct.unpack_from(f"<{2 * dims}Q", body, _HEAD.size)
        return cls(
            numbers[:dims], numbers[dims:], itemsize, uuid, process, ptr, num_bytes, offset, files[0] if files else ipc
        )


class OpenedTensor:
    """A tensor of another process, mapped into this process until ``close``.

    In the exporting process the tensor itself is used, because CUDA refuses to map its memory a second time there.

    Parameters
    ----------
    handle : TensorSharedHandle
        Handle of the tensor; may be closed afterwards.
    """

    def __init__(self, handle: TensorSharedHandle) -> None:
        driver = load_driver()
        device = driver.find_device(handle.device_uuid)
        if device is None:
            raise RegistrationError(
                f"the tensor is on GPU {handle.device_uuid.hex()}, which this process does not have: let it see that "
                "GPU (CUDA_VISIBLE_DEVICES)"
            )
        self._memory: ImportedMemory | None = None
        ptr = handle.ptr
        if handle.process != _process:
            memory = handle.memory if isinstance(handle.memory, bytes) else handle.memory.fileno()
            self._memory = ImportedMemory(device, memory, handle.num_bytes)
            ptr = self._memory.address + handle.offset
        self.shape = handle.shape
        self._strides = handle.strides
        self._itemsize = handle.itemsize
        self._ptr = ptr
        self._device = device

    def spec(self, page_dim: int = 0, tokens_per_page: int | None = None) -> TensorSpec:
        """The tensor's memory in this process, as ``KVTPClient.register_tensors`` takes it.

        Raises
        ------
        RegistrationError
            The tensor was closed.
        """
        if self._ptr == 0:
            raise RegistrationError("the tensor was closed; open its handle again")
        return TensorSpec(
            self._ptr, self.shape, self._strides, self._itemsize, page_dim, tokens_per_page, self._device.ordinal
        )

    def close(self) -> None:
        """Unmap the tensor. It must not be registered with a client any more. Can be called again.

        Raises
        ------
        CudaError
        """
        self._ptr = 0
        if self._memory is not None:
            self._memory.close()

    def __enter__(self) -> "OpenedTensor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def local_specs(
    tensors: "Sequence[torch.Tensor | TensorSharedHandle]", layouts: Sequence[KVCacheLayout], opened: ExitStack
) -> list[TensorSpec]:
    """Describe tensors of this process and handles of others, with their layouts. Handles are opened, and stay so until
    ``opened`` is closed."""
    specs = []
    for tensor, layout in zip(tensors, layouts, strict=True):
        if isinstance(tensor, TensorSharedHandle):
            spec = opened.enter_context(tensor.open()).spec()
        else:
            spec = tensor_spec(tensor)
        specs.append(upstream_spec(spec, layout))
    return specs
