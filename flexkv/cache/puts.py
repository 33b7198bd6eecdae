"""Plans puts: the blocks that get slots, and the tier of each."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.direct import direct_put
from flexkv.cache.plan import DirectPlan, PutPlan
from flexkv.cache.reasons import CAME_BACK, MissReason
from flexkv.cache.sources import absent_blocks
from flexkv.cache.tier import SsdTier, Tier


def plan_put(
    tree: RadixTree, host: Tier, below: Tier, ssd: SsdTier | None, keys: NDArray[np.uint64], start: int, tenant: int,
    direct: bool, tick: Callable[[], float],
) -> PutPlan:
    """Plan a put as ``GlobalCacheEngine.begin_put`` does, for all ``keys`` from ``start`` on. The caller must hold the
    engine's lock.

    ``tick`` returns the time of a change, later than the time of every earlier change.
    """
    now = tick()
    absent = absent_blocks(tree, ssd, keys)
    first = int(absent[0]) if len(absent) else len(keys)
    num_known, came_back = max(0, first - start), first < len(keys) and tree.miss_reason(keys, first) in CAME_BACK
    if first < start:
        absent = absent[:0]
    if tree.num_blocks + len(absent) > tree.max_blocks:
        keys, absent = _fit(tree, host, below, ssd, keys, absent)
    straight: DirectPlan | None = None
    if direct and len(absent) > host.limit(tenant):         # the host tier can never hold them: evict nothing there
        straight, absent = direct_put(tree, below, ssd, keys, absent, tenant, now)
    room = len(absent)
    if room and not host.has_room(tree, room, tenant):
        room = host.make_room(tree, room, tenant, now, keep=keys[:first])   # their prefix is not evicted
        if len(absent) < len(keys) - first:                # blocks behind the first absent one may have been evicted
            absent = absent_blocks(tree, ssd, keys)
    count, now = min(room, host.slots.num_free), tick()    # a time later than the eviction
    if direct and straight is None and count < len(absent):
        straight, absent = direct_put(tree, below, ssd, keys, absent, tenant, now)
    slots = host.slots.allocate(min(len(absent), count))
    assert slots is not None  # narrowing: as many as are free
    blocks = absent[: len(slots)]
    last = int(blocks[-1]) + 1 if len(blocks) else start + num_known if num_known else 0
    plan = PutPlan(keys[:last], blocks, tree, slots, num_known, came_back, straight)
    if len(plan) and not host.place(plan, slots, now, tenant):
        plan = PutPlan(keys[:0], blocks[:0], tree, slots[:0], num_known, came_back, straight)
    if room < len(absent):
        tree.remember(keys, int(absent[room]), MissReason.OVER_QUOTA)
    return plan


def _fit(
    tree: RadixTree, host: Tier, below: Tier, ssd: SsdTier | None, keys: NDArray[np.uint64], absent: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Shorten a sequence to the blocks that fit into the index, after removing blocks that no match can reach."""
    if len(absent) == 0 or tree.num_fitting(keys) > absent[-1]:
        return keys, absent
    for tier in (host, below)[: tree.num_tiers]:
        tier.reclaim(tree, tree.max_blocks)
    keys = keys[: tree.num_fitting(keys)]
    return keys, absent_blocks(tree, ssd, keys)
