"""Plans of direct moves between SSD and GPU. The blocks are on the SSD tier before and after, never on the host."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.plan import IN_PLACE, DirectPlan, FetchPlan
from flexkv.cache.sources import Sources, absent_blocks
from flexkv.cache.tier import SSD, SsdTier, Tier


def direct_get(
    tree: RadixTree, below: Tier, keys: NDArray[np.uint64], match: Match, found: Sources
) -> DirectPlan | None:
    """Plan direct reads of the blocks of ``found`` that are on SSD alone and that no fetch reads; their entries in
    ``found.slots`` become IN_PLACE. None: there are no such blocks."""
    blocks = found.slow[found.slots[found.slow] < 0]
    if len(blocks) == 0:
        return None
    found.slots[blocks] = IN_PLACE
    plan = DirectPlan(keys[: blocks[-1] + 1], blocks.astype(np.int32), tree, match.slots[blocks])
    plan.read = below.slots.generations(plan.ssd_slots)
    return plan


def direct_put(
    tree: RadixTree, below: Tier, ssd: SsdTier | None, keys: NDArray[np.uint64], absent: NDArray[np.int32], tenant: int,
    now: float,
) -> tuple[DirectPlan | None, NDArray[np.int32]]:
    """Allocate SSD slots for the first absent blocks, as many as are available; also returns the blocks left absent.

    The first blocks get SSD slots, not the last: a block on SSD that follows blocks in host memory would be
    unreachable if those were evicted before their write-back. The prefix of the blocks is not evicted. A block that
    has a slot in an offline directory gets no other.
    """
    blocks = absent[np.asarray(tree.slots(keys, SSD))[absent] < 0]
    if len(blocks) == 0:
        return None, absent
    taken = below.take(tree, len(blocks), tenant, now, keep=keys[: blocks[0]])
    absent = absent_blocks(tree, ssd, keys)        # blocks behind the first may have been evicted for these slots
    if len(taken) == 0:
        return None, absent
    blocks = absent[np.asarray(tree.slots(keys, SSD))[absent] < 0][: len(taken)]
    plan = DirectPlan(keys[: blocks[-1] + 1], blocks, tree, taken)
    if not below.place(plan, taken, now, tenant):
        return None, absent
    return plan, np.setdiff1d(absent, blocks, assume_unique=True)


def lose(below: Tier, plan: DirectPlan | FetchPlan, lost: NDArray[np.bool_]) -> None:
    """Drop the ``lost`` blocks of a plan ((m,) bool) from the SSD tier, except blocks that another read dropped
    already."""
    if plan.read is None:                          # the plan has ended
        return
    held = np.asarray(plan.tree.slots(plan.keys, SSD))[plan.blocks] == plan.ssd_slots
    freed, plan.read = below.slots.changed(plan.ssd_slots, plan.read), None
    lost = lost & held if freed is None else lost & held & ~freed
    if lost.any():
        plan.tree.drop(plan.keys, plan.by_position(plan.ssd_slots, lost), SSD, failed=True)
        below.slots.free(plan.ssd_slots[lost])
