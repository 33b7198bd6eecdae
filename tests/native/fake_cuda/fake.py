"""Builds the fake driver, and loads it where the real one would be found: before anything in this process uses CUDA."""

import ctypes
import functools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def build(name: str = "libcuda.so.1") -> Path:
    """A library, newer than its sources."""
    library = ROOT / "build" / "fake_cuda" / name
    source = HERE / f"{name.partition('.')[0]}.c"
    sources = [source, HERE / "memory.h", ROOT / "csrc" / "cuda_api.h"]
    if not library.exists() or any(source.stat().st_mtime > library.stat().st_mtime for source in sources):
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-I",
             str(ROOT / "csrc"), "-o", str(library), str(source), "-pthread"],
            check=True,
        )
    return library


class FakeCuda:
    """Controls of the fake driver for a test."""

    def __init__(self) -> None:
        self._old_parts: list[tuple[int, int]] = []
        self._library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
        for name in ("objects", "bytes", "registered", "calls"):
            getattr(self._library, f"fake_cuda_{name}").restype = ctypes.c_long

    def fail(self, name: str, after: int = 0, code: int = 719) -> None:
        """The call number ``after`` of a function, from now on, fails; ``code`` 0: only count."""
        self._library.fake_cuda_fail(name.encode(), after, code)

    def delay(self, microseconds: int) -> None:
        """Every copy and kernel takes so long."""
        self._library.fake_cuda_delay(ctypes.c_long(microseconds))

    def delay_registering(self, microseconds: int) -> None:
        """Pinning a part of the pool takes so long."""
        self._library.fake_cuda_delay_registering(ctypes.c_long(microseconds))

    def allow_registering(self, number: int) -> None:
        """So many more parts can be pinned, and the next one waits; -1: all."""
        self._library.fake_cuda_allow_registering(ctypes.c_long(number))

    def plan_devices(self, count: int = 1, access: bool = True, nvlink: bool = True) -> None:
        """Set the number of GPUs; whether they can access one another's memory, and over NVLink."""
        self._library.fake_cuda_plan_devices(count, access, nvlink)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Address and size of each part pinned since ``checked``, in order; an earlier test may have left others."""
        self._library.fake_cuda_part.restype = size = ctypes.c_size_t
        found, num_bytes = [], ctypes.c_size_t()
        for number in range(256):
            address = int(size(self._library.fake_cuda_part(number, ctypes.byref(num_bytes))).value)
            if address:
                found.append((address, num_bytes.value))
        return [part for part in found if part not in self._old_parts]

    def reset(self) -> None:
        self.fail("", 0, 0)
        self.allow_registering(-1)
        self.delay(0)
        self.delay_registering(0)
        self.plan_devices()

    @contextmanager
    def checked(self) -> Iterator["FakeCuda"]:
        """It does what it should, and at the end everything has been given back: streams, events, memory."""
        self.reset()
        self._old_parts += self.parts
        before = self.live
        yield self
        self.reset()
        assert self.live == before

    @property
    def calls(self) -> int:
        """Calls since ``fail`` of the function that it named."""
        return int(self._library.fake_cuda_calls())

    @property
    def live(self) -> tuple[int, int, int]:
        """Objects, bytes of device memory, bytes of registered memory that were not given back."""
        return tuple(int(getattr(self._library, f"fake_cuda_{name}")()) for name in ("objects", "bytes", "registered"))


class FakeCuFile:
    """Controls of the fake cuFile, which moves bytes between files and the fake driver's memory."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build("libcufile.so.0")), mode=ctypes.RTLD_GLOBAL)
        for name in ("moves", "registered"):
            getattr(self._library, f"fake_cufile_{name}").restype = ctypes.c_long

    def plan(self, refuse: bool = False, broken: bool = False, fail: int = 0, delay_us: int = 0) -> None:
        """Files are refused; batches fail as a whole; so many reads or writes fail; each takes so long."""
        self._library.fake_cufile_plan(refuse, broken, fail, ctypes.c_long(delay_us))

    @property
    def num_moves(self) -> int:
        """Reads and writes since the process began."""
        return int(self._library.fake_cufile_moves())

    @property
    def num_registered(self) -> int:
        """Files and buffers that were not given back."""
        return int(self._library.fake_cufile_registered())


@functools.cache
def fake_cufile() -> FakeCuFile:
    """The one fake cuFile of this process."""
    return FakeCuFile()


@functools.cache
def fake_cuda() -> FakeCuda:
    """The one fake driver of this process."""
    return FakeCuda()
