"""The interface of an eviction policy."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.ghosts import Ghosts


@dataclass(slots=True)
class Choice:
    """What goes next.

    Attributes
    ----------
    queue : int
        From there, in the order of rank.
    leave : int
        As long as the queue has more blocks than this.
    spare_to : int
        Nodes with lives left are not evicted, but go to the end of this queue: they lose one life if it is the same
        queue, and all if it is another. -1: none is spared.
    below : float
        Only nodes of a lower rank.
    """

    queue: int = 0
    leave: int = 0
    spare_to: int = -1
    below: float = math.inf


class EvictionPolicy(ABC):
    """Says in which order what is cached on one tier goes. One instance for each tier and quota group.

    The unit is a *node*: blocks of one sequence with one history. From among the nodes that have nothing below them
    the one with the lowest rank goes first, its deepest block first; what is pinned or being written stays.

    All methods are called under the engine's lock, and cost what happened since the last call, not what is cached. A
    policy keeps no more than a few bytes for each block. If a method raises, nothing has been evicted.

    Parameters
    ----------
    capacity : int
        Blocks of the tier; the largest that it will have.
    hit_reward_seconds : float
        Frequency-aware grace time: each hit makes a node count as this many seconds younger.

    Attributes
    ----------
    num_queues : int
        A node is in one of so many queues (0 at first), each with its own order.
    wants_pieces : bool
        Whether ``evicted`` is to be called.
    max_waiting : int
        Nodes that it is told of at once, at most: few enough for a request not to notice.
    ghosts : Ghosts, optional
        Pieces that ``returned`` is to be told of when they come back, those that follow each other one by one.
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
        """Rank nodes that were used or came to the tier since the last call.

        Parameters
        ----------
        events : (n,) of ``flexkv._core.index.eviction_queues.EVENT_DTYPE``
            Times are in seconds on the engine's clock. Not to be kept. To be changed in place: ``rank`` (of new ones:
            when they came to the tier); ``queue``, ``lives`` (how often it is spared), ``mark`` (the policy's own, 0 at
            first).
        """

    def returned(self, events: NDArray[np.void], returns: NDArray[np.void]) -> None:  # noqa: B027
        """What came back, in the events that ``place`` gets next: (n,) of
        ``flexkv._core.index.eviction_queues.RETURN_DTYPE``."""

    def choose(self, blocks: NDArray[np.int64], heads: NDArray[np.float64]) -> Choice:
        """From where to evict. Called until enough is free, and again when something may go from a queue from which
        nothing could.

        Parameters
        ----------
        blocks : (num_queues,) int64
            That each queue has on the tier.
        heads : (num_queues,) float64
            The lowest rank in each queue; infinite where nothing may go. Not all are.
        """
        return Choice(int(np.isfinite(heads).argmax()))

    def evicted(self, pieces: NDArray[np.void]) -> None:  # noqa: B027
        """What went: (n,) of ``flexkv._core.index.eviction.PIECE_DTYPE``. Need not be overridden."""
