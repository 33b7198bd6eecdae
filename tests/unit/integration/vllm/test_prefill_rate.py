"""How fast prompts are computed, from steps on a clock that is set by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.integration.vllm.prefill_rate import PrefillRate


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rate(clock: Clock) -> PrefillRate:
    return PrefillRate(clock)


def step(rate: PrefillRate, clock: Clock, seconds: float, *scheduled: int) -> float:
    rate.began(scheduled)
    clock.now += seconds
    return rate.ended()


def test_tokens_of_prompts_by_the_time_of_the_step(rate: PrefillRate, clock: Clock) -> None:
    assert step(rate, clock, 0.5, 1000) == 2000
    assert step(rate, clock, 0.5, 1000, 1, 1, 4) == 2000          # those that decode come along


def test_idle_time_does_not_count(rate: PrefillRate, clock: Clock) -> None:
    for _ in range(5):
        assert step(rate, clock, 0.5, 1000) == 2000
        clock.now += 60


def test_steps_that_decode_or_are_small_say_nothing(rate: PrefillRate, clock: Clock) -> None:
    assert step(rate, clock, 0.001, *[1] * 500) == 0
    assert step(rate, clock, 0.001, 255) == 0
    assert step(rate, clock, 0.001) == 0
    assert step(rate, clock, 0.125, 128, 128) == 2048


def test_asynchronous_scheduling(rate: PrefillRate, clock: Clock) -> None:
    rate.began([1000])
    rate.began([1])                                            # sent out while the first runs
    clock.now += 0.5
    assert rate.ended() == 2000
    rate.began([1500])
    clock.now += 0.01
    assert rate.ended() == 0                                   # the one that decodes
    rate.began([1])
    clock.now += 0.75
    assert rate.ended() == 2000                                # since the one before it ended


def test_the_median_of_lately(rate: PrefillRate, clock: Clock) -> None:
    step(rate, clock, 30.0, 1000)                              # cold code
    for _ in range(4):
        measured = step(rate, clock, 0.5, 1000)
    step(rate, clock, 0.01, 1000)
    assert step(rate, clock, 0.5, 1000) == measured == 2000
    for _ in range(40):
        measured = step(rate, clock, 0.25, 1000)
    assert measured == 4000


def test_what_cannot_be_told_apart_is_not_measured(rate: PrefillRate, clock: Clock) -> None:
    rate.began([1000])
    rate.forget_steps()
    clock.now += 0.001
    assert rate.ended() == 0
    assert rate.ended() == 0
    assert step(rate, clock, 0.5, 1000) == 2000


def test_steps_that_are_never_reported_do_not_pile_up(rate: PrefillRate, clock: Clock) -> None:
    for _ in range(1000):
        rate.began([1000])
        clock.now += 0.5
    assert len(rate._in_flight) <= 16


class Manager:
    """Takes the rate."""

    rates: list[float]

    def __init__(self) -> None:
        self.rates = []

    def set_prefill_rate(self, tokens_per_s: float) -> None:
        self.rates.append(tokens_per_s)


def test_the_scheduler_side_measures(clock: Clock) -> None:
    from vllm.v1.outputs import KVConnectorOutput

    from flexkv.config import ConnectorConfig
    from flexkv.integration.vllm.scheduler import SchedulerSide

    manager: Any = Manager()
    side = SchedulerSide(manager, 16, ConnectorConfig())
    side._prefill = PrefillRate(clock)

    def run(layerwise: bool, *scheduled: int) -> None:
        output: Any = SimpleNamespace(
            num_scheduled_tokens=dict(enumerate(scheduled)), total_num_scheduled_tokens=sum(scheduled)
        )
        side._loads = [SimpleNamespace(layerwise=layerwise)]  # type: ignore[list-item]
        side._time_step(output)
        clock.now += 0.5
        side.step_reported(KVConnectorOutput())

    run(False, 1000, 1)
    run(False)                                                 # without compute
    run(True, 1000)                                            # as long as its load
    run(False, 1000)
    assert manager.rates == [2000, 2000]
