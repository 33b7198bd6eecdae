"""The interface of an eviction policy."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.ghosts import Ghosts


@dataclass(slots=True)
class Choice:
    """The nodes to evict next.

    Attributes
    ----------
    queue : int
        Queue to evict from, lowest priority first.
    leave : int
        Number of blocks that must stay in the queue.
    spare_to : int
        Nodes with lives left are not evicted, but move to the end of this queue. They lose one life if it is their own
        queue, and all lives if it is another. -1: no node is spared.
    below : float
        Only nodes of a lower priority are evicted.
    """

    queue: int = 0
    leave: int = 0
    spare_to: int = -1
    below: float = math.inf


class EvictionPolicy(ABC):
    """Orders the blocks of one tier for eviction. There is one instance for each tier and tenant.

    The unit is a *node*: consecutive blocks of one sequence with one history. Of the nodes without a node below them on
    the tier, the node with the lowest *priority* is evicted first, from its last block on. Acquired or pinned blocks
    and blocks being written stay.

    All methods are called under the engine's lock. Their cost must depend on the events since the last call, not on the
    number of cached blocks. A policy must not keep more than a few bytes for each block. If a method raises, index and
    slots stay consistent.

    Parameters
    ----------
    capacity : int
        Maximum number of blocks of the tier.
    hit_reward_seconds : float
        Frequency-aware grace time: each hit makes a node count as this many seconds younger.

    Attributes
    ----------
    num_queues : int
        Number of queues, each with its own order. A node is in one of them, at first in queue 0.
    wants_pieces : bool
        Whether ``evicted`` must be called.
    max_waiting : int
        Number of changed nodes at which ``place`` is called: small enough that a request does not notice the call.
    ghosts : Ghosts, optional
        Evicted pieces whose return ``returned`` reports. The pieces of a new node are found one after another, from its
        first block on.
    """

    num_queues = 1
    wants_pieces = False
    max_waiting = 1024
    ghosts: Ghosts | None = None

    def __init__(self, capacity: int, hit_reward_seconds: float = 0.0) -> None:
        self.capacity = capacity
        self.hit_reward_seconds = hit_reward_seconds

    @abstractmethod
    def place(self, events: NDArray[np.void]) -> None:
        """Set the priorities of the nodes that were used, or came to the tier, since the last call.

        Parameters
        ----------
        events : (n,) of ``flexkv._core.index.eviction_queues.EVENT_DTYPE``
            Times are in seconds on the engine's clock. The policy must not keep the array. It changes in place:
            ``priority`` (on input, for a new node, the time at which it came to the tier), ``queue``, ``lives`` (number
            of times that the node is spared) and ``mark`` (for the policy's own use, 0 at first).
        """

    def returned(self, events: NDArray[np.void], returns: NDArray[np.void]) -> None:  # noqa: B027
        """Receive the evicted pieces that returned with ``events``, before ``place`` gets these: (n,) of
        ``flexkv._core.index.eviction_queues.RETURN_DTYPE``."""

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        """Choose the nodes to evict next. Called repeatedly until enough slots are free; an eviction ends early when a
        queue without evictable nodes gets one.

        Parameters
        ----------
        blocks : (num_queues,) int64
            Blocks of each queue on the tier.
        heads : (num_queues,) float64
            Lowest priority of each queue; infinite if the queue has no evictable node. At least one is finite.
        """
        return Choice(int(np.isfinite(heads).argmax()))

    def evicted(self, pieces: NDArray[np.void]) -> None:  # noqa: B027
        """Receive the evicted pieces: (n,) of ``flexkv._core.index.eviction.PIECE_DTYPE``. Overriding is optional."""
