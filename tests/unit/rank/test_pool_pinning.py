"""Pinning of the pool in small parts with pauses, against an agent and a clock that the test moves."""

import logging
from collections.abc import Iterator

import pytest

from flexkv.errors import CudaError
from flexkv.rank.pool_pinning import MAX_PAUSE_S, PAUSE_FACTOR, PoolPinner


class Agent:
    """Pins parts that take a scripted time; None: nothing to pin now. Fails after the script where ``fails``."""

    def __init__(self, script: list[float | None], fails: bool = False) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.pinned_slots = 0
        self.stop_after: int | None = None
        self._script: Iterator[float | None] = iter(script)
        self._left = len(script) + fails

    @property
    def pinning(self) -> bool:
        return self._left > 0

    def pin_next(self) -> bool:
        self._left -= 1
        took = next(self._script, -1.0)
        if took == -1.0:
            raise CudaError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        self.now += took or 0.0
        self.pinned_slots += took is not None
        return took is not None

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.now += seconds
        return self.stop_after is not None and len(self.pauses) >= self.stop_after

    def clock(self) -> float:
        return self.now

    def run(self) -> None:
        PoolPinner(self, self.pause, self.clock).run()


def test_a_pause_follows_each_part_but_the_first() -> None:
    agent = Agent([0.005] * 10)
    agent.run()
    assert agent.pinned_slots == 10
    assert agent.pauses[:4] == [0.0] * 4                        # the first blocks can be saved at once
    assert agent.pauses[4:] == pytest.approx([PAUSE_FACTOR * 0.005] * 6)


def test_pauses_adapt_and_are_bounded() -> None:
    agent = Agent([0.001] * 4 + [0.001, 0.02, 3.0])
    agent.run()
    assert agent.pauses[4:] == pytest.approx([PAUSE_FACTOR * 0.001, PAUSE_FACTOR * 0.02, MAX_PAUSE_S])


def test_memory_that_is_not_populated_yet_is_awaited() -> None:
    agent = Agent([None, None, 0.005, None, 0.005])
    agent.run()
    assert agent.pinned_slots == 2
    assert all(0 < pause < 0.1 for pause in (agent.pauses[0], agent.pauses[1], agent.pauses[3]))


def test_it_stops_within_a_part() -> None:
    agent = Agent([0.005] * 1000)
    agent.stop_after = 7
    agent.run()
    assert agent.pinned_slots == 7


def test_a_failure_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Agent([0.005, 0.005], fails=True).run()
    assert len(caplog.records) == 1
    assert "cannot be pinned beyond slot 2" in caplog.text
    assert "ulimit -l" in caplog.text
