"""The queue of writes: its bound, its order, and the writes that are displaced when it is full."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv.cache.admission.write_queue import WriteQueue
from tests.property.model_tree import keys_of


def every(count: int) -> NDArray[np.intp]:
    return np.arange(count)


def test_what_is_shortened_keeps_its_place() -> None:
    queue = WriteQueue(12)
    assert queue.add(0, keys_of((1,) * 6), every(6)) == 6
    assert queue.add(0, keys_of((2,) * 6), every(6)) == 6
    assert queue.add(1, keys_of((3,) * 2), every(2)) == 2
    assert queue.left_out == 2
    assert queue.remove(0, keys_of((2,) * 4)[-1])                # its last two had to go
    assert queue.num_blocks == 8


def test_tenants_take_turns() -> None:
    queue = WriteQueue(12)
    for tenant, first in ((0, 1), (0, 2), (1, 3)):
        queue.add(tenant, keys_of((first,)), every(1))
    turns = []
    while (first_of := queue.first()) is not None:
        tenant, keys = first_of
        turns.append((tenant, keys.tobytes()))
        queue.remove(tenant, keys[-1])
        queue.end_turn(tenant)
    assert turns == [(0, keys_of((1,)).tobytes()), (1, keys_of((3,)).tobytes()), (0, keys_of((2,)).tobytes())]


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=30))
def test_it_is_bounded_and_leaves_everyone_an_even_part(
    max_blocks: int, additions: list[tuple[int, int]]
) -> None:
    queue = WriteQueue(max_blocks)
    for number, (tenant, count) in enumerate(additions):
        before = dict(queue._blocks)
        queue.add(tenant, keys_of((number,) * count), every(count))
        share = max_blocks // len({*before, tenant})
        assert queue.num_blocks <= max_blocks
        for other, blocks in before.items():
            if other != tenant:
                assert queue._blocks[other] >= min(blocks, share)        # nobody goes below it for another
        assert queue._blocks.get(tenant, 0) >= min(count, share)
        assert queue._blocks == {
            number: sum(len(blocks) for _, blocks in sequences.values()) for number, sequences in queue._queues.items()
        }
        assert all(queue._queues.values())
