"""Plans write-back: the blocks to copy from host memory to SSD, and their slots there."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.plan import WritePlan
from flexkv.cache.tier import HOST, SSD, Tier


def plan_write(
    tree: RadixTree, host: Tier, below: Tier, keys: NDArray[np.uint64], limit: int, now: float
) -> WritePlan | None:
    """Plan a write-back as ``GlobalCacheEngine.begin_write`` does. The caller must hold the engine's lock."""
    match = tree.match(keys, now)
    keys = keys[: match.num_ready]
    blocks = np.flatnonzero((match.tiers == HOST) & (tree.slots(keys, SSD) < 0))[:limit]
    if len(blocks) == 0:
        return None
    tenant = tree.tenant_of(keys)
    taken = below.take(tree, len(blocks), tenant, now, keep=keys[: blocks[-1] + 1])
    if len(taken) == 0:
        return None
    blocks = blocks[: len(taken)]
    keys = keys[: blocks[-1] + 1]
    plan = WritePlan(keys, blocks.astype(np.int32), tree, match.slots[blocks], taken)
    if not below.place(plan, taken, now):
        return None
    try:
        tree.acquire(keys, int(blocks[0]), len(keys))
    except MemoryError:                      # CapacityError is one
        below.displace(plan, taken)
        return None
    plan.read = host.slots.generations(plan.host_slots)
    return plan
