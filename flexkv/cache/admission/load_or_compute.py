"""Load or compute: the number of blocks on lower tiers that load faster than the engine computes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.admission.cost_model import CostModel


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """Reads from one source that a load needs. Reads from different sources run at the same time.

    Attributes
    ----------
    cost : CostModel
    blocks : (n,) bool
        Blocks of the load that must be read from this source.
    queued_blocks : int
        Blocks of other requests that are read from it first.
    """

    cost: CostModel
    blocks: NDArray[np.bool_]
    queued_blocks: int = 0


class LoadOrCompute:
    """Decides how many blocks to load from lower tiers. The caller must serialize calls.

    Parameters
    ----------
    policy : str
        ``auto``, ``always`` or ``never``.
    tokens_per_block : int
    prefill_tokens_per_s : float
        Speed of the engine's prefill; 0: unknown, so that ``auto`` loads all blocks. May be set at any time.
    """

    def __init__(self, policy: str = "always", tokens_per_block: int = 1, prefill_tokens_per_s: float = 0.0) -> None:
        self._policy = policy
        self._tokens_per_block = tokens_per_block
        self.prefill_tokens_per_s = prefill_tokens_per_s

    def worth(self, reads: Sequence[Reads], num_blocks: int) -> int:
        """Number of leading blocks to load, of ``num_blocks`` consecutive blocks.

        Blocks before the first block in ``reads`` are always loaded: they are on the host. With the policy ``auto`` the
        result is the largest number whose reads are estimated to take no longer than the computation of the blocks from
        the first read on. Sources of unknown speed count as infinitely fast.

        Parameters
        ----------
        reads : sequence of Reads
            One for each source; ``blocks`` of each is (num_blocks,).
        num_blocks : int
        """
        slow = np.zeros(num_blocks, dtype=np.bool_)
        for read in reads:
            slow |= read.blocks
        first = int(slow.argmax()) if slow.any() else num_blocks
        if self._policy == "never":
            return first
        if first == num_blocks or self._policy == "always" or self.prefill_tokens_per_s == 0:
            return num_blocks
        load_s = np.zeros(num_blocks - first)
        for read in reads:
            needed = np.cumsum(read.blocks[first:])
            seconds = read.cost.seconds(np.where(needed, needed + read.queued_blocks, 0))
            if seconds is not None:
                load_s = np.maximum(load_s, seconds)
        compute_s = np.arange(1, num_blocks - first + 1) * (self._tokens_per_block / self.prefill_tokens_per_s)
        sooner = np.flatnonzero(load_s <= compute_s)
        return first + (int(sooner[-1]) + 1 if len(sooner) else 0)
