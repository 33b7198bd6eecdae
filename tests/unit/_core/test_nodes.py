"""The store of the tree's nodes."""

import gc
import weakref

import numpy as np

from flexkv._core.radix import RadixTree


class Owner:
    """Has a tree, and itself."""

    def __init__(self) -> None:
        self.tree = RadixTree(64)
        self.myself = self


def test_a_tree_in_a_cycle_is_collected() -> None:
    """Its memory is freed when its arena may have gone already, in whatever order the collector takes them."""
    owner = Owner()
    keys = np.arange(1, 41, dtype=np.uint64).reshape(20, 2)
    owner.tree.insert(keys, np.arange(20, dtype=np.int32), 0, 1.0)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
