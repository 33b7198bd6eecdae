"""The slot allocator against a set of free numbers, for random sequences of operations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv._core.index.slots import SlotAllocator
from flexkv.errors import InvariantError

from .examples import EXAMPLES

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "allocate", "free", "free", "grow", "withdraw", "settle", "double free"]),
        st.integers(0, 150),
    ),
    max_size=30,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 300), OPERATIONS)
def test_allocator_agrees_with_set(capacity: int, operations: list[tuple[str, int]]) -> None:
    slots = SlotAllocator(capacity, 500)
    free = set(range(capacity))
    held: list[np.ndarray] = []
    times = np.zeros(500, dtype=np.uint32)
    everything = np.arange(500, dtype=np.int32)
    end = bound = capacity
    for name, n in operations:
        if name == "allocate":
            got = slots.allocate(n)
            below = {slot for slot in free if slot < bound}
            assert (got is None) == (n > len(below))
            if got is not None:
                assert len(set(got.tolist())) == n
                assert set(got.tolist()) <= below
                free -= set(got.tolist())
                held.append(got)
        elif name == "free" and held:
            back = held.pop(n % len(held))
            before = slots.generations(everything)
            slots.free(back)
            times[back] += 1
            changed = slots.changed(everything, before)
            found = [] if changed is None else np.flatnonzero(changed).tolist()
            assert found == sorted(back.tolist())
            free |= set(back.tolist())
        elif name == "grow":
            bound = min(500, bound + n)
            free |= set(range(end, bound))
            end = max(end, bound)
            slots.grow(bound)
        elif name == "withdraw":
            bound = max(0, bound - n)
            slots.withdraw(bound)
        elif name == "settle":
            is_over = set(range(bound, end)) <= free
            assert slots.settle() == is_over
            if is_over:
                free -= set(range(bound, end))
                end = bound
        elif name == "double free" and free and held:
            wrong = np.concatenate([held[0], np.array([next(iter(free))], dtype=np.int32)])
            with pytest.raises(InvariantError):
                slots.free(wrong)
        assert slots.num_free == sum(slot < bound for slot in free)
        assert slots.capacity == slots.num_free + sum(map(len, held))
        slots.check_integrity()
        assert (slots.generations(everything) == times).all()
    assert {slot for slot in range(end) if slots.is_free(slot)} == free


def test_prefers_a_run_that_is_long_enough() -> None:
    slots = SlotAllocator(1000)
    everything = slots.allocate(1000)
    assert everything is not None
    slots.free(np.concatenate([everything[10:15], everything[300:340], everything[700:705]]))
    got = slots.allocate(40)
    assert got is not None
    assert got.tolist() == list(range(300, 340))


def test_numbers_that_are_no_slots_have_no_generation() -> None:
    slots = SlotAllocator(3)
    taken = slots.allocate(3)
    assert taken is not None
    slots.free(taken)
    numbers = np.array([-2, -1, 0], dtype=np.int32)
    assert slots.generations(numbers).tolist() == [0, 0, 1]
    assert slots.changed(numbers, np.array([5, 5, 1], dtype=np.uint32)) is None
    with pytest.raises(ValueError, match="slot 3"):
        slots.generations(np.array([3], dtype=np.int32))
    with pytest.raises(ValueError, match="2 generations for 3 slots"):
        slots.changed(numbers, np.zeros(2, dtype=np.uint32))
