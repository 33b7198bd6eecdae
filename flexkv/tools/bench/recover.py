"""Time to recover the blocks of the SSD tier after a restart."""

import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from flexkv._core.index.radix import RadixTree
from flexkv._core.io.checksum import xxh3_64
from flexkv.storage.ssd.directory import total_bytes
from flexkv.storage.ssd.slot_table import RECORD
from flexkv.storage.ssd.store import SsdStore
from flexkv.tools.bench.filled_tree import SEQUENCE, random_keys
from flexkv.tools.bench.report import Line, line_of

_SLOT_BYTES = 4096
"""Size of a slot in bytes. It may be small, because only the slot table is read."""

_MOST_BLOCKS = 524_288
"""Maximum number of blocks: a terabyte with slots of 2 MiB. In this benchmark they take 2 GiB of disk."""

_DOMAIN = b"bench"


def run(num_blocks: int, n: int = 5) -> Iterator[Line]:
    """Measure the recovery of a full slot table in random order from the page cache: open, recover, insert into an
    index."""
    num_blocks = min(num_blocks, _MOST_BLOCKS)
    with TemporaryDirectory(prefix="flexkv-bench-", dir=Path.cwd()) as directory:
        _fill(Path(directory), num_blocks)
        opening, recovering, inserting = np.empty(n), np.empty(n), np.empty(n)
        for i in range(n):
            start = time.perf_counter_ns()
            store = _open(Path(directory), num_blocks)
            opening[i] = time.perf_counter_ns() - start
            found = store.recover()
            recovering[i] = time.perf_counter_ns() - start - opening[i]
            tree = RadixTree(num_blocks, 2)
            for now, path in enumerate(found.paths()):
                tree.insert(found.keys[path], found.slots[path], 1, float(now))
            inserting[i] = time.perf_counter_ns() - start - opening[i] - recovering[i]
            if tree.num_blocks != num_blocks or len(found.cut_off):
                raise AssertionError(f"{tree.num_blocks} of {num_blocks} blocks were found")
            store.close()
    for case, took in (("open", opening), ("recover", recovering), ("insert into an index", inserting)):
        yield line_of("recover", f"{num_blocks:,} slots: {case}", took / 1e3)


def _open(directory: Path, num_blocks: int) -> SsdStore:
    return SsdStore([directory], total_bytes(num_blocks, _SLOT_BYTES), _SLOT_BYTES, _DOMAIN, mmap.mmap(-1, _SLOT_BYTES))


def _fill(directory: Path, num_blocks: int) -> None:
    """Write records of sequences of 2,048 blocks, in slots of random order."""
    rng = np.random.default_rng(0)
    records = np.zeros(num_blocks, dtype=RECORD)
    records["key"] = random_keys(rng, num_blocks)
    records["parent"][1:] = records["key"][:-1]
    records["parent"][::SEQUENCE] = 0
    records["sequence"] = 1 + np.arange(num_blocks)
    records["domain"], records["length"] = xxh3_64(_DOMAIN), _SLOT_BYTES
    store = _open(directory, num_blocks)
    store._directories[0].table.write(rng.permutation(num_blocks).astype(np.int32), records)
    store.close()
