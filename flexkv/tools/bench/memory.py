"""Memory of the index."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexkv._core.index.slots import SlotAllocator
from flexkv.tools.bench.filled_tree import FilledTree
from flexkv.tools.bench.report import Line

_NUM_TIERS = 3


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise AssertionError("/proc/self/status has no VmRSS")
    return int(found[1]) * 1024


def run(num_blocks: int) -> Iterator[Line]:
    """Measure the bytes of a block in an index of three tiers, each with the allocator of its slots and their
    checksums: as the index counts its part, and as the process grows."""
    before = resident_bytes()
    filled = FilledTree(num_blocks)
    tiers = [(SlotAllocator(num_blocks), np.ones(num_blocks, dtype=np.uint64)) for _ in range(_NUM_TIERS)]
    for allocator, _ in tiers:
        slots = allocator.allocate(num_blocks)
        assert slots is not None  # narrowing: all are free
        allocator.free(slots)                              # touches the generations
        del slots
    grown = resident_bytes() - before - sum(keys.nbytes for keys in filled.sequences)
    blocks = filled.tree.num_blocks
    size = f"{blocks / 1e6:.3g} M blocks, three tiers"
    yield Line("memory", f"index; {size}", round(filled.tree.memory_bytes / blocks, 2), "bytes/block")
    with_checksums = filled.tree.memory_bytes + sum(checksums.nbytes for _, checksums in tiers)
    yield Line("memory", f"index with checksums; {size}", round(with_checksums / blocks, 2), "bytes/block")
    yield Line("memory", f"process, with slots and checksums; {size}", round(grown / blocks, 2), "bytes/block")
