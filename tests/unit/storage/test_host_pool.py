"""The host pool and the layouts of slots."""

import errno
import fcntl
import logging
import mmap
import os
import resource
import threading
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from flexkv._core.io.io_queue import IoQueue
from flexkv._core.mapping import SharedMapping
from flexkv._core.sealed_memory import check_sealed
from flexkv.errors import CapacityError, RegistrationError
from flexkv.rank.kv_layout import KVCacheLayout, KVCacheLayoutType
from flexkv.storage.host_pool import HostPool
from tests.support.harness import until


def test_pool_grows_in_the_background_and_is_shared() -> None:
    pool = HostPool(3 << 20, 50)
    extents: list[int] = []
    pool.populate(lambda slots, last: extents.append(slots))
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


def populated(pool: HostPool) -> list[tuple[int, bool]]:
    """Populate all; the extents that were reported."""
    extents: list[tuple[int, bool]] = []
    pool.populate(lambda slots, last: extents.append((slots, last)))
    until(lambda: bool(extents) and extents[-1][1], 20)
    return extents


def huge_kib(mapping: str) -> int:
    """Of the pool, mapped by this process as huge pages."""
    found = [part.splitlines() for part in Path("/proc/self/smaps").read_text().split(mapping)[1:]]
    return sum(int(line.split()[1]) for lines in found for line in lines[:25] if line.startswith("ShmemPmdMapped"))


def test_memory_is_made_of_huge_pages_for_every_mapping() -> None:
    """Where the kernel does (Linux 6.1, also with shmem_enabled = never). Else it is all there, of small pages."""
    pool = HostPool(3 << 20, 47)                                    # 141 MiB: the last huge page is not whole
    assert populated(pool) == [(21, False), (42, False), (47, True)]
    assert pool.huge_bytes in (0, 140 << 20)
    assert os.fstat(pool.fd).st_blocks * 512 == pool.num_bytes      # populated, whether huge or not
    assert not np.frombuffer(pool.memory, dtype=np.uint8).any()
    other = SharedMapping(pool.fd, pool.num_bytes)                  # as a rank maps it
    before = huge_kib("flexkv-host-pool")
    pool.slot(46)[-3:] = b"end"
    view = memoryview(other)
    assert bytes(view[47 * (3 << 20) - 3 :]) == b"end"
    np.frombuffer(view, dtype=np.uint8)[:: 4096].sum()              # touched
    assert huge_kib("flexkv-host-pool") - before == pool.huge_bytes >> 10
    view.release()
    other.close()
    pool.close()


class Refusing:
    """Memory of a pool on a kernel that refuses to collapse."""

    def __init__(self, memory: SharedMapping, refusals: list[int]) -> None:
        self._memory = memory
        self.refusals = refusals

    def collapse(self, offset: int, num_bytes: int) -> int:
        return self.refusals.pop(0)

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)


@pytest.mark.parametrize(("refusals", "left"), [
    ([errno.EINVAL, 0, 0], 2), ([errno.EPERM, 0, 0], 2),
    ([errno.EAGAIN, errno.EAGAIN, 0], 0), ([errno.ENOMEM] * 3, 0), ([0, errno.EBUSY, 0], 0),
])
def test_where_huge_pages_are_refused_small_ones_are_used(
    refusals: list[int], left: int, caplog: pytest.LogCaptureFixture
) -> None:
    pool = HostPool(1 << 20, 192)
    memory = Refusing(pool._memory, list(refusals))
    pool._memory = cast(SharedMapping, memory)
    with caplog.at_level(logging.INFO):
        assert populated(pool) == [(64, False), (128, False), (192, True)]
    assert len(memory.refusals) == left                             # a kernel that never does is not asked again
    assert os.fstat(pool.fd).st_blocks * 512 == 192 << 20
    assert caplog.text.count("small pages") == 1
    pool._memory = memory._memory
    pool.close()


def test_a_pool_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    allocate = os.posix_fallocate

    def limited(fd: int, start: int, size: int) -> None:
        if start + size > 100 << 20:
            raise OSError(errno.ENOSPC, "no space")
        allocate(fd, start, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    pool = HostPool(1 << 20, 192)
    assert populated(pool) == [(64, False), (64, True)]
    assert "stops at 67108864 of 201326592 bytes" in caplog.text
    pool.close()


def test_views_keep_a_mapping() -> None:
    fd = os.memfd_create("flexkv-test")
    os.ftruncate(fd, 5 << 20)
    mapping = SharedMapping(fd, 5 << 20)
    os.close(fd)
    view = memoryview(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    view[-1] = 7
    view.release()
    mapping.close()
    mapping.close()
    assert mapping.closed
    with pytest.raises(ValueError, match="not mapped"):
        memoryview(mapping)
    with pytest.raises(ValueError, match="not mapped"):
        mapping.collapse(0, 4096)


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
    pool.populate(lambda slots, last: None)
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


def test_a_layout_of_upstream_is_checked() -> None:
    with pytest.raises(RegistrationError, match="num_head"):
        KVCacheLayout(KVCacheLayoutType.LAYERFIRST, 1, 1, 1, 0, 1)


def test_a_kernel_that_hangs_while_it_populates_does_not_hold_up_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flexkv.storage.host_pool._CLOSE_S", 0.1)
    entered, go_on = threading.Event(), threading.Event()
    pool = HostPool(4096, 4)

    def hang(start: int, size: int) -> None:
        entered.set()
        go_on.wait(20)
        os.posix_fallocate(pool.fd, start, size)

    monkeypatch.setattr(pool, "_allocate", hang)
    pool.populate(lambda slots, last: None)
    assert entered.wait(10)
    pool.close()
    assert pool.fd >= 0                             # the thread still uses it
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "the host pool stays until this process ends: the kernel has not populated a part of it within 0.1 s"]
    go_on.set()
    assert pool._thread is not None
    pool._thread.join(10)
    pool.close()
    assert pool.fd == -1


def test_parts_are_placed_on_the_numa_nodes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of the kernel is read back; this machine may have one node only."""
    placed: list[int] = []
    pool = HostPool(3 << 20, 64)                                    # 192 MiB
    pool.numa_nodes = (0,)
    assert populated(pool)[-1] == (64, True)
    policies = [line for line in Path("/proc/self/numa_maps").read_text().splitlines() if "flexkv-host-pool" in line]
    assert any(" prefer:0 " in line for line in policies)
    pool.close()

    class Placing:
        def place(self, start: int, size: int, node: int) -> int:
            placed.append(node)
            return 0

    pool = HostPool(3 << 20, 64)
    memory, pool.numa_nodes = pool._memory, (4, 2)
    monkeypatch.setattr(pool, "_memory", cast(SharedMapping, Placing()))
    for start in range(0, 192 << 20, 64 << 20):
        pool._place(start, 64 << 20)
    assert placed == [4, 2, 4]
    monkeypatch.setattr(pool, "_memory", memory)
    pool.close()


def test_a_node_that_does_not_exist_leaves_the_choice_to_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    pool = HostPool(3 << 20, 64)
    pool.numa_nodes = (0, 900)
    assert populated(pool)[-1] == (64, True)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "the host pool cannot be placed on NUMA node 900 (Invalid argument), so the kernel chooses the nodes; see "
        "numa_nodes and /sys/devices/system/node/has_memory"]
    pool.close()
