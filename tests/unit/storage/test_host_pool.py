"""The host pool and the layouts of slots."""

import fcntl
import mmap
import os
import resource
from pathlib import Path

import pytest

from flexkv._core.io_queue import IoQueue
from flexkv._core.sealed_memory import check_sealed
from flexkv.errors import CapacityError, RegistrationError
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import KVCacheLayout, KVCacheLayoutType, SlotLayout
from tests.harness import until


def test_pool_grows_in_the_background_and_is_shared() -> None:
    pool = HostPool(3 << 20, 50)
    extents: list[int] = []
    pool.populate(extents.append)
    until(lambda: bool(extents) and extents[-1] == 50)
    assert extents == sorted(extents)
    assert len(extents) > 1
    pool.slot(49)[-3:] = b"end"
    with mmap.mmap(pool.fd, pool.num_bytes) as other:
        assert other[50 * (3 << 20) - 3 : 50 * (3 << 20)] == b"end"
    with pytest.raises(IndexError):
        pool.slot(50)
    pool.close()
    pool.close()


def test_nobody_can_resize_the_pool() -> None:
    """A process that shrank it would kill the controller and all ranks (SIGBUS)."""
    pool = HostPool(4096, 16)
    for size in (0, 4096, 17 * 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(pool.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    check_sealed(pool.fd, pool.num_bytes, "the pool")
    pool.close()


def test_memory_that_is_not_sealed_is_refused() -> None:
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(RegistrationError, match="sealed against resizing"):
        check_sealed(fd, 4096, "the pool")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with pytest.raises(RegistrationError, match="must have 8192 bytes"):
        check_sealed(fd, 8192, "the pool")
    os.close(fd)
    read, write = os.pipe()
    with pytest.raises(RegistrationError, match="not a memfd"):
        check_sealed(read, 4096, "the pool")
    os.close(read)
    os.close(write)


def test_memory_is_slots_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the rest of a last hugepage is waited for before all of it is registered."""
    monkeypatch.setattr(mmap, "PAGESIZE", 2 << 20)
    pool = HostPool(12288, 50)
    assert pool.num_bytes == 2 << 20
    assert pool.memory.nbytes == 50 * 12288
    pool.memory[-3:] = b"end"
    assert bytes(pool.slot(49)[-3:]) == b"end"
    with (tmp_path / "file").open("wb") as file:
        queue = IoQueue([file.fileno()], pool.memory)
        queue.register(50 * 12288)
        if queue.method == "uring":
            until(lambda: queue.registered_bytes == 50 * 12288)
        queue.close()
    pool.close()
    assert pool._memory.closed                                                  # nothing has kept it


def test_closing_stops_growth() -> None:
    pool = HostPool(1 << 20, 4096)
    pool.populate(lambda slots: None)
    pool.close()
    assert pool._thread is not None
    assert not pool._thread.is_alive()


def test_memory_that_cannot_be_had_is_an_error() -> None:
    for slots in (0, -1, 1 << 50):
        with pytest.raises(CapacityError):
            HostPool(4096, slots)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(CapacityError, match="ulimit -n"):
            HostPool(4096, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if Path("/proc/sys/vm/nr_hugepages").read_text().strip() == "0":
        with pytest.raises(CapacityError, match="nr_hugepages"):
            HostPool(4096, 16, hugepage_bytes=2 << 20)


def test_slot_layout() -> None:
    layout = SlotLayout.of([100, 5000, 64])
    assert layout.segment_offsets == (0, 128, 5184)
    assert layout.slot_bytes == 8192
    with pytest.raises(RegistrationError):
        SlotLayout.of([])
    with pytest.raises(RegistrationError):
        SlotLayout.of([4096, 0])
    with pytest.raises(RegistrationError, match="num_head"):
        KVCacheLayout(KVCacheLayoutType.LAYERFIRST, 1, 1, 1, 0, 1)
