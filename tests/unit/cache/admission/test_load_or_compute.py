"""Load or compute."""

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.admission.load_or_compute import LoadOrCompute, Reads

SLOW = np.array([False, False, True, True, True, False, True])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Decision:
    """Slots of 1 MiB; blocks of 10 tokens, so that one takes 10 ms to compute. The disk reads ``blocks_per_s``."""

    def __init__(self, policy: str = "auto", rate: float = 1000.0, blocks_per_s: float = 0.0) -> None:
        self.decision, self.clock = LoadOrCompute(policy, 10, rate), Clock()
        self.cost = self.source(blocks_per_s)

    def source(self, blocks_per_s: float) -> CostModel:
        cost = CostModel(1 << 20, self.clock)
        if blocks_per_s:
            cost.read_began()
            self.clock.now += 100 / blocks_per_s
            cost.read_ended(100)
            assert cost.bytes_per_s / (1 << 20) == pytest.approx(blocks_per_s)
        return cost

    def worth(self, slow: NDArray[np.bool_], queued: int = 0) -> int:
        return self.decision.worth([Reads(self.cost, slow, queued)], len(slow))


def test_a_fast_disk_loads_all() -> None:
    assert Decision(blocks_per_s=1000.0).worth(SLOW) == 7


def test_a_slow_disk_loads_nothing() -> None:
    assert Decision(blocks_per_s=50.0).worth(SLOW) == 2


def test_a_disk_about_as_fast_loads_as_much_as_pays() -> None:
    # 11.9 ms a block; the fifth costs nothing: 59.5 ms for the first six, against 60; 71.4 for all, against 70
    slow = np.array([True, True, True, True, False, True, True])
    assert Decision(blocks_per_s=1 / 0.0119).worth(slow) == 6


def test_queued_reads_count() -> None:
    fast = Decision(blocks_per_s=200.0)                                # 5 ms a block
    assert fast.worth(SLOW) == 7
    assert fast.worth(SLOW, 6) == 7
    assert fast.worth(SLOW, 7) == 2


def test_without_a_measurement_all_is_loaded() -> None:
    assert Decision().worth(SLOW, 99) == 7
    assert Decision(rate=0.0, blocks_per_s=1.0).worth(SLOW, 99) == 7


def test_policies() -> None:
    assert Decision("always", blocks_per_s=1.0).worth(SLOW, 99) == 7
    assert Decision("never").worth(SLOW) == 2
    assert Decision("never").worth(np.zeros(3, dtype=np.bool_)) == 3


def test_a_disk_that_was_slow_is_tried_again() -> None:
    slow = Decision(blocks_per_s=50.0)
    assert slow.worth(SLOW) == 2
    slow.clock.now += 59
    assert slow.worth(SLOW) == 2
    slow.clock.now += 2
    assert slow.worth(SLOW) == 7


def test_a_rate_that_is_known_later_counts_from_then_on() -> None:
    decision = Decision(rate=0.0, blocks_per_s=50.0)
    decision.decision.prefill_tokens_per_s = 1000.0
    assert decision.worth(SLOW) == 2


def test_two_sources_are_read_at_the_same_time() -> None:
    """Each alone is fast enough; one after the other they would not be."""
    made = Decision(blocks_per_s=110.0)                                # 9.1 ms a block
    remote, even = made.source(110.0), np.arange(8) % 2 == 0
    assert made.decision.worth([Reads(made.cost, even, 4), Reads(remote, ~even, 4)], 8) == 8
    assert made.decision.worth([Reads(made.cost, even | ~even, 8)], 8) == 0


def test_a_slow_source_ends_the_load_where_it_is_needed() -> None:
    made = Decision(blocks_per_s=1000.0)
    remote = made.source(10.0)                                         # 100 ms a block


    def worth(last: CostModel, num_blocks: int) -> int:
        blocks = np.arange(num_blocks)
        return made.decision.worth([Reads(made.cost, blocks < 4), Reads(last, blocks == 5)], num_blocks)

    assert worth(remote, 12) == 12                                     # 100 ms against 120
    assert worth(remote, 9) == 5                                       # 100 ms against 90
    assert worth(made.source(0.0), 9) == 9
