"""The I/O queue: right bytes and checksums, one result for each piece, whatever the kernel does."""

import errno
import mmap
import os
import resource
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._core.io.checksum import xxh3_64_slots
from flexkv._core.io.io_queue import READ, WRITE, IoQueue
from flexkv.errors import TransferError
from tests.native.faulty_io_queue import FAILS, HANGS, SHORT, FaultyIoQueue

SIZE = 16384
COUNT = 64
ROOT = Path(__file__).parents[4]
PATIENCE_S = 20.0

Results = dict[int, tuple[int, int]]


class Disk:
    """A file of COUNT places of random bytes, and memory of twice as much; the queues on them."""

    def __init__(self, folder: Path, method: str) -> None:
        self.method = method
        self.path = folder / "file"
        self.content = np.random.default_rng(0).integers(0, 256, COUNT * SIZE, dtype=np.uint8)
        self.path.write_bytes(self.content.tobytes())
        self.fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        self.other_fd = os.open(folder / "other", os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(self.other_fd, 0, COUNT * SIZE)
        self.memory = mmap.mmap(-1, 2 * COUNT * SIZE)
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.queues: list[FaultyIoQueue] = []

    def open(
        self, *, depth: int = 8, deadline_s: float = PATIENCE_S, memory: mmap.mmap | None = None
    ) -> FaultyIoQueue:
        queue = FaultyIoQueue(
            [self.fd, self.other_fd], memory or self.memory, depth=depth, method=self.method, deadline_s=deadline_s
        )
        self.queues.append(queue)
        return queue

    def close(self) -> None:
        for queue in self.queues:
            if queue.event_fd >= 0:
                queue.release()
            queue.close()
            queue.close()
        os.close(self.fd)
        os.close(self.other_fd)

    def in_memory(self, slot: int) -> bytes:
        return self.bytes[slot * SIZE : (slot + 1) * SIZE].tobytes()

    def in_file(self, place: int) -> bytes:
        return self.path.read_bytes()[place * SIZE : (place + 1) * SIZE]

    def sums(self, slots: list[int]) -> list[int]:
        return [int(x) for x in xxh3_64_slots(self.bytes, SIZE, np.array(slots, dtype=np.int32))]


@pytest.fixture(params=["uring", "threads"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path, request.param)
    yield disk
    disk.close()


def submit(queue: IoQueue, kind: int, places: list[int], slots: list[int], file: int = 0, first_tag: int = 0) -> None:
    n = len(places)
    queue.submit(
        kind, np.arange(first_tag, first_tag + n, dtype=np.uint64), np.full(n, file, dtype=np.int32),
        np.array(places, dtype=np.int64) * SIZE, np.array(slots, dtype=np.int64) * SIZE, SIZE,
    )


def until(queue: IoQueue, done: Callable[[Results], bool]) -> Results:
    """Results that came until something is the case; no wait is longer than PATIENCE_S."""
    found: Results = {}
    while True:
        tags, results, checksums = queue.take()
        for tag, result, checksum in zip(tags.tolist(), results.tolist(), checksums.tolist(), strict=True):
            assert tag not in found, "a piece has one result"
            found[tag] = (result, checksum)
        if done(found):
            return found
        assert select.select([queue.event_fd], [], [], PATIENCE_S)[0], f"only {len(found)} results"


def take(queue: IoQueue, count: int) -> Results:
    """So many results, and no more."""
    found = until(queue, lambda found: len(found) >= count)
    assert len(found) == count
    return found


def until_faults_happened(queue: FaultyIoQueue) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while queue.num_planned:
        assert time.monotonic() < deadline
        os.sched_yield()


def shuffled(seed: int, n: int = COUNT) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).permutation(n)]


@pytest.mark.parametrize("order", ["shuffled", "neighbours in the file", "neighbours in both"])
@pytest.mark.parametrize("registered", [0, 2 * COUNT * SIZE])
def test_what_was_written_is_read(disk: Disk, order: str, registered: int) -> None:
    queue = disk.open()
    queue.register(registered)
    places = shuffled(1) if order == "shuffled" else list(range(COUNT))
    slots = list(range(COUNT)) if order == "neighbours in both" else shuffled(2)
    disk.bytes[: COUNT * SIZE] = np.random.default_rng(3).integers(0, 256, COUNT * SIZE, dtype=np.uint8)
    submit(queue, WRITE, places, slots)
    written = take(queue, COUNT)
    assert [written[i] for i in range(COUNT)] == [(0, sum_) for sum_ in disk.sums(slots)]
    assert all(disk.in_file(place) == disk.in_memory(slot) for place, slot in zip(places, slots, strict=True))
    submit(queue, READ, places, [COUNT + slot for slot in slots])
    read = take(queue, COUNT)
    assert read == written
    assert bytes(disk.bytes[: COUNT * SIZE]) == bytes(disk.bytes[COUNT * SIZE :])
    assert queue.method == disk.method
    assert len(queue.busy()) == 0


def test_memory_is_registered_as_it_grows(disk: Disk) -> None:
    if disk.method == "threads":
        queue = disk.open()
        queue.register(len(disk.memory))
        assert queue.registered_bytes == 0
        return
    large = mmap.mmap(-1, (256 << 20) + SIZE)
    queue = IoQueue([disk.fd], large, method="uring")
    try:
        for upto, expected in ((SIZE, 0), (256 << 20, 256 << 20), (len(large), len(large))):
            queue.register(upto)
            for place, offset in enumerate((0, (256 << 20) - SIZE, (256 << 20) - SIZE // 2)):
                queue.submit(READ, np.array([place], np.uint64), np.zeros(1, np.int32), np.array([place * SIZE]),
                             np.array([offset]), SIZE)
                assert take(queue, 1)[place][0] == 0
                assert large[offset : offset + SIZE] == disk.in_file(place)
            assert queue.registered_bytes == expected
            assert queue.reason == ""
    finally:
        queue.close()


def test_short_ones_go_on(disk: Disk) -> None:
    queue = disk.open(depth=2)
    for amount in (4096, 8192, SIZE):
        queue.plan(READ, SHORT, amount, count=3)
        queue.plan(WRITE, SHORT, amount, count=3)
    disk.bytes[: COUNT * SIZE] = np.random.default_rng(4).integers(0, 256, COUNT * SIZE, dtype=np.uint8)
    submit(queue, WRITE, list(range(COUNT)), shuffled(5))
    assert all(result == 0 for result, _ in take(queue, COUNT).values())
    submit(queue, READ, list(range(COUNT)), [COUNT + slot for slot in shuffled(5)])
    assert all(result == 0 for result, _ in take(queue, COUNT).values())
    assert queue.num_planned == 0
    assert bytes(disk.bytes[: COUNT * SIZE]) == bytes(disk.bytes[COUNT * SIZE :])


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_what_was_not_taken_is_tried_again(disk: Disk, code: int) -> None:
    queue = disk.open()
    queue.plan(READ, FAILS, code, count=20)
    submit(queue, READ, shuffled(6), list(range(COUNT)))
    assert all(result == 0 for result, _ in take(queue, COUNT).values())
    assert queue.num_planned == 0
    assert all(disk.in_memory(slot) == disk.in_file(place) for slot, place in enumerate(shuffled(6)))


def test_an_error_is_of_its_piece_alone(disk: Disk) -> None:
    queue = disk.open(depth=1)
    queue.plan(READ, FAILS, errno.EIO, count=2)      # all of them as one I/O, and then the first alone
    submit(queue, READ, list(range(8)), list(range(8)))
    found = take(queue, 8)
    assert [found[i][0] for i in range(8)] == [-errno.EIO] + [0] * 7
    assert found[0][1] == 0
    assert [found[i][1] for i in range(1, 8)] == disk.sums(list(range(1, 8)))


def test_what_is_past_the_end_of_the_file_fails(disk: Disk) -> None:
    os.truncate(disk.path, 3 * SIZE + 5000)
    queue = disk.open()
    for slots in (list(range(6)), [5, 3, 1, 0, 2, 4]):
        submit(queue, READ, list(range(6)), slots)
        found = take(queue, 6)
        assert [found[i][0] for i in range(6)] == [0] * 3 + [-errno.EIO] * 3
        assert all(disk.in_memory(slots[i]) == disk.content[i * SIZE : (i + 1) * SIZE].tobytes() for i in range(3))


def test_a_full_disk_says_so(disk: Disk) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (
        "import numpy as np, os, resource, signal, mmap, select, sys\n"
        "from flexkv._core.io.io_queue import IoQueue, WRITE\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({4 * SIZE}, {limit[1]}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"fd = os.open({str(disk.path) + '2'!r}, os.O_RDWR | os.O_CREAT)\n"
        f"queue = IoQueue([fd], mmap.mmap(-1, {8 * SIZE}), method={disk.method!r})\n"
        f"at = np.arange(8) * {SIZE}\n"
        f"queue.submit(WRITE, np.arange(8, dtype=np.uint64), np.zeros(8, np.int32), at, at, {SIZE})\n"
        "found = {}\n"
        "while len(found) < 8:\n"
        "    assert select.select([queue.event_fd], [], [], 20)[0]\n"
        "    tags, results, _ = queue.take()\n"
        "    found |= dict(zip(tags.tolist(), results.tolist()))\n"
        "queue.close()\n"
        "print([found[i] for i in range(8)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([0] * 4 + [-errno.EFBIG] * 4)
    queue = disk.open()
    queue.plan(WRITE, FAILS, errno.ENOSPC)
    submit(queue, WRITE, [5], [0])
    assert take(queue, 1)[0][0] == -errno.ENOSPC


def test_reads_go_before_writes(disk: Disk) -> None:
    queue = disk.open(depth=1)
    queue.plan(WRITE, HANGS, file=0)
    submit(queue, WRITE, [0], [0], first_tag=100)
    until_faults_happened(queue)                           # it holds the only place while the others are given
    submit(queue, WRITE, [2, 4, 6, 8, 10, 12], [2, 4, 6, 8, 10, 12], first_tag=101)
    submit(queue, READ, [20, 30, 40], [20, 30, 40])
    submit(queue, READ, [1], [1], file=1, first_tag=50)    # of another file: waits for nobody
    assert take(queue, 1).keys() == {50}
    queue.release()
    order: list[int] = []
    while len(order) < 10:
        assert select.select([queue.event_fd], [], [], PATIENCE_S)[0]
        order += queue.take()[0].tolist()
    assert sorted(order[1:4]) == [0, 1, 2]


def test_cancel(disk: Disk) -> None:
    queue = disk.open(depth=1)
    queue.plan(READ, HANGS, file=0)
    submit(queue, READ, [0], [0], first_tag=7)
    until_faults_happened(queue)
    submit(queue, READ, [2, 4, 6], [2, 4, 6], first_tag=10)
    submit(queue, WRITE, list(range(20, 40, 2)), list(range(20, 40, 2)), first_tag=20)
    queue.cancel(np.array([7, 10, 12, 28, 29, 1000], dtype=np.uint64))
    cancelled = take(queue, 4)
    assert cancelled == dict.fromkeys((10, 12, 28, 29), (-errno.ECANCELED, 0))
    queue.release()
    rest = take(queue, 10)
    assert rest.keys() == {7, 11, *range(20, 28)}
    assert all(result == 0 for result, _ in rest.values())


def test_deadline(disk: Disk) -> None:
    queue = disk.open(depth=2, deadline_s=0.2)
    queue.plan(READ, HANGS, file=0)
    submit(queue, READ, [0, 1], [0, 1])                    # one I/O of two pieces, that hangs
    submit(queue, READ, list(range(2, 9, 2)), list(range(2, 9, 2)), file=1, first_tag=30)
    found = take(queue, 6)
    assert found.pop(0) == found.pop(1) == (-errno.ETIMEDOUT, 0)
    assert all(result == 0 for result, _ in found.values()), "another file is not held up"
    assert sorted(queue.busy().tolist()) == [0, 1]
    submit(queue, READ, [4, 6], [4, 6], first_tag=40)
    submit(queue, WRITE, [8], [8], first_tag=42)
    assert take(queue, 3) == dict.fromkeys((40, 41, 42), (-errno.ETIMEDOUT, 0)), "nothing is added to what hangs"
    assert not np.any(disk.bytes[: 2 * SIZE])
    queue.release()
    assert until(queue, lambda found: not len(queue.busy())) == {}
    assert disk.in_memory(0) == disk.in_file(0), "it was touched after its deadline: busy was right"
    submit(queue, READ, [4], [4], first_tag=50)
    assert take(queue, 1)[50][0] == 0


def test_a_late_one_is_no_error(disk: Disk) -> None:
    queue = disk.open(depth=2)
    queue.plan(READ, HANGS, 150, count=2)
    submit(queue, READ, shuffled(7), list(range(COUNT)))
    assert all(result == 0 for result, _ in take(queue, COUNT).values())
    assert all(disk.in_memory(slot) == disk.in_file(place) for slot, place in enumerate(shuffled(7)))


def test_close_with_work_in_flight(disk: Disk) -> None:
    turns = 20
    memory = mmap.mmap(-1, (turns + 1) * COUNT * SIZE)     # no two I/Os that write memory share a slot
    queue = disk.open(depth=4, memory=memory)
    queue.plan(READ, HANGS, 50, count=2)
    for turn in range(turns):
        submit(queue, READ, shuffled(turn), list(range(turn * COUNT, (turn + 1) * COUNT)), first_tag=turn * COUNT)
        submit(queue, WRITE, shuffled(turn), list(range(turns * COUNT, (turns + 1) * COUNT)), file=1)
    queue.close()
    before = memory[:]
    assert memory[:] == before
    assert [len(part) for part in queue.take()] == [0, 0, 0]
    assert len(queue.busy()) == 0
    with pytest.raises(ValueError, match="closed"):
        submit(queue, READ, [0], [0])


def test_close_says_what_never_came_back(disk: Disk) -> None:
    queue = disk.open(deadline_s=0.1)
    queue.plan(READ, HANGS)
    submit(queue, READ, [0, 1], [0, 1])
    take(queue, 2)
    with pytest.raises(TransferError, match="2 pieces are still with the kernel"):
        queue.close()
    queue.close()


def test_who_closes_a_queue_is_done_with_it_before_its_thread_frees_it(tmp_path: Path) -> None:
    parts = [ROOT / f"csrc/io_{part}.c" for part in ("job", "queue", "threads")]
    subprocess.run(
        ["cc", "-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-I", str(ROOT / "csrc"), "-o", str(tmp_path / "closing"),
         str(Path(__file__).with_name("closing_queue.c")), *map(str, parts), "-pthread"], check=True,
    )
    assert subprocess.run([tmp_path / "closing"], check=False).returncode == 0, "wake was called on what had been freed"


def test_a_forgotten_close_warns(disk: Disk) -> None:
    queue = IoQueue([disk.fd], disk.memory, method=disk.method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del queue
    assert [str(warning.message) for warning in caught] == ["an IoQueue was not closed"]
    assert caught[0].category is ResourceWarning


def test_bad_pieces_are_refused_whole(disk: Disk) -> None:
    queue = disk.open()

    def one(file: int, file_offset: int, memory_offset: int, size: int) -> None:
        queue.submit(READ, np.zeros(2, np.uint64), np.array([0, file], np.int32), np.array([0, file_offset]),
                     np.array([0, memory_offset]), size)

    total = len(disk.memory)
    for bad in ((2, 0, 0, SIZE), (-1, 0, 0, SIZE), (0, -1, 0, SIZE), (0, 0, -1, SIZE), (0, 0, total - SIZE + 1, SIZE),
                (0, 0, 0, 0), (0, 0, 0, total + 1), (0, (1 << 63) - 2, 0, SIZE), (0, 0, 0, 1 << 40)):
        with pytest.raises(ValueError, match="piece"):
            one(*bad)
    with pytest.raises(ValueError, match="one length"):
        queue.submit(READ, np.zeros(2, np.uint64), np.zeros(1, np.int32), np.zeros(2, int), np.zeros(2, int), SIZE)
    with pytest.raises(ValueError, match="kind"):
        submit(queue, 2, [0], [0])
    for settings in ({"depth": 0}, {"depth": 5000}, {"deadline_s": 0.0}, {"method": "aio"}):
        with pytest.raises(ValueError, match=r"depth|method"):
            IoQueue([disk.fd], disk.memory, **settings)
    with pytest.raises(ValueError, match="files"):
        IoQueue([], disk.memory)
    submit(queue, READ, [1], [1])
    assert take(queue, 1)[0][0] == 0


def test_many_pieces(disk: Disk) -> None:
    rng = np.random.default_rng(9)
    n, size = 20000, 4096
    queue = disk.open(depth=32, memory=mmap.mmap(-1, n * size))
    places, slots = rng.integers(0, COUNT * SIZE // size, n) * size, rng.permutation(n) * size
    files: NDArray[np.int32] = rng.integers(0, 2, n).astype(np.int32)
    queue.submit(READ, np.arange(n, dtype=np.uint64), files, places, slots, size)
    assert all(result == 0 for result, _ in take(queue, n).values())
