"""Begins and ends write-backs: moves of blocks from host memory to a lower tier."""

import logging

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.lower_tier import LowerTier
from flexkv.cache.plan import Move
from flexkv.cache.tier import HOST, Tier

logger = logging.getLogger("flexkv.cache")


def plan_write_back(
    tree: RadixTree, host: Tier, tier: LowerTier, keys: NDArray[np.uint64], limit: int, now: float
) -> Move | None:
    """Plan a write-back as ``GlobalCacheEngine.begin_write_back`` does. The caller must hold the engine's lock."""
    match = tree.match(keys, now)
    keys = keys[: match.num_ready]
    blocks = np.flatnonzero((match.tiers == HOST) & (tree.slots(keys, tier.number) < 0))[:limit]
    if len(blocks) == 0:
        return None
    tenant = tree.tenant_of(keys)
    taken = tier.take(tree, len(blocks), tenant, now, keep=keys[: blocks[-1] + 1])
    if len(taken) == 0:
        return None
    blocks = blocks[: len(taken)]
    keys = keys[: blocks[-1] + 1]
    move = Move(keys, blocks.astype(np.int32), tree, HOST, tier.number, match.slots[blocks], taken)
    if not tier.place(move, now):
        return None
    try:
        tree.acquire(keys, int(blocks[0]), len(keys))
    except MemoryError:                      # CapacityError is one
        tier.displace(move)
        return None
    move.read = host.slots.generations(move.src)
    move.checksums = host.checksums[move.src]
    return move


def end_write_back(move: Move, host: Tier, tier: LowerTier, written: NDArray[np.bool_]) -> None:
    """End a write-back: ``written`` blocks ((m,) bool) become ready on the lower tier, the others absent there. A block
    whose host slot was freed meanwhile counts as not written. A second result is refused.

    Blocks whose bytes have changed become absent on both tiers. The store has recorded them: their slots there are
    ``move.to_erase``, and stay in limbo until ``GlobalCacheEngine.erased``."""
    if host.stale.has_ended(move.read, move.src, "write-back"):
        return
    stale = host.stale.find(host.slots, move.src, move.read, "write-back")
    move.read = None
    written = written if stale is None else written & ~stale
    move.checksums = host.checksums[move.src]          # a write-back to another tier may have computed them meanwhile
    differs = written & tier.differing(move)
    if differs.any():
        move.to_erase = move.dst[differs]
        tier.limbo.hold(move.to_erase, [move])
        _drop_altered(move, host, differs)
    tier.end_writing(move, written & ~differs)
    found = tier.checksums[move.dst]
    known = written & ~differs & (found != 0)
    host.checksums[move.src[known]] = found[known]
    move.tree.release(move.keys, int(move.blocks[0]), len(move.keys))


def _drop_altered(move: Move, host: Tier, altered: NDArray[np.bool_]) -> None:
    """Blocks whose bytes changed in host memory become absent there. Their slots are not used again: the memory is at
    fault, or something writes to it that should not."""
    slots = move.src[altered]
    host.num_altered += move.tree.drop(move.keys, move.by_position(move.src, altered), HOST, failed=True)
    logger.error("host slots %s: their bytes have changed; the slots are not used again", slots[:4].tolist())
    host.limbo.hold(slots, ["altered bytes"])
