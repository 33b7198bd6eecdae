"""Time to add a prompt to the index."""

import time
from collections.abc import Iterator

import numpy as np

from flexkv.tools.bench.filled_tree import NEW, SEQUENCE, FilledTree
from flexkv.tools.bench.report import Line, line_of


def run(num_blocks: int, n: int = 400) -> Iterator[Line]:
    """Measure the insertion of 1,920 new blocks after 128 shared blocks, into a growing index and into a full index
    from which as many blocks were evicted."""
    filled = FilledTree(max(2 * SEQUENCE, num_blocks - n * NEW), spare=n * NEW)
    tree = filled.tree
    for case, evicting in (("growing", False), ("steady, after evicting as many", True)):
        took = np.empty(n)
        for i in range(n):
            if evicting:
                filled.evict_oldest(NEW)
            keys = filled.new_sequence()
            slots = filled.slots_for(keys)
            start = time.perf_counter_ns()
            tree.insert(keys, slots, 0, filled.now)
            took[i] = time.perf_counter_ns() - start
            filled.now += 1
            tree.set_ready(keys, slots, 0)
            if i == 0 and tree.match(keys).num_ready != SEQUENCE:
                raise AssertionError("an inserted sequence is not found")
        yield line_of("insert", f"1,920 blocks, {case}; {tree.num_blocks / 1e6:.3g} M blocks", took / 1e3)
    tree.check_integrity()
