"""Load or compute."""

import numpy as np
import pytest

from flexkv.cache.admission.load_or_compute import LoadOrCompute

SLOW = np.array([False, False, True, True, True, False, True])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def load_or_compute(policy: str = "auto", prefill_tokens_per_s: float = 1000.0) -> tuple[LoadOrCompute, Clock]:
    """Slots of 1 MiB; blocks of 10 tokens, so that one takes 10 ms to compute."""
    clock = Clock()
    return LoadOrCompute(policy, 1 << 20, 10, prefill_tokens_per_s, clock), clock


def measure(made: tuple[LoadOrCompute, Clock], blocks_per_s: float) -> LoadOrCompute:
    plan, clock = made
    plan.read_began()
    clock.now += 100 / blocks_per_s
    plan.read_ended(100)
    assert plan.bytes_per_s / (1 << 20) == pytest.approx(blocks_per_s)
    return plan


def test_a_fast_disk_loads_all() -> None:
    assert measure(load_or_compute(), 1000.0).worth(SLOW, 0) == 7


def test_a_slow_disk_loads_nothing() -> None:
    assert measure(load_or_compute(), 50.0).worth(SLOW, 0) == 2


def test_a_disk_about_as_fast_loads_as_much_as_pays() -> None:
    # 11.9 ms a block; the fifth costs nothing: 59.5 ms for the first six, against 60; 71.4 for all, against 70
    slow = np.array([True, True, True, True, False, True, True])
    assert measure(load_or_compute(), 1 / 0.0119).worth(slow, 0) == 6


def test_what_is_queued_counts() -> None:
    fast = measure(load_or_compute(), 200.0)                           # 5 ms a block
    assert fast.worth(SLOW, 0) == 7
    assert fast.worth(SLOW, 6) == 7
    assert fast.worth(SLOW, 7) == 2


def test_what_is_not_known_loads_all() -> None:
    assert load_or_compute()[0].worth(SLOW, 99) == 7
    assert measure(load_or_compute(prefill_tokens_per_s=0.0), 1.0).worth(SLOW, 99) == 7


def test_policies() -> None:
    assert measure(load_or_compute("always"), 1.0).worth(SLOW, 99) == 7
    assert load_or_compute("never")[0].worth(SLOW, 0) == 2
    assert load_or_compute("never")[0].worth(np.zeros(3, dtype=np.bool_), 0) == 3


def test_the_speed_is_that_of_lately_and_of_busy_time() -> None:
    plan, clock = load_or_compute()
    assert plan.bytes_per_s == 0
    for _ in range(30):
        plan.read_began()
        plan.read_began()
        clock.now += 1
        plan.read_ended(10)
        clock.now += 1
        plan.read_ended(10)
        clock.now += 50                                        # idle
    assert round(plan.bytes_per_s / (1 << 20), 3) == 10
    for _ in range(30):
        plan.read_began()
        clock.now += 1
        plan.read_ended(40)
    assert plan.bytes_per_s / (1 << 20) > 39


def test_a_disk_that_was_slow_is_tried_again() -> None:
    slow, clock = made = load_or_compute()
    assert measure(made, 50.0).worth(SLOW, 0) == 2
    clock.now += 59
    assert slow.worth(SLOW, 0) == 2
    clock.now += 2
    assert slow.bytes_per_s == 0
    assert slow.worth(SLOW, 0) == 7
    slow.read_began()
    assert slow.worth(SLOW, 0) == 7                            # as was said before
    clock.now += 1
    slow.read_ended(1000)
    assert slow.bytes_per_s == 1000 << 20                      # nothing is left of what was measured before
    assert slow.worth(SLOW, 0) == 7


def test_a_rate_that_is_known_later_counts_from_then_on() -> None:
    plan = measure(load_or_compute(prefill_tokens_per_s=0.0), 50.0)
    plan.prefill_tokens_per_s = 1000.0
    assert plan.worth(SLOW, 0) == 2
