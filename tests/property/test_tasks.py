"""The state machine of tasks: its calls interleaved in every way with hand-over, copies, results and resets."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .checked_table import CheckedTable
from .examples import EXAMPLES
from .model_tree import Prefix

Step = tuple[str, Prefix, int]
"""A method of ``CheckedTable``, with its arguments."""

NAMES: dict[str, Prefix] = {"A": (0, 0), "AAA": (0, 0, 0), "AB": (0, 1), "B": (1,), "LONG": (2,) * 6}
"""Sequences. LONG has more blocks than there are host slots: with SSD, the first of them are written straight there."""

SEEDS = {
    "older": 1,                                    # the task before the newest
    "once": 2, "twice": 0, "with_another": 3,      # launch
    "a_load": 4, "a_load_provisionally": 2, "a_load_not_handed_over": 12, "a_put": 8,      # put_after
    "first_block": 5, "deferred": 6, "all": 1, "minute": 1, "before": 1, "after": 0, "anew": 1,
}

LOAD_FAILS = "begin, lose, begin, end, fire, fire"

KNOWN = {
    "at rest, cancelled": "save_provisional A, cancel, accept",
    "at rest and taken, cancelled": "save_provisional A, take, cancel, accept",
    "at rest, reset": "save_provisional A, reset, accept, save_provisional A",
    "at rest, index reset": "save_provisional A, reset_index, accept, save A",
    "at rest, expired": "save_provisional A, pass_time minute, accept",
    "cancelled, at rest": "put_provisional A, cancel, rest, accept, take",
    "accepted, cancelled, at rest": "put_provisional A, accept, cancel, rest, take",
    "at rest, accepted in part": "save_provisional AAA, accept first_block, accept, load AAA",
    "accepted in part, at rest": "put_provisional AAA, accept first_block, accept, rest, cancel",
    "accepted, one block was not copied": "put_provisional AAA, begin, lose, rest, accept, take, load AAA",
    "accepted, longer than the host tier": "save_provisional LONG, accept, take",
    "accepted and written": "save_provisional A, write_back A, accept, write_back A, load A",

    "a load failed": f"save A, get A, {LOAD_FAILS}, put_after B a_load, rest, take",
    "a load failed, accepted": f"save A, get A, {LOAD_FAILS}, put_after B a_load_provisionally, accept, rest, take",
    "a load failed, long put": f"save A, get A, {LOAD_FAILS}, put_after LONG a_load, rest, take",
    "a load fails": f"save A, get A, put_after B a_load, {LOAD_FAILS}, rest, take",
    "a load fails, accepted": f"save A, get A, put_after B a_load_provisionally, accept, {LOAD_FAILS}, rest, take",
    "a load fails, long put": f"save A, get A, put_after LONG a_load, {LOAD_FAILS}, rest, take",
    "a load fails before hand-over": f"save A, get A, put_after B a_load_not_handed_over, {LOAD_FAILS}, rest, take",
    "a load is cancelled": "save A, get A, put_after B a_load, cancel older, rest, take",
    "a load is late": "save A, get A, put_after B a_load, late older, rest, take",
    "the rank of a load is lost": "save A, get A, put_after B a_load, lose_rank older, rest, take",
    "a load arrives": "save A, get A, put_after B a_load, rest, take, load B, take",
    "a load had arrived": "save A, load A, put_after B a_load, rest, load B, take",
    "a load of an older epoch runs": "save A, get A, reset_index, put_after B a_load, rest, take",
    "a load of an older epoch had arrived": "save A, load A, reset_index, put_after B a_load, rest, take",
    "after a put": "save A, put_after B a_put, rest, take",

    "put, reset, launched": "plan_put A, hold, reset_index, launch once, take, rest, take",
    "long put, reset, launched": "plan_put LONG, hold, reset_index, launch once, take, rest, take",
    "provisional put, reset, launched": "plan_provisional A, reset_index, run, accept, rest, take",
    "empty put, reset, launched": "save A, plan_put A, hold, reset_index, launch once, take",
    "get, reset, launched": "save A, plan_get A, hold, reset_index, launch once, take, rest, take",
    "put, reset, launched, cancelled": "plan_put A, reset_index, run, cancel, take, rest, take",
    "put runs, reset": "put A, begin, reset_index, rest, take",
    "long put runs, reset": "put LONG, begin, reset_index, begin, end, rest, take",
    "get runs, reset": "save A, get A, begin, reset_index, rest, take",
    "get, reset, taken": "save A, load A, reset_index, take",
    "get that failed, reset, taken": "save A, load AAA all, reset_index, take",
    "reset before the plan of a get": "save A, reset_amid before, load A, take",
    "reset after the plan of a get": "save A, reset_amid after, load A, take",
    "reset before the plan of a put": "reset_amid before, save A, take, load A",
    "reset after the plan of a put": "reset_amid after, save A, take, load A",

    "put cancelled before hand-over": "plan_put A, run, cancel, hand_over, begin, rest, take",
    "get cancelled before hand-over": "save A, plan_get A, run, cancel, hand_over, begin, rest, take",
    "reset before hand-over": "plan_put A, run, reset, hand_over, begin, rest, take",
    "cancelled, late before it is stopped": "put A, cancel deferred, late, take, stop, rest, take",
    "late, cancelled": "put A, begin, late, cancel, take, rest, take",
    "rank lost, cancelled": "put A, begin, lose_rank, cancel, take, rest, take",
    "cancelled after its copies": "put B, begin, end, cancel, fire, take",
    "given up amid its copies": "put A, begin, end, abandon, rest, take",
    "cancelled amid writes straight to SSD": "put LONG, begin, begin, end, cancel, take, rest, take",
    "reset amid an erasure": f"put LONG, begin, lose, {'begin, end, ' * 5}fire, reset, rest",
    "not taken by the data plane": "refuse, put A, take, refuse, save_provisional A, save A",

    "launched twice at once": "plan_put A, hold, launch twice, launch once, rest, take",
    "launched again": "plan_put A, hold, launch once, launch twice, rest, launch twice, take",
    "launched with one that runs": "put A, plan_put B, hold, launch with_another, cancel, rest",
    "cancelled, launched": "plan_put A, hold, cancel, launch twice, save A",
    "never launched": "plan_put A, hold, pass_time minute, launch twice, take, save A",
    "launched in time": "plan_put A, hold, launch once, pass_time minute, rest, take",
    "a second result": "save A, again, load A, again, save LONG, again",
    "a second result, slots in use again": "save_provisional A, cancel, again, put A, again anew, rest",
}

STEPS = st.lists(
    st.tuples(
        st.sampled_from([
            "save", "save", "save_provisional", "save_provisional", "load", "put", "put_provisional", "get", "get",
            "put_after", "put_after", "plan_put", "plan_provisional", "plan_get", "run", "hold", "hold", "discard",
            "launch", "launch", "cancel", "cancel", "accept", "accept", "reset_index", "reset", "reset_amid",
            "pass_time", "evict", "write_back", "refuse", "hand_over", "hand_over", "stop", "begin", "begin", "begin",
            "end", "end", "end", "lose", "late", "lose_rank", "abandon", "fire", "fire", "fire", "take", "take",
            "again",
        ]),
        st.sampled_from([*NAMES.values()]),
        st.integers(0, 63),
    ),
    min_size=20, max_size=50,
)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Failures are wanted here, and to log them takes longer than the test."""
    logger = logging.getLogger("flexkv")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


def play(steps: list[Step], with_ssd: bool) -> None:
    checked = CheckedTable(with_ssd)
    for step in steps:
        checked.step(*step)
    checked.drain()


def steps_of(text: str) -> list[Step]:
    """Steps, separated by commas; each a name, then the name of a sequence or of a seed, or both."""
    parts = [part.split() for part in text.split(", ")]
    assert all(word in NAMES or word in SEEDS for _, *words in parts for word in words)
    return [(
        name, next((NAMES[word] for word in words if word in NAMES), ()),
        next((SEEDS[word] for word in words if word in SEEDS), 0),
    ) for name, *words in parts]


@pytest.mark.parametrize("with_ssd", [False, True], ids=["host", "ssd"])
@pytest.mark.parametrize("text", KNOWN.values(), ids=KNOWN)
def test_tasks_keep_their_promises_in_a_known_interleaving(text: str, with_ssd: bool) -> None:
    play(steps_of(text), with_ssd)


@settings(
    max_examples=EXAMPLES // 24, deadline=None,
    phases=[Phase.reuse, Phase.generate, Phase.shrink],      # to explain a failure takes longer than to find it
)
@given(STEPS, st.booleans())
def test_tasks_keep_their_promises_in_every_interleaving(steps: list[Step], with_ssd: bool) -> None:
    play(steps, with_ssd)
