"""The kernels that move blocks and compute checksums of slots: compiled by NVRTC at first use, then kept on disk."""

import hashlib
import logging
import os
from pathlib import Path

from flexkv._core.device.cuda_driver import Device, kernel_source
from flexkv.config import cache_directory
from flexkv.errors import CudaError, CudaUnavailableError

logger = logging.getLogger("flexkv.rank")


def _compile(source: bytes, architecture: str) -> bytes:
    """Compile a source to a cubin.

    Raises
    ------
    CudaUnavailableError
        NVRTC is missing.
    CudaError
        The source does not compile for this architecture.
    """
    from cuda.bindings import nvrtc

    def check(function: str, result: "nvrtc.nvrtcResult") -> None:
        if int(result):
            raise CudaError(function, result.name, log.decode(errors="replace") or "no log")

    log = b""
    try:
        result, program = nvrtc.nvrtcCreateProgram(source, b"move_blocks.cu", 0, [], [])
    except RuntimeError as error:
        raise CudaUnavailableError(f"NVRTC is missing ({error}): pip install nvidia-cuda-nvrtc") from error
    check("nvrtcCreateProgram", result)
    try:
        options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode()]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(result):
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
        check("nvrtcCompileProgram", result)
        result, size = nvrtc.nvrtcGetCUBINSize(program)
        check("nvrtcGetCUBINSize", result)
        image = b" " * size
        (result,) = nvrtc.nvrtcGetCUBIN(program, image)
        check("nvrtcGetCUBIN", result)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(image)


def _cache_file(source: bytes, device: Device) -> Path:
    identity = hashlib.sha256(b"\0".join([source, str(device.driver.version).encode(), device.architecture.encode()]))
    return cache_directory() / "kernels" / f"move_blocks-{device.architecture}-{identity.hexdigest()[:32]}.cubin"


def compiled_kernel(device: Device) -> bytes:
    """The compiled kernels for a device, read from disk if they exist for this source, driver and architecture.

    A file is valid if its last 32 bytes are the SHA-256 of the bytes before them. If the folder cannot be written, the
    kernels are compiled each time.
    """
    source = kernel_source()
    file = _cache_file(source, device)
    try:
        content = file.read_bytes()
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return content[:-32]
        logger.warning("%s is damaged; compiling again", file)
    except OSError:
        pass                                            # no file yet: normal at first use
    image = _compile(source, device.architecture)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_bytes(image + hashlib.sha256(image).digest())
        partial.replace(file)
    except OSError as error:
        logger.warning("the compiled kernels are not kept on disk, so the next start compiles again: %s", error)
    return image


_functions: dict[tuple[int, bytes], int] = {}


def _function(device: Device, name: bytes) -> int:
    key = device.ordinal, name
    if key not in _functions:
        _functions[key] = device.load_function(compiled_kernel(device), name)
    return _functions[key]


def move_function(device: Device) -> int:
    """Handle of the kernel that gathers and scatters blocks, loaded into the device once."""
    return _function(device, b"flexkv_move_blocks")


def checksum_function(device: Device) -> int:
    """Handle of the kernel that computes the checksums of slots, loaded into the device once."""
    return _function(device, b"flexkv_checksum_slots")
