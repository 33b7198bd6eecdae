"""Blocks that go straight between SSD and the GPU: the index knows them on SSD alone, before and after."""

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.plan import IN_PLACE, DirectPlan, FetchPlan
from flexkv.cache.sources import Sources
from flexkv.cache.tier import SSD, Tier


def direct_get(
    tree: RadixTree, below: Tier, keys: NDArray[np.uint64], match: Match, found: Sources
) -> DirectPlan | None:
    """What of ``found`` is on SSD alone, and nobody fetches; its ``slots`` tell, too."""
    blocks = found.slow[found.slots[found.slow] < 0]
    if len(blocks) == 0:
        return None
    found.slots[blocks] = IN_PLACE
    plan = DirectPlan(keys[: blocks[-1] + 1], blocks.astype(np.int32), tree, match.slots[blocks])
    plan.read = below.slots.generations(plan.ssd_slots)
    return plan


def direct_put(
    tree: RadixTree, below: Tier, keys: NDArray[np.uint64], absent: NDArray[np.int32], group: int, now: float
) -> tuple[DirectPlan | None, NDArray[np.int32]]:
    """Give SSD slots to the first of these blocks, as far as there are any; also returns those that got none.

    The first ones, not the last: what follows on blocks in host memory would be lost if those went before they are
    written. What is before them in the sequence stays. Blocks that have a slot on a disk out of service get none.
    """
    blocks = absent[np.asarray(tree.slots(keys, SSD))[absent] < 0]
    if len(blocks) == 0:
        return None, absent
    taken = below.take(tree, len(blocks), group, now, keep=keys[: blocks[0]])
    if len(taken) == 0:
        return None, absent
    blocks = blocks[: len(taken)]
    plan = DirectPlan(keys[: blocks[-1] + 1], blocks, tree, taken)
    if not below.place(plan, taken, now, group):
        return None, absent
    return plan, np.setdiff1d(absent, blocks, assume_unique=True)


def lose(below: Tier, plan: DirectPlan | FetchPlan, lost: NDArray[np.bool_]) -> None:
    """Blocks of a plan that could not be read from SSD are not there any more, unless another read has found so."""
    if plan.read is None:                          # the plan has ended
        return
    held = np.asarray(plan.tree.slots(plan.keys, SSD))[plan.blocks] == plan.ssd_slots
    freed, plan.read = below.slots.changed(plan.ssd_slots, plan.read), None
    lost = lost & held if freed is None else lost & held & ~freed
    if lost.any():
        plan.tree.drop(plan.keys, plan.by_position(plan.ssd_slots, lost), SSD, failed=True)
        below.slots.free(plan.ssd_slots[lost])
