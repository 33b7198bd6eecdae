"""The SSD tier: the I/O queue with checksums beside ``fio`` with io_uring on the same file, then the pipeline."""

import json
import mmap
import os
import resource
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.checksum import xxh3_64_slots
from flexkv._core.io.io_queue import READ, WRITE, IoQueue
from flexkv.errors import FlexKVError
from flexkv.tools.bench import pipeline
from flexkv.tools.bench.report import Line

FILE_BYTES = 512 << 20
REPEATS = 7
KIB = 1024
SIZES = [64 * KIB, 256 * KIB, 2048 * KIB]
DEPTHS = [4, 32]
STALL_S = 60.0
PAUSE_S = 1e-3      # pause between two polls of the results, as in service, where the thread has other work
_FIO_WORDS = {"read": "randread", "write": "randwrite", "mixed": "randrw"}


@dataclass(frozen=True)
class Run:
    """Time to move all bytes once."""

    seconds: float
    cpu_seconds: float


class Fio:
    """``fio`` on the same file, each block once, in random order. Another file may be on a faster part of the disk."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        program = shutil.which("fio")
        if program is None:
            raise FlexKVError("the ceiling of this bench is fio: sudo apt-get install fio")
        self._num_bytes = num_bytes
        self._command = [
            "env", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1",     # huge pages like ours: small pages are slower
            program, "--name=flexkv", f"--filename={path}", f"--size={num_bytes}", "--ioengine=io_uring", "--direct=1",
            "--fallocate=none", "--randrepeat=0", "--output-format=json",
        ]

    def run(self, way: str, size: int, depth: int) -> Run:
        """Move all bytes in blocks of ``size`` bytes, ``depth`` at a time. Raises FlexKVError if fio fails."""
        options = [f"--rw={_FIO_WORDS[way]}", f"--bs={size}", f"--iodepth={depth}"]
        done = subprocess.run([*self._command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise FlexKVError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"] or job["read"]["io_bytes"] + job["write"]["io_bytes"] != self._num_bytes:
            raise FlexKVError(f"fio did not move all {self._num_bytes} bytes: error {job['error']}")
        seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
        return Run(seconds, (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3)


class Ours:
    """The I/O queue on a file and memory of the same size, each piece once, in random order in both."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        self.memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self._rng = np.random.default_rng(0)
        self._bytes.view(np.uint64)[:] = self._rng.integers(0, 1 << 64, num_bytes // 8, dtype=np.uint64)
        os.posix_fallocate(self._fd, 0, num_bytes)
        self._content = np.zeros(num_bytes, dtype=np.uint8)      # expected content of the file

    def write_all(self) -> None:
        """Write every block of the file, so that measured writes overwrite allocated blocks."""
        self.run("write", 1024 * KIB, 32)

    def run(self, way: str, size: int, depth: int) -> Run:
        """Move all bytes and compare them; FlexKVError if bytes differ."""
        count = self.num_bytes // size
        in_file, in_memory = (self._rng.permutation(count).astype(np.int64) for _ in range(2))
        reads = count if way == "read" else count // 2 if way == "mixed" else 0
        queue = IoQueue([self._fd], self.memory, depth=depth)
        try:
            queue.register(self.num_bytes)
            while queue.registered_bytes < self.num_bytes and not queue.reason:
                time.sleep(1e-3)
            taken, run = self._move(queue, in_file * size, in_memory * size, reads, size)
        finally:
            queue.close()
        pieces, content = self._bytes.reshape(-1, size), self._content.reshape(-1, size)
        content[in_file[reads:]] = pieces[in_memory[reads:]]
        sums = [xxh3_64_slots(of, size, at.astype(np.int32)) for of, at in
                ((self._bytes, in_memory), (self._content, in_file))]
        if not (np.array_equal(taken, sums[0]) and np.array_equal(taken, sums[1])):
            raise FlexKVError(f"{way} of {size} bytes: bytes differ")
        return run

    def _move(
        self, queue: IoQueue, in_file: NDArray[np.int64], in_memory: NDArray[np.int64], reads: int, size: int
    ) -> tuple[NDArray[np.uint64], Run]:
        """Move all pieces; returns the checksum of each piece, and the time."""
        count = len(in_file)
        tags, files, sums = np.arange(count, dtype=np.uint64), np.zeros(count, np.int32), np.zeros(count, np.uint64)
        before, start, done = _cpu_seconds(), time.perf_counter(), 0
        for kind, part in ((WRITE, slice(reads, count)), (READ, slice(0, reads))):
            queue.submit(kind, tags[part], files[part], in_file[part], in_memory[part], size)
        while done < count:
            if not select.select([queue.event_fd], [], [], STALL_S)[0]:
                raise FlexKVError(f"no read or write has ended for {STALL_S:.0f} seconds")
            time.sleep(PAUSE_S)
            which, results, checksums = queue.take()
            if results.any():
                raise FlexKVError(f"a read or write failed: {os.strerror(-int(results.min()))}")
            sums[which.astype(np.intp)] = checksums
            done += len(which)
        return sums, Run(time.perf_counter() - start, _cpu_seconds() - before)

    def close(self) -> None:
        os.close(self._fd)
        del self._bytes, self._content
        self.memory.close()


def _cpu_seconds() -> float:
    """CPU time of all threads of this process in seconds, including kernel threads that work for it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _compare(ours: Ours, fio: Fio, way: str, size: int, depth: int, repeats: int) -> Iterator[Line]:
    mine, theirs = [], []
    for turn in range(repeats):
        if turn % 2:
            theirs.append(fio.run(way, size, depth))
        if way == "mixed":
            ours.write_all()        # so that the content of the file is known for reads
        mine.append(ours.run(way, size, depth))
        if not turn % 2:
            theirs.append(fio.run(way, size, depth))
    case = f"{way} {size // KIB} KiB, depth {depth}"
    gigabytes = ours.num_bytes / 1e9
    speed, best = (gigabytes / float(np.median([run.seconds for run in runs])) for runs in (mine, theirs))
    yield Line("ssd", f"{case}; ceiling: fio", round(speed, 2), "GB/s", round(best, 2), round(speed / best, 3), repeats)
    cost, least = (float(np.median([run.cpu_seconds for run in runs])) / gigabytes for runs in (mine, theirs))
    yield Line("ssd", f"{case}; CPU time; ceiling: fio", round(cost, 3), "s/GB", round(least, 3),
               round(least / cost, 3), repeats)


def run(directory: Path | None) -> Iterator[Line]:
    """Measure the queue, then the pipeline.

    Raises
    ------
    FlexKVError
        fio is not installed, or the file system does not support O_DIRECT.
    """
    with tempfile.TemporaryDirectory(prefix="flexkv-bench-", dir=directory) as folder:
        yield from against_fio(Path(folder))
        yield from pipeline.run(Path(folder))


def against_fio(
    folder: Path, only: str = "", num_bytes: int = FILE_BYTES, repeats: int = REPEATS
) -> Iterator[Line]:
    """Measure reads, writes, and both at once, in several sizes and depths; only cases whose name contains ``only``.

    Raises
    ------
    FlexKVError
        fio is not installed, or the file system does not support O_DIRECT.
    """
    fio = Fio(folder / "file", num_bytes)
    try:
        ours = Ours(folder / "file", num_bytes)
    except OSError as error:
        raise FlexKVError(f"{folder}: {error.strerror}; choose a folder on a local disk with --dir") from error
    try:
        ours.write_all()
        for way in _FIO_WORDS:
            for size in SIZES:
                for depth in DEPTHS:
                    if only in f"{way} {size // KIB} KiB, depth {depth}":
                        yield from _compare(ours, fio, way, size, depth, repeats)
    finally:
        ours.close()
        (folder / "file").unlink(missing_ok=True)
