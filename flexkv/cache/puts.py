"""Plans puts: the blocks that get slots, and the tier of each."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv.cache.direct import direct_put
from flexkv.cache.lower_tier import LowerTier, absent_blocks
from flexkv.cache.plan import DEVICE, Move, PutPlan
from flexkv.cache.reasons import CAME_BACK, MissReason
from flexkv.cache.tier import HOST, Tier


def plan_put(
    tree: RadixTree, host: Tier, lower: list[LowerTier], keys: NDArray[np.uint64], start: int, tenant: int,
    direct: bool, tick: Callable[[], float],
) -> PutPlan:
    """Plan a put as ``GlobalCacheEngine.begin_put`` does, for all ``keys`` from ``start`` on. The caller must hold the
    engine's lock.

    ``tick`` returns the time of a change, later than the time of every earlier change.
    """
    now = tick()
    absent = absent_blocks(tree, lower, keys)
    first = int(absent[0]) if len(absent) else len(keys)
    num_known, came_back = max(0, first - start), first < len(keys) and tree.miss_reason(keys, first) in CAME_BACK
    if first < start:
        absent = absent[:0]
    if tree.num_blocks + len(absent) > tree.max_blocks:
        keys, absent = _fit(tree, host, lower, keys, absent)
    moves: tuple[Move, ...] = ()
    if direct and len(absent) > host.limit(tenant):        # the host tier can never hold them: evict nothing there
        moves, absent = direct_put(tree, lower, keys, absent, tenant, now)
    room = len(absent)
    if room and not host.has_room(tree, room, tenant):
        room = host.make_room(tree, room, tenant, now, keep=keys[:first])   # their prefix is not evicted
        if len(absent) < len(keys) - first:                # blocks behind the first absent one may have been evicted
            absent = absent_blocks(tree, lower, keys)
    count, now = min(room, host.slots.num_free), tick()    # a time later than the eviction
    if direct and not moves and count < len(absent):
        moves, absent = direct_put(tree, lower, keys, absent, tenant, now)
    slots = host.slots.allocate(min(len(absent), count))
    assert slots is not None  # narrowing: as many as are free
    blocks = absent[: len(slots)]
    if len(blocks):
        move = Move(keys[: int(blocks[-1]) + 1], blocks, tree, DEVICE, HOST, dst=slots)
        if host.place(move, now, tenant):
            moves = (*moves, move)
        else:
            num_known = num_known if moves else 0          # there is nothing to extend
    last = max((len(move.keys) for move in moves), default=start + num_known if num_known else 0)
    if room < len(absent):
        tree.remember(keys, int(absent[room]), MissReason.OVER_QUOTA)
    return PutPlan(keys[:last], moves, num_known, came_back)


def _fit(
    tree: RadixTree, host: Tier, lower: list[LowerTier], keys: NDArray[np.uint64], absent: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Shorten a sequence to the blocks that fit into the index, after removing blocks that no match can reach."""
    if len(absent) == 0 or tree.num_fitting(keys) > absent[-1]:
        return keys, absent
    for tier in (host, *lower):
        tier.reclaim(tree, tree.max_blocks)
    keys = keys[: tree.num_fitting(keys)]
    return keys, absent_blocks(tree, lower, keys)
