"""Ghosts against a dict that keeps the order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv._core.index.ghosts import Ghosts

KEYS = st.integers(0, 300)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.tuples(KEYS, st.integers(1, 9)), max_size=40)),
        st.tuples(st.just("take"), st.lists(KEYS, max_size=20)),
        st.tuples(st.just("trim"), st.integers(0, 300)),
    ),
    max_size=40,
)


def keys_of(numbers: list[int]) -> np.ndarray:
    """Spread, and some of them with the same place in the table."""
    return np.array([number % 7 << 40 | number for number in numbers], dtype=np.uint64)


@settings(max_examples=500, deadline=None)
@given(STEPS)
def test_ghosts_agree_with_a_dict(steps: list[tuple[str, list]]) -> None:
    ghosts, model = Ghosts(64), dict[int, tuple[int, float]]()
    slots: list[int] = []                                   # of the ring: taken ones keep their place
    for name, what in steps:
        if name == "add":
            values = [float(i) for i in range(len(what))]
            ghosts.add(keys_of([key for key, _ in what]), np.array([n for _, n in what], dtype=np.uint32),
                       np.array(values))
            for (key, blocks), value in zip(what, values, strict=True):
                if key in model:
                    slots[slots.index(key)] = -1
                if len(slots) == 64:
                    model.pop(slots.pop(0), None)
                model.pop(key, None)
                model[key] = (blocks, value)
                slots.append(key)
        elif name == "take":
            expected = [model[key][1] if key in model else np.nan for key in what]
            np.testing.assert_equal(ghosts.take(keys_of(what)), expected)
            for key in set(what) & set(model):
                del model[key]
                slots[slots.index(key)] = -1
        else:
            ghosts.trim(what)
            while sum(blocks for blocks, _ in model.values()) > what:
                model.pop(slots.pop(0), None)
        assert ghosts.num_blocks == sum(blocks for blocks, _ in model.values())


def test_bad_arguments_change_nothing() -> None:
    ghosts = Ghosts(10)
    with pytest.raises(ValueError, match="2 keys"):
        ghosts.add(keys_of([1, 2]), np.ones(1, dtype=np.uint32), np.zeros(2))
    assert ghosts.num_blocks == 0
    with pytest.raises(ValueError, match="max_pieces"):
        Ghosts(0)
