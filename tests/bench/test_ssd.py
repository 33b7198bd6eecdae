"""The SSD tier as a pytest-benchmark suite, to compare two commits; small, and asserts no time."""

import mmap
import os
import select
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from flexkv._core.io.io_queue import READ, WRITE, IoQueue
from flexkv.tools.bench import pipeline, ssd
from flexkv.tools.bench.pipeline import Pipeline
from flexkv.tools.bench.session import LAYERS, session

pytestmark = pytest.mark.bench

KIB = 1024
SIZE, COUNT = 64 * KIB, 256


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Pipeline]:
    with session(COUNT, SIZE // LAYERS, **pipeline.cache_options(tmp_path, SIZE, COUNT)) as loaded:
        yield Pipeline(loaded)


@pytest.mark.parametrize("kind", [READ, WRITE], ids=["read", "write"])
def test_queue(benchmark, tmp_path: Path, kind: int) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, COUNT * SIZE)
    at = np.arange(COUNT)
    queue = IoQueue([fd], mmap.mmap(-1, COUNT * SIZE))

    def move() -> int:
        queue.submit(kind, at.astype(np.uint64), np.zeros(COUNT, np.int32), at * SIZE, at[::-1] * SIZE, SIZE)
        done = 0
        while done < COUNT:
            assert select.select([queue.event_fd], [], [], 20)[0]
            results = queue.take()[1]
            assert not results.any()
            done += len(results)
        return done

    assert benchmark(move) == COUNT
    queue.close()
    os.close(fd)


@pytest.mark.parametrize("leg", ["SSD to host", "host to pages", "SSD to pages"])
def test_pipeline(benchmark, loaded: Pipeline, leg: str) -> None:
    load: Callable[[], float] = loaded.prefetch if leg == "SSD to host" else partial(loaded.loaded.get, COUNT)
    setup = None if leg == "host to pages" else loaded.forget
    assert benchmark.pedantic(load, setup=setup, rounds=10) > 0


def test_the_command_measures(tmp_path: Path) -> None:
    lines = [
        *ssd.against_fio(tmp_path, "2048 KiB, depth 32", num_bytes=64 << 20, repeats=2),
        *pipeline.run(tmp_path, 2, [(SIZE, COUNT)]),
    ]
    assert len(lines) == 2 * 3 + 3
    assert all(line.value > 0 and line.unit in ("GB/s", "s/GB", "us") for line in lines)
