"""A trace in memory: when each request came, and the keys of its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_TIE_S = 1e-6
"""Requests of the same time are taken to be so far apart, in the order of the trace, so that an order by time is one
by request."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they came.

    Attributes
    ----------
    name : str
    block_tokens : int
        Tokens of a block.
    seconds : (r,) float64
        When each came, from 0; strictly increasing.
    starts : (r + 1,) int64
        The blocks of request ``i`` are ``[starts[i], starts[i + 1])``.
    keys : (n, 2) uint64
        Key of each block, chained over its prefix. A request never has a key twice.
    next_use : (n,) int64
        Where in ``keys`` each block comes next; -1: never again.
    is_timed : bool
        The trace has times; else its requests are a second apart.
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
        """Requests, those without a whole block included."""
        return len(self.seconds)

    @property
    def num_blocks(self) -> int:
        """Blocks of all requests."""
        return len(self.keys)

    @cached_property
    def num_distinct(self) -> int:
        """Different blocks: as many would have to be kept for the best hit rate."""
        return int((self.next_use < 0).sum())

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return float(self.seconds[-1] - self.seconds[0]) if len(self.seconds) else 0.0


def make_trace(
    name: str,
    block_tokens: int,
    seconds: Sequence[float] | None,
    sequences: Sequence[NDArray[np.uint64]],
    are_keys: bool = False,
) -> Trace:
    """Put a trace together.

    Parameters
    ----------
    seconds : sequence of float, or None
        Need not be in order: requests are sorted by it.
    sequences : sequence of (k,) uint64
        Of each request: ids of its blocks, which need not be chained over the prefix.
    are_keys : bool
        They are 64 bits of keys, chained and spread evenly already.
    """
    times = np.arange(len(sequences), dtype=np.float64) if seconds is None else np.array(seconds, dtype=np.float64)
    order = np.argsort(times, kind="stable")
    times = times[order] - (times[order[0]] if len(order) else 0.0)
    # a tie that rounding does not lose beside times far apart
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
    """SplitMix64's output function (Steele, Lea, Flood 2014): every bit depends on all; one to one."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _chained(ids: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(n,) uint64 that name each block and all before it, whatever the ids of the trace are chained over.

    Goes through the positions, with all requests that are long enough at a time.
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
