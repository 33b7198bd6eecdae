"""Upper bounds of hit rates: OPT, which knows the future, and a cache of unlimited capacity."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flexkv.tools.replay.trace import Trace

_BUCKET_BITS = 10
"""Number of bits of a bucket's positions. Marks are counted by bucket, so that the farthest mark is found quickly."""


def unbounded_hits(trace: Trace) -> int:
    """Number of hits without evictions: every use of a block except its first. The hits of a request are its leading
    blocks, because keys are chained."""
    return trace.num_blocks - trace.num_distinct


def optimal_hits(trace: Trace, capacity_blocks: int) -> int:
    """Number of hits of a clairvoyant cache of ``capacity_blocks`` blocks (Belady 1966, with bypass).

    After each request the cache keeps the blocks that are used again soonest, of its old blocks and the request's
    blocks. It keeps no block that is not used again. A block is never used earlier than the block before it in its
    sequence, so the cache always keeps prefixes, and the hits of a request are its leading blocks.
    """
    uses = trace.next_use
    # A kept block is marked at the position of its next use, so the hits of a request are the marks in its range.
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
