"""A file layer that fails on demand, and a twin of ``IoQueue`` over it, in plain Python."""

import errno
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.checksum import xxh3_64

SECTOR = 512


class _Durable:
    """What of a file is on the disk, and what is only said to be written."""

    def __init__(self, fd: int) -> None:
        self.path = os.readlink(f"/proc/self/fd/{fd}")
        with open(self.path, "rb") as file:
            self.content = bytearray(file.read())
        self.pending: list[tuple[int, bytes]] = []

    def sync(self) -> None:
        for offset, data in self.pending:
            self._apply(self.content, offset, data)
        self.pending = []

    @staticmethod
    def _apply(content: bytearray, offset: int, data: bytes) -> None:
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data

    def lose(self, rng: random.Random) -> None:
        """Of what was not synced, some sectors are on the disk and some are not."""
        content = bytearray(self.content)
        share = rng.choice([0.01, 0.1, 0.5, 0.9])
        for offset, data in self.pending:
            start = 0
            while start < len(data):
                stop = min(len(data), start + SECTOR - (offset + start) % SECTOR)
                if rng.random() > share:
                    self._apply(content, offset + start, data[start:stop])
                start = stop
        with open(self.path, "wb") as file:
            file.write(content)


class FaultyFiles:
    """Calls of ``os`` that can fail. One seed, one run, as long as one thread uses it.

    Attributes
    ----------
    fault : callable (name, fd, offset, length) -> errno or 0
        Asked before each call; it may also wait.
    short_share : float
        Share of reads and writes that move only part.
    writes_left : int, optional
        The process is killed in the write after so many: part of it is done, and no call works after it.
    """

    def __init__(self, seed: int = 0, track_power: bool = False) -> None:
        self.rng = random.Random(seed)
        self.fault: Callable[[str, int, int, int], int] = lambda *_: 0
        self.short_share = 0.0
        self.writes_left: int | None = None
        self._track = track_power
        self._files: dict[int, _Durable] = {}               # by inode
        self._lock = threading.RLock()

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        total = sum(len(buffer) for buffer in buffers)
        self._ask("read", fd, offset, total)
        return os.preadv(fd, self._shorten(buffers), offset)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self.pwritev(fd, [memoryview(data)], offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._ask("write", fd, offset, sum(len(buffer) for buffer in buffers))
        with self._lock:
            dies = self.writes_left == 0
            if self.writes_left is not None:
                self.writes_left -= 1
            if dies or self.rng.random() < self.short_share:
                buffers = [self._part(buffers)]
            file = self._durable(fd)
            done = os.pwritev(fd, buffers, offset)
            if file is not None:
                file.pending.append((offset, b"".join(bytes(buffer) for buffer in buffers)[:done]))
        if dies:
            raise OSError(errno.EIO, "killed")
        return done

    def fdatasync(self, fd: int) -> None:
        self._ask("sync", fd, 0, 0)
        with self._lock:
            if (file := self._durable(fd)) is not None:
                file.sync()
        os.fdatasync(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        self._ask("truncate", fd, 0, length)
        os.ftruncate(fd, length)
        self._files.pop(os.fstat(fd).st_ino, None)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._ask("allocate", fd, offset, length)
        os.posix_fallocate(fd, offset, length)

    def lose_power(self) -> None:
        """Must be called when the files are not used any more."""
        for file in self._files.values():
            file.lose(self.rng)
        self._files.clear()

    def _durable(self, fd: int) -> _Durable | None:
        if not self._track:
            return None
        inode = os.fstat(fd).st_ino
        if inode not in self._files:
            self._files[inode] = _Durable(fd)
        return self._files[inode]

    def _ask(self, name: str, fd: int, offset: int, length: int) -> None:
        if self.writes_left is not None and self.writes_left < 0:
            raise OSError(errno.EIO, "killed")
        if code := self.fault(name, fd, offset, length):
            raise OSError(code, os.strerror(code))

    def _part(self, buffers: Sequence[Any]) -> memoryview:
        """The start of the first buffer: whole sectors, if it has more than one."""
        first = memoryview(buffers[0])
        sectors = len(first) // SECTOR
        return first[: self.rng.randint(1, sectors) * SECTOR if sectors else self.rng.randint(1, len(first))]

    def _shorten(self, buffers: Sequence[Any]) -> Sequence[Any]:
        return [self._part(buffers)] if self.rng.random() < self.short_share else buffers


class ThreadQueue:
    """``IoQueue`` in plain Python: reads before writes, results in any order, short I/O continued."""

    READ, WRITE = 0, 1
    method, reason = "threads", "a twin for tests"

    def __init__(
        self, files: Sequence[int], memory: Any, *, layer: Any = os, threads: int = 2, deadline_s: float = 10.0
    ) -> None:
        self._fds = list(files)
        self._memory = memoryview(memory).cast("B")
        self._layer = layer
        self._waiting: tuple[deque[tuple[int, ...]], deque[tuple[int, ...]]] = (deque(), deque())
        self._ended: list[tuple[int, int, int]] = []
        self._news = threading.Condition()
        self._closing = False
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def register(self, upto_bytes: int) -> None:
        assert upto_bytes <= len(self._memory)

    def submit(
        self, kind: int, tags: NDArray[np.uint64], files: NDArray[np.int32], file_offsets: NDArray[np.int64],
        memory_offsets: NDArray[np.int64], size: int,
    ) -> None:
        with self._news:
            assert not self._closing
            columns = (column.tolist() for column in (tags, files, file_offsets, memory_offsets))
            for piece in zip(*columns, strict=True):
                assert 0 <= piece[3] <= len(self._memory) - size
                self._waiting[kind].append((kind, size, *piece))
            self._news.notify_all()

    def cancel(self, tags: NDArray[np.uint64]) -> None:
        wanted = set(tags.tolist())
        with self._news:
            for waiting in self._waiting:
                for piece in [piece for piece in waiting if piece[2] in wanted]:
                    waiting.remove(piece)
                    self._end(piece[2], -errno.ECANCELED, 0)

    def take(self) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint64]]:
        with self._news:
            ended, self._ended = self._ended, []
            if ended:
                os.eventfd_read(self.event_fd)
        columns = list(zip(*ended, strict=True)) or [(), (), ()]
        tags, results, checksums = columns
        return np.array(tags, np.uint64), np.array(results, np.int32), np.array(checksums, np.uint64)

    def busy(self) -> NDArray[np.uint64]:
        return np.empty(0, dtype=np.uint64)

    def close(self) -> None:
        with self._news:
            self._closing = True
            self._news.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self.event_fd)

    def _end(self, tag: int, result: int, checksum: int) -> None:
        self._ended.append((tag, result, checksum))
        os.eventfd_write(self.event_fd, 1)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closing or any(self._waiting))
                waiting = self._waiting[0] or self._waiting[1]
                if not waiting:
                    return
                kind, size, tag, file, file_offset, memory_offset = waiting.popleft()
            result, checksum = self._move(kind, self._fds[file], file_offset, memory_offset, size)
            with self._news:
                self._end(tag, result, checksum)

    def _move(self, kind: int, fd: int, offset: int, memory_offset: int, size: int) -> tuple[int, int]:
        buffer = self._memory[memory_offset : memory_offset + size]
        checksum = xxh3_64(buffer) if kind == self.WRITE else 0
        call = self._layer.preadv if kind == self.READ else self._layer.pwritev
        done = 0
        try:
            while done < size:
                moved = call(fd, [buffer[done:]], offset + done)
                if moved <= 0:
                    return -errno.EIO, 0
                done += moved
        except OSError as error:
            return -(error.errno or errno.EIO), 0
        return 0, xxh3_64(buffer) if kind == self.READ else checksum


def wait_until(done: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """For threads that end on their own; fail after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.0005)
