"""The index against a model, for random sequences of operations."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexkv._core.index.eviction import Pieces
from flexkv._core.index.radix import RadixTree
from flexkv.errors import InvariantError

from .examples import EXAMPLES
from .model_tree import ModelBlock, ModelTree, Prefix, keys_of

# Few symbols and short sequences, so that most operations meet what earlier ones left.
SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "acquire", "release", "evict", "fail", "fail", "reclaim", "get", "bad",
                         "withdraw"]),
        SEQUENCES, st.integers(0, 7),
    ),
    min_size=1, max_size=25,
)


class Pair:
    """The index and its model, driven together."""

    def __init__(self) -> None:
        self.tree = RadixTree(1000)
        self.model = ModelTree()
        self.next_slot = itertools.count()
        self.acquired: list[tuple[Prefix, int, int]] = []
        self.now = 0.0

    def put(self, sequence: Prefix, seed: int) -> None:
        """Write the absent blocks; of the new ones some become ready, some stay writing (by the bits of seed)."""
        slots = np.full(len(sequence), -1, dtype=np.int32)
        for i in self.model.absent(sequence):
            slots[i] = next(self.next_slot)
            prefix = sequence[: i + 1]
            self.model.blocks.setdefault(prefix, ModelBlock()).slot = int(slots[i])
        self.now += 1
        self.tree.insert(keys_of(sequence), slots, 0, self.now)
        ready = np.where([(seed >> (i % 3)) & 1 == 0 for i in range(len(sequence))], slots, -1).astype(np.int32)
        assert self.tree.set_ready(keys_of(sequence), ready, 0) == (ready >= 0).sum()
        for i in np.flatnonzero(ready >= 0):
            self.model.blocks[sequence[: i + 1]].ready = True

    def fail(self, sequence: Prefix, seed: int) -> None:
        """Drop the blocks of the sequence that are being written."""
        slots = np.full(len(sequence), -1, dtype=np.int32)
        for i, prefix in enumerate(self.model.prefixes(sequence)):
            block = self.model.blocks.get(prefix)
            if block is not None and block.slot >= 0 and not block.ready and block.references == 0:
                slots[i], block.slot = block.slot, -1
        assert self.tree.drop(keys_of(sequence), slots, 0, failed=True) == (slots >= 0).sum()

    def acquire(self, sequence: Prefix, seed: int) -> None:
        stop = self.model.present(sequence)
        start = min(seed, stop)
        self.tree.acquire(keys_of(sequence), start, stop)
        for prefix in self.model.prefixes(sequence)[start:stop]:
            self.model.blocks[prefix].references += 1
        self.acquired.append((sequence, start, stop))

    def release(self, sequence: Prefix, seed: int) -> None:
        if self.acquired:
            sequence, start, stop = self.acquired.pop(seed % len(self.acquired))
            self.tree.release(keys_of(sequence), start, stop)
            for prefix in self.model.prefixes(sequence)[start:stop]:
                self.model.blocks[prefix].references -= 1

    def evict(self, sequence: Prefix, seed: int) -> None:
        """In an order that the seed says, also of nodes that have priorities already."""
        queues = self.tree.eviction_queues(0)
        events = queues.drain()
        events["priority"] = events["last_access"] * (1 if seed % 2 else -1)
        queues.place(events)
        self.now += 1
        gone = Pieces()
        slots = self.tree.evict(0, 0, 0, seed, self.now, pieces=gone)
        assert gone.array()["blocks"].sum() == len(slots)
        for slot in slots:
            self.model.evict(int(slot))

    def reclaim(self, sequence: Prefix, seed: int) -> None:
        """Blocks that no match reaches: as many as are asked for, or all that nothing holds."""
        slots = self.tree.reclaim(0, seed)
        for slot in slots:
            self.model.reclaim(int(slot))
        self.tree.check_integrity()
        if len(slots) < seed:
            assert not self.model.out_of_reach()

    def withdraw(self, sequence: Prefix, seed: int) -> None:
        """Ready blocks without a reference in slots from a number on: all of them, or as many as are asked for."""
        bound, want = seed * 7 % 11, 1 + seed % 5
        mine = [block for block in self.model.blocks.values() if block.slot >= bound and block.ready]
        free = [block for block in mine if block.references == 0]
        slots = self.tree.withdraw(0, bound, 1 << 20, want).tolist()
        assert len(slots) == min(want, len(free))
        assert set(slots) <= {block.slot for block in free}
        for block in free:
            if block.slot in slots:
                block.slot, block.ready = -1, False

    def get(self, sequence: Prefix, seed: int) -> None:
        self.now += 1
        self.tree.touch(keys_of(sequence), self.now)

    def bad(self, sequence: Prefix, seed: int) -> None:
        """What breaks the contract is refused, and changes nothing (the comparison that follows would tell)."""
        keys = keys_of(sequence)
        if self.model.present(sequence) < len(sequence):
            with pytest.raises(InvariantError):
                self.tree.acquire(keys, 0, len(sequence))
            with pytest.raises(InvariantError):
                self.tree.insert(keys, np.full(len(sequence), -1, dtype=np.int32), 0, self.now)
        elif not self.model.absent(sequence):
            with pytest.raises(InvariantError):
                self.tree.insert(keys, np.full(len(sequence), 1 << 20, dtype=np.int32), 0, self.now)

    def compare(self, sequence: Prefix) -> None:
        self.model.prune()
        match = self.tree.match(keys_of(sequence))
        assert list(match.slots) == self.model.ready(sequence)
        assert list(self.tree.absent(keys_of(sequence))) == self.model.absent(sequence)
        assert self.tree.num_blocks == len(self.model.blocks)

    def finish(self) -> None:
        held = self.tree.check_integrity()[0]
        assert list(held) == sorted(block.slot for block in self.model.blocks.values() if block.slot >= 0)
        while self.acquired:
            self.release((), 0)
        self.model.prune()
        assert self.tree.num_blocks == len(self.model.blocks)
        writing = [p for p, b in self.model.blocks.items() if b.slot >= 0 and not b.ready]
        for prefix in writing:
            slots = np.full(len(prefix), -1, dtype=np.int32)
            slots[-1] = self.model.blocks[prefix].slot
            assert self.tree.drop(keys_of(prefix), slots, 0) == 1
        self.tree.discard(0)
        self.tree.check_integrity()
        assert self.tree.num_blocks == 0
        assert self.tree.num_nodes == 0


# The first block fails, a part of what is behind it is freed, and the first is written again.
FILLED_HOLE = [("put", (1, 0, 1, 0, 0), 1), ("put", (1, 0, 0), 0), ("fail", (1,), 0), ("reclaim", (0,), 2),
               ("put", (1,), 0), ("reclaim", (0,), 1)]

# Two sequences have a hole each; reclaiming the second leaves holes of its own, which must not hide the first.
TWO_HOLES = [("put", (0, 0, 0), 1), ("put", (1, 0), 1), ("fail", (0,), 0), ("reclaim", (0,), 1), ("put", (1, 1), 0),
             ("fail", (1,), 0), ("reclaim", (0,), 3)]


@settings(max_examples=EXAMPLES, deadline=None)
@example(FILLED_HOLE)
@example(TWO_HOLES)
@given(OPERATIONS)
def test_tree_agrees_with_model(operations: list[tuple[str, Prefix, int]]) -> None:
    pair = Pair()
    for name, sequence, seed in operations:
        getattr(pair, name)(sequence, seed)
        pair.compare(sequence)
    pair.finish()
