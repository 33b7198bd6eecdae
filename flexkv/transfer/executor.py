"""The interface of executors, which move the blocks of ops for the scheduler of graphs."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import Route, TransferOp

Progress = Callable[[TransferOp, NDArray[np.intp] | slice, NDArray[np.bool_]], None]
"""``progress(op, indices, ok)`` reports the results of the blocks ``indices``, an array or a slice. Their slots and
pages must not be accessed any more."""


class Executor(ABC):
    """Moves blocks of ops of certain kinds.

    Every method but ``close`` is called under the engine's lock, and must not wait. ``progress`` is called under the
    same lock, exactly once for each block that was submitted, whatever happens.

    Attributes
    ----------
    kinds : frozenset of OpKind
    tier : int
        Number of the lower tier whose ops it takes; 0: ops that concern no lower tier.
    event_fd : int
        Readable when ``drain`` has results to collect; the engine's background thread watches it. -1: none.
    """

    kinds: frozenset[OpKind]
    tier: int = 0
    event_fd: int = -1

    @property
    def routes(self) -> list[Route]:
        """Kinds and tier of the ops that the executor takes."""
        return [(kind, self.tier) for kind in self.kinds]

    @abstractmethod
    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False) -> None:
        """Move blocks ``indices`` of ``op``; if ``failed``, move nothing and report that they failed."""

    @abstractmethod
    def cancel(self, op: TransferOp) -> None:
        """Start no further block of ``op``. Blocks in progress are finished, and every block still gets its result."""

    def forget(self, op: TransferOp) -> None:  # noqa: B027  (most keep no state)
        """Drop the state of an op that has ended."""

    def drain(self) -> bool:
        """Collect the results that are available; True if there was any."""
        return False

    def abandon(self) -> None:  # noqa: B027  (for executors that are drained)
        """Fail all submitted blocks, and all blocks submitted from now on, because the executor is broken.

        A block must not fail before its slots and pages are no longer accessed; like ``close``, the method may wait for
        that. Must not raise."""

    def close(self) -> None:  # noqa: B027
        """Free all resources. Slots and pages must not be accessed afterwards. Called once, when the engine stops."""


class ArrivalExecutor(Executor):
    """Copies nothing: each block completes as soon as it may start."""

    kinds = frozenset({OpKind.ARRIVAL})

    def submit(self, op: TransferOp, indices: NDArray[np.intp], progress: Progress, failed: bool = False) -> None:
        progress(op, indices, np.full(len(indices), not failed))

    def cancel(self, op: TransferOp) -> None:
        """Do nothing: no block is ever in progress."""
