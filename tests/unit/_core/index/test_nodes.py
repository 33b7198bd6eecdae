"""The store of the tree's nodes."""

import gc
import weakref

import numpy as np
import pytest

from flexkv._core.index.radix import RadixTree, by_position


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


def test_slots_by_position() -> None:
    blocks, slots = np.array([1, 3], dtype=np.int32), np.array([7, 8], dtype=np.int32)
    assert by_position(5, blocks, slots).tolist() == [-1, 7, -1, 8, -1]
    assert by_position(4, blocks, slots, np.array([False, True])).tolist() == [-1, -1, -1, 8]
    assert by_position(0, blocks[:0], slots[:0]).tolist() == []
    with pytest.raises(ValueError, match="block 3 of 3"):
        by_position(3, blocks, slots)
    with pytest.raises(ValueError, match="1 slots for 2 blocks"):
        by_position(5, blocks, slots[:1])
    with pytest.raises(ValueError, match="not as many to choose from"):
        by_position(5, blocks, slots, np.ones(3, dtype=np.bool_))


def test_a_sequence_of_which_nothing_is_in_the_tree() -> None:
    tree = RadixTree(64)
    keys = np.arange(1, 41, dtype=np.uint64).reshape(20, 2)
    assert tree.tenant_of(keys) == tree.tenant_of(keys[:0]) == 0
    tree.insert(keys, np.arange(20, dtype=np.int32), 0, 1.0)
    assert tree.tenant_of(keys[1:]) == 0                   # no node begins there
    tree.drop(keys, np.arange(20, dtype=np.int32), 0)
    assert tree.tenant_of(keys) == 0
