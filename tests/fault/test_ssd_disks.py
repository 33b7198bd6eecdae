"""The SSD store while things go wrong: on disks that fail or are full.

Every block that a read calls good is compared with what was written under its key (``tests.support.ssd_store``).
"""

import errno
import os
import random
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv._core.io.io_queue import READ, WRITE
from tests.native.faulty_io_queue import FAILS, SHORT, FaultyIoQueue
from tests.support.faulty_files import FaultyFiles, wait_until
from tests.support.ssd_store import (
    METHODS,
    SLOT_BYTES,
    Tier,
    check_what_is_offered,
    content_of,
    hanging_queue,
    keys_of,
    one_thread,
)

SLOTS = 12


# ---- disks that fail ------------------------------------------------------------------------------------------


def test_errors_at_random(tmp_path: Path) -> None:
    """Short reads and writes, and errors, in data and table; each block has one result, and none is wrong."""
    for seed in range(60):
        files = FaultyFiles(seed)
        tier = Tier([tmp_path / "a", tmp_path / "b"], SLOTS, probe_s=0.001, **one_thread(files))
        tier.recover()
        tier.store.slots.free(tier.store.slots._in_use.nonzero()[0].astype(np.int32))
        files.short_share = 0.3
        share = files.rng.choice([0.02, 0.2, 0.6])
        rng = random.Random(seed)
        files.fault = lambda *_: errno.EIO if rng.random() < share else 0       # noqa: B023
        for _ in range(15):
            slots = tier.store.slots.allocate(rng.randint(1, 8))
            if slots is None:
                continue
            numbers = [rng.randrange(1000) for _ in slots]
            ok = tier.write(numbers, slots)
            assert not (tier.read(numbers, slots) & ~ok).any()
            tier.store.slots.free(slots)
            tier.store.slots.check_integrity()
        files.fault = lambda *_: 0
        wait_until(lambda: tier.store.stats()["directories_usable"] == 2)       # noqa: B023
        tier.close()
        check_what_is_offered([tmp_path / "a", tmp_path / "b"], num_slots=SLOTS)


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Tier, dict[str, int]]]:
    """A tier, and what calls of each name fail with."""
    files, codes = FaultyFiles(), dict[str, int]()
    files.fault = lambda name, *_: codes.get(name, 0)
    tier = Tier([tmp_path / "a"], 160, probe_s=0.01, **one_thread(files))
    yield tier, codes
    codes.clear()
    tier.store.slots.check_integrity()
    tier.close()


def test_a_slot_that_fails_twice_is_retired(failing: tuple[Tier, dict[str, int]]) -> None:
    tier, codes = failing
    slots = tier.allocate(1)
    capacity = tier.store.slots.capacity
    assert tier.write([1], slots).all()
    codes["read"] = errno.EIO
    assert not tier.read([1], slots).any()
    assert tier.store.stats()["slots_retired"] == 0
    assert not tier.read([1], slots).any()
    codes.clear()
    assert tier.store.stats()["slots_retired"] == 1
    assert tier.store.stats()["read_errors"] == 2
    assert tier.read([1], slots).all()                          # what is there may still be read
    assert not tier.write([2], slots).any()
    tier.store.slots.free(slots)
    assert tier.store.slots.capacity == capacity - 1
    assert tier.store.slots.num_free == capacity - 1
    assert int(slots[0]) not in tier.allocate(capacity - 1)


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENODEV])
def test_a_directory_that_fails_goes_offline_and_comes_back(
    failing: tuple[Tier, dict[str, int]], kind: str, code: int
) -> None:
    tier, codes = failing
    slots = tier.allocate(64)
    assert tier.write(range(64), slots).all()
    codes["write"] = codes["sync"] = code                        # so that a probe fails, too
    codes[kind] = code
    ok = tier.read(range(64), slots) if kind == "read" else tier.write(range(100, 164), slots)
    assert not ok.any()
    assert not tier.store.usable()
    stats = tier.store.stats()
    assert stats["directories_gone_offline"] == 1
    assert stats["directories_usable"] == 0
    assert not tier.read(range(64), slots).any()                 # at once
    assert not tier.write(range(64), slots).any()
    assert tier.store.slots.num_free == 0
    assert tier.store.slots.allocate(1) is None
    codes.clear()
    wait_until(tier.store.usable)
    more = tier.allocate(64)
    assert tier.write(range(64), more).all()
    assert tier.read(range(64), more).all()


def test_one_directory_fails_and_the_other_goes_on(tmp_path: Path) -> None:
    files = FaultyFiles()
    tier = Tier([tmp_path / "a", tmp_path / "b"], 64, probe_s=1000, **one_thread(files))
    slots = np.arange(128, dtype=np.int32)
    tier.allocate(128)
    bad = tier.store._directories[0].data.fd
    files.fault = lambda name, fd, *_: errno.EIO if fd == bad else 0
    ok = np.concatenate([tier.write(range(i, i + 32), slots[i : i + 32]) for i in range(0, 128, 32)])
    assert ok.tolist() == [False] * 64 + [True] * 64
    assert tier.store.usable()
    assert tier.read(range(64, 128), slots[64:]).all()
    files.fault = lambda *_: 0
    tier.close()


def test_a_disk_that_returns_something_else_goes_offline(tmp_path: Path) -> None:
    tier = Tier([tmp_path / "a"], 40, probe_s=1000)
    slots = tier.allocate(40)
    assert tier.write(range(40), slots).all()
    with (tmp_path / "a" / "flexkv.data").open("r+b") as file:
        for slot in range(40):
            file.seek(slot * SLOT_BYTES + 7)
            file.write(b"\x55\xAA")
    for i in range(40):
        assert not tier.read([i], slots[i : i + 1]).any()
    stats = tier.store.stats()
    assert stats["checksum_mismatches"] == 16
    assert not tier.store.usable()
    tier.close()


# ---- errors that nobody foresees ------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("broken", ["erase", "write", "submit", "_finish_read", "_finish_write"])
def test_whatever_is_raised_no_job_waits_for_ever(
    tmp_path: Path, broken: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FaultyIoQueue] = []
    tier = Tier([tmp_path / "a"], SLOTS, make_queue=partial(hanging_queue, made, method))
    slots = tier.allocate(4)
    assert tier.write(range(4), slots).all()

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    if broken == "submit":
        monkeypatch.setattr(tier.store._queues, "host", Refusing(made[0]))
    else:
        monkeypatch.setattr(tier.store if broken[0] == "_" else tier.store._directories[0].table, broken, fail)
    job = tier.start_read(range(4), slots)
    read = tier.wait(job, 4)
    assert read.tolist() == [broken not in ("submit", "_finish_read")] * 4
    assert tier.write(range(10, 14), slots).tolist() == [broken == "_finish_read"] * 4
    monkeypatch.undo()
    assert tier.write(range(20, 24), tier.allocate(4)).all()
    assert not tier.store._batches._batches
    tier.close()


class Refusing:
    """A queue that takes nothing."""

    def __init__(self, queue: FaultyIoQueue) -> None:
        self._queue = queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def submit(self, *_: Any) -> None:
        raise MemoryError


# ---- a disk that is full --------------------------------------------------------------------------------------


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    """A small tmpfs, in a mount namespace of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.support.ssd_store import Tier\n"
        "path = Path(sys.argv[1])\n"
        "try: Tier([path / 'a'], 1000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(sum(file.stat().st_blocks * 512 for file in (path / 'a').iterdir()))\n"
        "tier = Tier([path / 'a'], 50); print(tier.write(range(50)).all()); tier.close()"
    )
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c \"$0\" {tmp_path}"
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    told = subprocess.run([*namespace, "sh", "-c", mount, code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    error, left, works = told.stdout.splitlines()
    assert error.startswith("CapacityError")
    assert "set ssd_cache_gb lower" in error
    assert int(left) <= 4096
    assert works == "True"


# ---- many at once ---------------------------------------------------------------------------------------------


def worker(tier: Tier, ended: dict[int, list[tuple[np.ndarray, np.ndarray]]], first: int, wrong: list[str]) -> None:
    """Writes and reads in host slots of its own; results come by whoever takes them."""
    rng = random.Random(first)

    def result(job: int, count: int) -> np.ndarray:
        wait_until(lambda: sum(len(indices) for indices, _ in ended.get(job, ())) == count)
        ok = np.zeros(count, dtype=np.bool_)
        for indices, good in ended.pop(job):
            ok[indices] = good
        return ok

    for job in range(first, first + 60, 2):
        slots = tier.store.slots.allocate(rng.randint(1, 4))
        if slots is None:
            continue
        numbers = [rng.randrange(1000) for _ in slots]
        hosts = np.arange(first // 100 * 8, first // 100 * 8 + len(slots), dtype=np.int32)
        for host, number in zip(hosts, numbers, strict=True):
            tier.host[host] = content_of(number)
        tier.store.write(job, slots, hosts, keys_of(numbers), keys_of(numbers))
        if rng.random() < 0.3:
            tier.store.cancel(job)
        written = result(job, len(slots))
        tier.host[hosts] = 0
        tier.store.read(job + 1, slots, hosts, keys_of(numbers))
        read = result(job + 1, len(slots))
        same = np.array([(tier.host[hosts[i]] == content_of(number)).all() for i, number in enumerate(numbers)])
        if (read & ~same).any() or (read & ~written).any():
            wrong.append(f"job {job}: {written} {read} {same}")
        tier.store.slots.free(slots)


@METHODS
@pytest.mark.parametrize("fails", [False, True])
def test_threads_that_share_a_store_on_disks_that_fail(tmp_path: Path, fails: bool, method: str) -> None:
    made: list[FaultyIoQueue] = []
    tier = Tier([tmp_path / "a", tmp_path / "b"], 8, probe_s=0.001, make_queue=partial(hanging_queue, made, method))
    ended: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    wrong: list[str] = []
    threads = [threading.Thread(target=worker, args=(tier, ended, 100 * i, wrong)) for i in range(4)]
    for thread in threads:
        thread.start()
    rng = random.Random(0)
    while any(thread.is_alive() for thread in threads):
        if fails and made[0].num_planned < 4:
            made[0].plan(rng.choice([READ, WRITE]), rng.choice([FAILS, SHORT]), rng.choice([5, 512]), 1)
        select.select([tier.store.event_fd], [], [], 0.001)
        for job, indices, ok in tier.store.results():
            ended.setdefault(job, []).append((indices, ok))
    assert not wrong
    tier.store.slots.check_integrity()
    assert tier.store.slots.num_free == tier.store.slots.capacity or fails
    tier.close()
    check_what_is_offered([tmp_path / "a", tmp_path / "b"], num_slots=8)
