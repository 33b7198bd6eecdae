"""What no policy can do better: OPT, which knows the future, and a cache without bounds."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flexkv.tools.replay.trace import Trace

_BUCKET_BITS = 10
"""Positions of a trace are counted in buckets of so many bits, to find the farthest kept one soon."""


def unbounded_hits(trace: Trace) -> int:
    """Blocks that were there before: every use of a block but its first. They lead their request, as keys are chained.
    """
    return trace.num_blocks - trace.num_distinct


def optimal_hits(trace: Trace, capacity_blocks: int) -> int:
    """Blocks that a clairvoyant cache of ``capacity_blocks`` has when they are asked for (Belady 1966, with bypass).

    After each request it keeps, of what it had and what came, the blocks that are used again soonest, and none that is
    not. A block is never used sooner than the one before it, so what is kept of a sequence is always a prefix, and
    whatever is there leads its request.
    """
    uses = trace.next_use
    # What is kept is marked where it is used next: the blocks that a request finds are the marks in its own range.
    kept = np.zeros(((len(uses) >> _BUCKET_BITS) + 1) << _BUCKET_BITS, dtype=np.bool_)
    buckets = np.zeros(len(kept) >> _BUCKET_BITS, dtype=np.int64)
    hits = num_kept = 0
    for start, stop in pairwise(trace.starts.tolist()):
        found = int(np.count_nonzero(kept[start:stop]))
        if found:
            hits += found
            num_kept -= found
            _count(buckets, np.arange(start, start + found), -1)
            kept[start:stop] = False
        again = uses[start:stop]
        again = again[again >= 0]
        if len(again):
            kept[again] = True
            num_kept += len(again)
            _count(buckets, again, 1)
        while num_kept > capacity_blocks:
            farthest = len(buckets) - 1 - int((buckets[::-1] > 0).argmax())
            bucket = kept[farthest << _BUCKET_BITS : (farthest + 1) << _BUCKET_BITS]
            victims = np.flatnonzero(bucket)[-(num_kept - capacity_blocks) :]
            bucket[victims] = False
            buckets[farthest] -= len(victims)
            num_kept -= len(victims)
    return hits


def _count(buckets: NDArray[np.int64], positions: NDArray[np.int64], sign: int) -> None:
    first = int(positions.min()) >> _BUCKET_BITS
    counts = np.bincount((positions >> _BUCKET_BITS) - first)
    buckets[first : first + len(counts)] += sign * counts
