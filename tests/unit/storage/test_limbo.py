"""Slots in limbo, against a set of (slot, holder)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.storage.limbo import Limbo

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "hold", "release", "expire"]),
        st.sets(st.integers(0, 7), max_size=4), st.sets(st.integers(0, 3), min_size=1, max_size=3),
        st.sampled_from([1.0, 2.0, math.inf]),
    ),
    max_size=30,
)


@given(STEPS)
def test_a_slot_is_released_once_and_only_by_its_last_holder(
    steps: list[tuple[str, set[int], set[int], float]]
) -> None:
    limbo, held, until = Limbo(), set[tuple[int, int]](), dict[int, float]()
    for now, (name, slots, holders, after) in enumerate(steps):
        if name == "hold":
            limbo.hold(np.array(sorted(slots), dtype=np.int32), holders, now + after)
            held |= {(slot, holder) for slot in slots for holder in holders}
            if after < math.inf:
                until.update(dict.fromkeys(holders, now + after))
            continue
        over = {holder for holder, end in until.items() if end <= now} if name == "expire" else {min(holders)}
        before = {slot for slot, _ in held}
        held = {(slot, holder) for slot, holder in held if holder not in over}
        for holder in over:
            until.pop(holder, None)
        released = limbo.expire(float(now)) if name == "expire" else limbo.release(min(holders))
        assert sorted(released.tolist()) == sorted(before - {slot for slot, _ in held})
        assert limbo.slots.tolist() == sorted({slot for slot, _ in held})
        assert len(limbo) == len({slot for slot, _ in held})


def test_a_slot_needs_a_holder() -> None:
    with pytest.raises(ValueError, match="without a holder"):
        Limbo().hold(np.zeros(1, dtype=np.int32), [])
