"""SSD -> host -> pages as one pipeline, beside its two legs alone; they take turns."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flexkv.errors import FlexKVError
from flexkv.storage.ssd.directory import total_bytes
from flexkv.tools.bench.report import Line, line_of
from flexkv.tools.bench.session import LAYERS, Session, session

KIB = 1024
CASES = [(2048 * KIB, 256), (64 * KIB, 4096)]
"""Bytes of a block, blocks."""

_WRITTEN_S = 60.0


class Pipeline:
    """A sequence that is on SSD, and comes and goes in host memory.

    Parameters
    ----------
    loaded : Session
        With an SSD tier, and as many host slots as the sequence has blocks.
    """

    def __init__(self, loaded: Session) -> None:
        self.loaded = loaded
        self._manager = loaded.manager
        until = time.monotonic() + _WRITTEN_S
        while self._stat("ssd_written_blocks") < loaded.num_blocks:
            if time.monotonic() > until:
                raise FlexKVError(f"not written to SSD within {_WRITTEN_S:.0f} s; see the log")
            loaded.get(loaded.num_blocks)              # what is used is written, as much of it as may be queued
            time.sleep(0.01)
        self.forget()                                  # what slots are left on SSD are taken: nothing is written later
        while self._stat("ssd_queued_blocks") + self._stat("ssd_blocks_being_written"):
            if time.monotonic() > until:
                raise FlexKVError(f"the SSD is not done within {_WRITTEN_S:.0f} s; see the log")
            time.sleep(0.01)

    def _stat(self, name: str) -> int:
        return self._manager.stats().get(name, 0)

    def forget(self) -> None:
        """Another sequence takes its place in host memory; no slot is free on SSD for one that is put once."""
        self.loaded.put(self.loaded.other_tokens())

    def prefetch(self) -> float:
        """Microseconds until all of it is in host memory."""
        start = time.perf_counter_ns()
        response = self.loaded.wait(self._manager.prefetch_async(self.loaded.tokens))
        took = (time.perf_counter_ns() - start) / 1e3
        if response.return_mask is None or not response.return_mask.all():
            raise AssertionError("not all blocks came from SSD")
        return took

    def turn(self) -> tuple[float, float, float]:
        """Microseconds of SSD -> host, host -> pages, and SSD -> host -> pages."""
        before = self._stat("ssd_store_blocks_read")
        self.forget()
        first = self.prefetch()
        second = self.loaded.checked_get()
        self.forget()
        both = self.loaded.checked_get()
        if self._stat("ssd_store_blocks_read") - before != 2 * self.loaded.num_blocks:
            raise AssertionError("a block was read that should have been in memory, or the other way round")
        return first, second, both


def cache_options(directory: str | Path, size: int, count: int) -> dict[str, Any]:
    """Of ``CacheConfig``: a sequence of ``count`` blocks fills the host tier, and is not pushed out ahead of need."""
    return {
        "num_cpu_blocks": count, "evict_start_threshold": 1.0, "ssd_cache_dir": str(directory),
        "ssd_cache_gb": total_bytes(count + count // 8, size) / (1 << 30),
    }


def run(folder: Path, n: int = 11, cases: list[tuple[int, int]] = CASES) -> Iterator[Line]:
    """Time to ready of blocks that are on SSD only; the ceiling is the slower of the two legs alone."""
    for size, count in cases:
        with (
            TemporaryDirectory(dir=folder) as store,
            session(count, size // LAYERS, **cache_options(store, size, count)) as loaded,
        ):
            pipeline = Pipeline(loaded)
            pipeline.turn()
            took = np.array([pipeline.turn() for _ in range(n)])
        case = f"{count:,} blocks of {size // KIB} KiB"
        ceiling = max(np.median(took[:, 0]), np.median(took[:, 1]))
        yield line_of("ssd", f"{case}: SSD to host", took[:, 0])
        yield line_of("ssd", f"{case}: host to pages", took[:, 1])
        yield line_of("ssd", f"{case}: SSD to pages; ceiling: slower leg", took[:, 2], float(ceiling))
