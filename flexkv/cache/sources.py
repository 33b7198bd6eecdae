"""Sources of the blocks of a match, tier by tier."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.admission.load_or_compute import LoadOrCompute, Reads
from flexkv.cache.lower_tier import LowerTier, can_be_read
from flexkv.cache.promotions import Promotions
from flexkv.cache.reasons import MISS_REASONS, MissReason
from flexkv.cache.tier import HOST

_NOWHERE = np.zeros(0, dtype=np.intp)


@dataclass(slots=True)
class Sources:
    """Sources of the blocks that a get can load, from its position ``start`` on.

    Attributes
    ----------
    stop : int
        Position of the first block that is not available.
    reason : MissReason
        Why that block is not available.
    slots : (num_ready,) int32
        Host slots; -1: none yet. Entries before ``start`` and from ``stop`` on have no meaning.
    slow : (k,) intp
        Positions of the blocks in ``[start, stop)`` that are not ready on the host.
    evicted_at : float
        As in ``MatchResult``.
    """

    stop: int
    reason: MissReason
    slots: NDArray[np.int32]
    slow: NDArray[np.intp]
    evicted_at: float

    def abandon(self, start: int) -> None:
        """Remove all blocks from ``start`` on: they cannot be acquired, for want of room."""
        self.end(start, MissReason.NO_ROOM)
        self.slow = _NOWHERE

    def end(self, stop: int, reason: MissReason) -> None:
        """Set the position of the first unavailable block, and the reason. The caller must shorten ``slow``."""
        self.stop, self.reason, self.evicted_at = stop, reason, math.nan


def _use_other_tiers(
    tree: RadixTree, lower: list[LowerTier], keys: NDArray[np.uint64], match: Match, start: int, out: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """(n,) bool: blocks that are ``out`` of service on the tier where the match found them, and can be read from a tier
    below it. They are entered in ``match``."""
    found = np.zeros_like(out)
    for tier in lower:
        slots = tree.slots(keys, tier.number)[start:]
        here = out & ~found & (match.tiers[start : len(keys)] < tier.number) & tier.has_whole(slots)
        match.slots[start : len(keys)][here], match.tiers[start : len(keys)][here] = slots[here], tier.number
        found |= here
    return found


def find_sources(
    tree: RadixTree, lower: list[LowerTier], promotions: Promotions, decision: LoadOrCompute, keys: NDArray[np.uint64],
    match: Match, start: int, choose: bool, host_only: bool = False,
) -> Sources:
    """Find the sources of the blocks that ``match`` found for ``keys`` ((n, 2) uint64), from ``start`` on.

    Changes ``match.tiers`` and ``match.slots`` of blocks whose tier is out of service and that a tier below it has.
    ``choose`` and ``host_only``: as in ``GlobalCacheEngine.begin_get``.
    """
    found = Sources(match.num_ready, MISS_REASONS[match.reason], match.slots, _NOWHERE, match.evicted_at)
    if not lower or not (is_slow := match.tiers[start:] != HOST).any():
        return found
    found.slots = slots = tree.slots(keys[: found.stop], HOST)
    taken = is_slow & (slots[start:] >= 0)
    taken &= ~promotions.filling(slots[start:])
    if taken.any():                # a put writes this host slot: it can be neither read nor filled by a promotion
        found.end(start + int(taken.argmax()), MissReason.NOT_READY)
    is_slow, stop = is_slow[: found.stop - start], found.stop
    out = is_slow & ~can_be_read(lower, match.slots[start:stop], match.tiers[start:stop])
    if out.any() and len(lower) > 1:
        out &= ~_use_other_tiers(tree, lower, keys[:stop], match, start, out)
    if out.any():
        found.end(start + int(out.argmax()), MissReason.OUT_OF_SERVICE)
    is_slow = is_slow[: found.stop - start]
    num_worth = len(is_slow)
    if host_only:
        num_worth = int(is_slow.argmax()) if is_slow.any() else num_worth
    elif choose:
        must_read = is_slow & (slots[start : found.stop] < 0)
        tiers = match.tiers[start : found.stop]
        num_worth = decision.worth([
            Reads(tier.service.cost, must_read & (tiers == tier.number), promotions.num_blocks_from(tier.number))
            for tier in lower if tier.service is not None
        ], num_worth)
    if start + num_worth < found.stop:
        found.end(start + num_worth, MissReason.TOO_SLOW)
    found.slow = start + np.flatnonzero(is_slow[:num_worth])
    return found
