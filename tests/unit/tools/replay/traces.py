"""Small traces for the tests of this folder."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from flexkv.tools.replay.trace import Trace, make_trace

BLOCK = 4
"""Tokens of a block of these traces."""

# A few sequences that share prefixes: most requests meet what earlier ones left.
SEQUENCES = [(1, 2, 3), (1, 2, 4), (1, 5), (6, 7, 8, 9), (6,), (1, 2, 3, 10, 11)]


def requests(max_size: int = 12) -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Requests in the order in which they come: each one of a few sequences, or the beginning of one."""
    sequence = st.tuples(st.sampled_from(SEQUENCES), st.integers(1, 5)).map(lambda drawn: drawn[0][: drawn[1]])
    return st.lists(sequence, min_size=1, max_size=max_size)


def trace_of(sequences: Sequence[Sequence[int]], seconds: Sequence[float] | None = None) -> Trace:
    """A trace in memory; by default a second between requests."""
    return make_trace("made", BLOCK, seconds, [np.array(ids, dtype=np.uint64) for ids in sequences])


def mooncake(sequences: Iterable[Sequence[int]], block: int = BLOCK, **more: Any) -> list[dict[str, Any]]:
    """Lines of a trace in Mooncake's format, a second apart."""
    return [
        {"timestamp": 1000 * i, "input_length": len(ids) * block - 1, "output_length": 1, "hash_ids": list(ids), **more}
        for i, ids in enumerate(sequences)
    ]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
