"""Builds the fake driver, and loads it where the real one would be found: before anything in this process uses CUDA."""

import ctypes
import functools
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def build() -> Path:
    """The library, newer than its source."""
    library = ROOT / "build" / "fake_cuda" / "libcuda.so.1"
    sources = [HERE / "libcuda.c", HERE / "memory.h", ROOT / "csrc" / "cuda_api.h"]
    if not library.exists() or any(source.stat().st_mtime > library.stat().st_mtime for source in sources):
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I",
             str(ROOT / "csrc"), "-o", str(library), str(HERE / "libcuda.c"), "-pthread"],
            check=True,
        )
    return library


class FakeCuda:
    """What a test can do to the driver."""

    def __init__(self) -> None:
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

    def reset(self) -> None:
        self.fail("", 0, 0)
        self.delay(0)
        self.delay_registering(0)

    @property
    def calls(self) -> int:
        """Calls since ``fail`` of the function that it named."""
        return int(self._library.fake_cuda_calls())

    @property
    def live(self) -> tuple[int, int, int]:
        """Objects, bytes of device memory, bytes of registered memory that were not given back."""
        return tuple(int(getattr(self._library, f"fake_cuda_{name}")()) for name in ("objects", "bytes", "registered"))


@functools.cache
def fake_cuda() -> FakeCuda:
    """The one fake driver of this process."""
    return FakeCuda()
