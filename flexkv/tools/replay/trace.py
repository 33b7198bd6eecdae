"""A trace in memory: the arrival time of each request, and the keys of its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_TIE_S = 1e-6
"""Distance in seconds that is assumed between requests of the same time, in the order of the trace, so that the order
by time is the order of requests."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival.

    Attributes
    ----------
    name : str
    block_tokens : int
        Tokens of a block.
    seconds : (r,) float64
        Arrival time of each request in seconds, from 0; strictly increasing.
    starts : (r + 1,) int64
        The blocks of request ``i`` are ``[starts[i], starts[i + 1])``.
    keys : (n, 2) uint64
        Key of each block, chained over its prefix. A request never has a key twice.
    next_use : (n,) int64
        Index in ``keys`` of the next use of each block; -1: the block is not used again.
    is_timed : bool
        Whether the trace has times; else its requests are one second apart.
    """

    name: str
    block_tokens: int
    seconds: NDArray[np.float64]
    starts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    next_use: NDArray[np.int64]
    is_timed: bool = True

    @property
    def num_requests(self) -> int:
        """Number of requests, including requests without a whole block."""
        return len(self.seconds)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all requests."""
        return len(self.keys)

    @cached_property
    def num_distinct(self) -> int:
        """Number of different blocks: the capacity that is needed for the best hit rate."""
        return int((self.next_use < 0).sum())

    @property
    def duration_s(self) -> float:
        """Time from the first request to the last, in seconds."""
        return float(self.seconds[-1] - self.seconds[0]) if len(self.seconds) else 0.0


def make_trace(
    name: str,
    block_tokens: int,
    seconds: Sequence[float] | None,
    sequences: Sequence[NDArray[np.uint64]],
    are_keys: bool = False,
) -> Trace:
    """Build a trace.

    Parameters
    ----------
    seconds : sequence of float, or None
        Arrival times in any order; requests are sorted by them. None: the trace has no times.
    sequences : sequence of (k,) uint64
        Ids of the blocks of each request, which need not be chained over the prefix.
    are_keys : bool
        Whether the ids are 64 bits of keys, which are chained over the prefix and evenly distributed.
    """
    times = np.arange(len(sequences), dtype=np.float64) if seconds is None else np.array(seconds, dtype=np.float64)
    order = np.argsort(times, kind="stable")
    times = times[order] - (times[order[0]] if len(order) else 0.0)
    # the distance of ties must exceed the rounding of large times
    span = float(times[-1]) if len(times) else 0.0
    ties = np.arange(len(times)) * max(_TIE_S, 4 * float(np.spacing(span)))
    times = np.maximum.accumulate(times - ties) + ties
    chosen = [sequences[i] for i in order]
    starts = np.zeros(len(chosen) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in chosen], out=starts[1:])
    ids = np.concatenate([*chosen, np.zeros(0, dtype=np.uint64)])
    low = ids if are_keys else _chained(ids, starts)
    keys = np.stack([low, _mix(low)], axis=1)
    return Trace(name, block_tokens, times, starts, keys, _next_use(low), seconds is not None)


def _next_use(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    again = in_order[1:] == in_order[:-1]
    uses = np.full(len(order), -1, dtype=np.int64)
    uses[order[:-1][again]] = order[1:][again]
    return uses


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection whose bits depend on all input bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _chained(ids: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys that depend on each block and all blocks before it, (n,) uint64. The ids may be chained or not.

    The loop is over positions; each iteration processes all requests that are long enough.
    """
    lengths = np.diff(starts)
    longest_first = np.argsort(-lengths, kind="stable")
    firsts, falling = starts[:-1][longest_first], -lengths[longest_first]
    keys, mixed = np.empty_like(ids), _mix(ids)
    before = np.zeros(len(lengths), dtype=np.uint64)
    positions = np.arange(-int(falling[0]) if len(falling) else 0)
    for position, count in zip(positions.tolist(), np.searchsorted(falling, -positions, side="left"), strict=True):
        at = firsts[:count] + position
        before[:count] = _mix(before[:count] + mixed[at])
        keys[at] = before[:count]
    return keys
