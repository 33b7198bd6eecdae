"""The measured speed of a source."""

import numpy as np
import pytest

from flexkv.cache.admission.cost_model import CostModel


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_speed_is_that_of_lately_and_of_busy_time() -> None:
    clock = Clock()
    cost = CostModel(1 << 20, clock)
    assert cost.bytes_per_s == 0
    assert cost.seconds(np.arange(3)) is None
    for _ in range(30):
        cost.read_began()
        cost.read_began()
        clock.now += 1
        cost.read_ended(10)
        clock.now += 1
        cost.read_ended(10)
        clock.now += 50                                        # idle
    assert round(cost.bytes_per_s / (1 << 20), 3) == 10
    seconds = cost.seconds(np.array([0, 5, 20]))
    assert seconds is not None
    assert seconds.tolist() == pytest.approx([0.0, 0.5, 2.0])
    for _ in range(30):
        cost.read_began()
        clock.now += 1
        cost.read_ended(40)
    assert cost.bytes_per_s / (1 << 20) > 39


def test_an_old_measurement_is_discarded() -> None:
    clock = Clock()
    cost = CostModel(1 << 20, clock)
    cost.read_began()
    clock.now += 2
    cost.read_ended(100)
    clock.now += 61
    assert cost.bytes_per_s == 0
    cost.read_began()
    assert cost.bytes_per_s == 0
    clock.now += 1
    cost.read_ended(1000)
    assert cost.bytes_per_s == 1000 << 20                      # nothing is left of the earlier measurement
