"""Time to find a prompt in the index."""

import itertools
from collections.abc import Iterator

from flexkv.tools.bench.filled_tree import SEQUENCE, SHARED, FilledTree
from flexkv.tools.bench.report import Line, line_of, measure


def run(num_blocks: int, n: int = 5000) -> Iterator[Line]:
    """Measure a full hit of 2,048 blocks, and a hit of 128 shared blocks, in an index of three tiers, through the
    public Python call."""
    filled = FilledTree(num_blocks)
    tree = filled.tree
    known = itertools.cycle(filled.sequences)
    unknown = itertools.cycle([filled.new_sequence() for _ in range(256)])
    for keys, found in ((next(known), SEQUENCE), (next(unknown), SHARED)):
        if tree.match(keys).num_ready != found:
            raise AssertionError(f"{tree.match(keys).num_ready} blocks were found, not {found}")
    size = f"{tree.num_blocks / 1e6:.3g} M blocks"
    yield line_of("match", f"2,048 of 2,048 blocks; {size}", measure(lambda: tree.match(next(known)), n))
    yield line_of("match", f"128 of 2,048 blocks; {size}", measure(lambda: tree.match(next(unknown)), n))
