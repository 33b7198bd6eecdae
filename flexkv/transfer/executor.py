"""The interface between the scheduler of a graph and what moves its blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.transfer.graph import OpKind, TransferOp

Progress = Callable[[TransferOp, NDArray[np.intp], NDArray[np.bool_]], None]
"""``progress(op, indices, ok)``: these blocks have their result, and nothing touches their slots or pages any more."""


class Executor(ABC):
    """Moves blocks of ops of certain kinds.

    Every method is called under the engine's lock, and must not wait. ``progress`` is called under the same lock,
    exactly once for each block that was submitted, whatever happens.
    """

    kinds: frozenset[OpKind]

    @abstractmethod
    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, doomed: bool = False) -> None:
        """Move blocks ``indices`` of ``op``; if ``doomed``, only tell whoever waits for them that they failed."""

    @abstractmethod
    def cancel(self, op: TransferOp) -> None:
        """Start nothing more of ``op``; what is under way is finished, and every block still gets its result."""

    def forget(self, op: TransferOp) -> None:  # noqa: B027  (most keep nothing)
        """The op has ended: drop what is kept for it."""
