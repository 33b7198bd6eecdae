"""SSD -> host -> pages as one pipeline, beside each of its two legs. The measurements alternate."""

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
"""Bytes of a block and number of blocks of each case."""

_WRITTEN_S = 60.0


class Pipeline:
    """A sequence that is on SSD, and is loaded into host memory and evicted from it repeatedly.

    Parameters
    ----------
    loaded : Session
        Session with an SSD tier, and with as many host slots as the sequence has blocks.
    """

    def __init__(self, loaded: Session) -> None:
        self.loaded = loaded
        self._manager = loaded.manager
        until = time.monotonic() + _WRITTEN_S
        while self._stat("ssd_written_blocks") < loaded.num_blocks:
            if time.monotonic() > until:
                raise FlexKVError(f"the blocks were not written to SSD within {_WRITTEN_S:.0f} s; see the log")
            loaded.get(loaded.num_blocks)              # used blocks are written back, within the limit of the queue
            time.sleep(0.01)
        self.forget()                                  # fills the free SSD slots, so that no block is written later
        while self._stat("ssd_queued_blocks") + self._stat("ssd_blocks_being_written"):
            if time.monotonic() > until:
                raise FlexKVError(f"write-back has not ended within {_WRITTEN_S:.0f} s; see the log")
            time.sleep(0.01)

    def _stat(self, name: str) -> int:
        return self._manager.stats().get(name, 0)

    def forget(self) -> None:
        """Evict the sequence from host memory by a put of another, which is not written to the full SSD tier."""
        self.loaded.put(self.loaded.other_tokens())

    def prefetch(self) -> float:
        """Prefetch the whole sequence into host memory; returns the microseconds."""
        start = time.perf_counter_ns()
        response = self.loaded.wait(self._manager.prefetch_async(self.loaded.tokens))
        took = (time.perf_counter_ns() - start) / 1e3
        if response.return_mask is None or not response.return_mask.all():
            raise AssertionError("not all blocks came from SSD")
        return took

    def turn(self) -> tuple[float, float, float]:
        """Measure SSD -> host, host -> pages, and SSD -> host -> pages; returns the microseconds of each."""
        before = self._stat("ssd_store_blocks_read")
        self.forget()
        first = self.prefetch()
        second = self.loaded.checked_get()
        self.forget()
        both = self.loaded.checked_get()
        if self._stat("ssd_store_blocks_read") - before != 2 * self.loaded.num_blocks:
            raise AssertionError("the number of blocks read from SSD is not twice the sequence")
        return first, second, both


def cache_options(directory: str | Path, size: int, count: int) -> dict[str, Any]:
    """Settings of ``CacheConfig`` with which a sequence of ``count`` blocks fills the host tier, and is not evicted
    ahead of need."""
    return {
        "num_cpu_blocks": count, "evict_start_threshold": 1.0, "ssd_cache_dir": str(directory),
        "ssd_cache_gb": total_bytes(count + count // 8, size) / (1 << 30),
    }


def run(folder: Path, n: int = 11, cases: list[tuple[int, int]] = CASES) -> Iterator[Line]:
    """Measure the load of blocks that are on SSD only. The ceiling is the slower of the two legs."""
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
