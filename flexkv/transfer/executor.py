"""The interface between the scheduler of a graph and what moves its blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import TransferOp

Progress = Callable[[TransferOp, NDArray[np.intp] | slice, NDArray[np.bool_]], None]
"""``progress(op, indices, ok)``: these blocks, given by their indices or as a slice, have their result, and nothing
touches their slots or pages any more."""


class Executor(ABC):
    """Moves blocks of ops of certain kinds.

    Every method but ``close`` is called under the engine's lock, and must not wait. ``progress`` is called under the
    same lock, exactly once for each block that was submitted, whatever happens.

    Attributes
    ----------
    event_fd : int
        Readable when ``drain`` has something to take in; the engine's background thread watches it. -1: none.
    """

    kinds: frozenset[OpKind]
    event_fd: int = -1

    @abstractmethod
    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, doomed: bool = False) -> None:
        """Move blocks ``indices`` of ``op``; if ``doomed``, only tell whoever waits for them that they failed."""

    @abstractmethod
    def cancel(self, op: TransferOp) -> None:
        """Start nothing more of ``op``; what is under way is finished, and every block still gets its result."""

    def forget(self, op: TransferOp) -> None:  # noqa: B027  (most keep nothing)
        """The op has ended: drop what is kept for it."""

    def drain(self) -> bool:
        """Take in results that are there; True if there was any."""
        return False

    def give_up(self) -> None:  # noqa: B027  (of those that are drained)
        """It is broken: what it was given fails, as soon as nothing touches its slots any more (this may wait for that,
        as ``close``), and so does what it is given from now on. Does not raise."""

    def close(self) -> None:  # noqa: B027
        """Give back what is held; nothing is touched any more afterwards. Called once, by the engine's shutdown."""


class ArrivalExecutor(Executor):
    """Moves nothing: each block has arrived as soon as it may start."""

    kinds = frozenset({OpKind.ARRIVAL})

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, doomed: bool = False) -> None:
        progress(op, indices, np.full(len(indices), not doomed))

    def cancel(self, op: TransferOp) -> None:
        """Nothing is ever under way."""
