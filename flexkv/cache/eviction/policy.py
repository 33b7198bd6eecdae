"""The interface of an eviction policy."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray


class EvictionPolicy(ABC):
    """Says which nodes of the index go first.

    Called under the engine's lock, on the thread that evicts, with a copy of the nodes that may go now: leaves, as
    seen from the tier. Must not keep what it is given. Mutates nothing in the index. If it raises, nothing has been
    evicted.

    Parameters
    ----------
    hit_reward_seconds : float
        Frequency-aware grace time: each hit makes a node count as this many seconds younger.
    """

    def __init__(self, hit_reward_seconds: float = 0.0) -> None:
        self.hit_reward_seconds = hit_reward_seconds

    @abstractmethod
    def score(self, nodes: NDArray[np.void], now: float) -> NDArray[np.float64]:
        """Score each node; the lowest score is evicted first.

        Parameters
        ----------
        nodes : structured array of ``NODE_DTYPE``, shape (n,)
            Times in seconds on the engine's clock.
        now : float
            Seconds.

        Returns
        -------
        (n,) float64
        """
