"""Moves between a lower tier and DEVICE, by a route that does not touch host memory."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.lower_tier import LowerTier, absent_blocks
from flexkv.cache.plan import DEVICE, Move
from flexkv.cache.sources import Sources
from flexkv.cache.tier import HOST


def direct_blocks(lower: list[LowerTier], match: Match, found: Sources) -> NDArray[np.int8]:
    """(k,) int8: for each block of ``found.slow``, the number of the lower tier from which it is read straight to
    DEVICE; HOST: a promotion reads it. A block is read directly if no promotion reads it yet, and its tier loads
    directly."""
    direct = np.full(len(found.slow), HOST, dtype=np.int8)
    for tier in lower:
        if tier.loads_directly:
            direct[(found.slots[found.slow] < 0) & (match.tiers[found.slow] == tier.number)] = tier.number
    return direct


def direct_gets(
    tree: RadixTree, lower: list[LowerTier], keys: NDArray[np.uint64], match: Match, found: Sources,
    direct: NDArray[np.int8],
) -> tuple[Move, ...]:
    """Plan the direct reads of the blocks before ``found.stop``: one move to DEVICE for each tier that has blocks to
    read. ``direct``: the result of ``direct_blocks`` for ``found``."""
    moves: list[Move] = []
    if not direct.any():
        return ()
    for tier in lower:
        blocks = found.slow[(direct == tier.number) & (found.slow < found.stop)]
        if len(blocks):
            move = Move(
                keys[: blocks[-1] + 1], blocks.astype(np.int32), tree, tier.number, DEVICE, match.slots[blocks]
            )
            tier.plan_read(move)
            moves.append(move)
    return tuple(moves)


def direct_put(
    tree: RadixTree, lower: list[LowerTier], keys: NDArray[np.uint64], absent: NDArray[np.int32], tenant: int,
    now: float,
) -> tuple[tuple[Move, ...], NDArray[np.int32]]:
    """Allocate slots for the first absent blocks, as many as are available, on the first tier that saves directly.

    The tier gets the first blocks, not the last: a block on a lower tier that follows blocks in host memory would be
    unreachable if those were evicted before their write-back. The prefix of the blocks is not evicted. A block that
    has a slot out of service gets no other.

    Parameters
    ----------
    keys : (n, 2) uint64
    absent : (k,) int32
        Positions of the blocks that the put must save, ascending.
    tenant : int
    now : float
        Time in seconds on the engine's clock.

    Returns
    -------
    moves : tuple of Move
        The move from DEVICE to the tier; empty if no tier saves directly or no slot is available.
    absent : (l,) int32
        Positions of the blocks that are still absent. Blocks that were evicted for the new slots are among them.
    """
    tier = next((tier for tier in lower if tier.saves_directly), None)
    if tier is None:
        return (), absent
    blocks = absent[np.asarray(tree.slots(keys, tier.number))[absent] < 0]
    if len(blocks) == 0:
        return (), absent
    taken = tier.take(tree, len(blocks), tenant, now, keep=keys[: blocks[0]])
    absent = absent_blocks(tree, lower, keys)      # blocks behind the first may have been evicted for these slots
    if len(taken) == 0:
        return (), absent
    blocks = absent[np.asarray(tree.slots(keys, tier.number))[absent] < 0][: len(taken)]
    move = Move(keys[: blocks[-1] + 1], blocks, tree, DEVICE, tier.number, dst=taken)
    if not tier.place(move, now, tenant):
        return (), absent
    return (move,), np.setdiff1d(absent, blocks, assume_unique=True)
