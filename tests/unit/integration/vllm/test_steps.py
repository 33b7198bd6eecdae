"""Which saved blocks are accepted, step by step, without an engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexkv.integration.vllm.steps import _MAX_IN_FLIGHT, StepLedger, Trust, Write


def tracked(seed: int, blocks: int = 8) -> Any:
    keys = np.arange(2 * blocks, dtype=np.uint64).reshape(-1, 2) + np.uint64(1000 * seed)
    return Tracked(keys=lambda: keys)


class Tracked(SimpleNamespace):
    __hash__ = object.__hash__


def pages(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int32)


def begin(ledger: StepLedger, *writes: Write, puts: dict[int, Any] | None = None) -> None:
    ledger.begin(bool(writes), list(writes))
    for task_id, its_pages in (puts or {}).items():
        ledger.add_put(task_id, its_pages)


def end(ledger: StepLedger, invalid: tuple[int, ...] = (), loaded: tuple[str, ...] = (), reported: bool = True) -> Any:
    if reported:
        ledger.report(invalid, loaded)
    verdict = ledger.end()
    assert verdict is not None
    return dict(verdict.accepted)


def sync_load(ledger: StepLedger, one: Any, *numbers: int) -> None:
    ledger.load_started("r", pages(*numbers), True, 0, one.keys()[0].tobytes())


@pytest.mark.parametrize(("invalid", "stop"), [((), None), ((11,), 1), ((10, 11), 0), ((99,), None)])
def test_what_is_computed_behind_a_failed_load_is_dropped(invalid: tuple[int, ...], stop: int | None) -> None:
    ledger, a = StepLedger(), tracked(1)
    sync_load(ledger, a, 10, 11)
    begin(ledger, Write(a, pages(10, 11, 12, 13), 2, 2), puts={7: pages(10, 11, 12, 13)})
    assert end(ledger, invalid) == {7: stop}


def test_a_request_that_shares_the_page_a_step_later_is_dropped_too() -> None:
    ledger, a, b = StepLedger(several=True), tracked(1), tracked(2)
    sync_load(ledger, a, 10)
    begin(ledger, Write(a, pages(10, 12), 1, 1), puts={1: pages(10, 12)})
    begin(ledger, Write(b, pages(12, 20), 1, 1), puts={2: pages(12, 20)})       # the page that a computes
    begin(ledger, Write(tracked(3), pages(30, 31), 0, 0), puts={3: pages(30, 31)})
    assert [end(ledger, (10,)), end(ledger), end(ledger)] == [{1: 0}, {2: 0}, {3: None}]


def test_requests_of_one_step_share_pages_in_any_order() -> None:
    ledger, a, b, c = StepLedger(), tracked(1), tracked(2), tracked(3)
    sync_load(ledger, a, 10)
    begin(
        ledger, Write(c, pages(20, 30), 1, 1), Write(b, pages(12, 20), 1, 1), Write(a, pages(10, 12), 1, 1),
        puts={1: pages(20, 30), 2: pages(12, 20)},
    )
    assert end(ledger, (10,)) == {1: 0, 2: 0}


def test_pages_that_are_computed_again_are_good() -> None:
    ledger, a = StepLedger(), tracked(1)
    sync_load(ledger, a, 10, 11)
    begin(ledger, Write(a, pages(10, 11, 12), 2, 2))
    end(ledger, (11,))
    assert ledger.trust(a.keys(), 3) is Trust.BAD
    assert ledger.trust(tracked(5).keys(), 3) is Trust.GOOD
    begin(ledger, Write(a, pages(10, 11, 12), 1, 1), puts={1: pages(10, 11, 12)})
    assert end(ledger) == {1: None}
    assert ledger.trust(a.keys(), 3) is Trust.GOOD


def test_a_page_that_is_written_from_its_middle_stays_bad() -> None:
    ledger, a = StepLedger(), tracked(1)
    begin(ledger, Write(a, pages(10, 11), 0, 0))
    end(ledger, (11,))
    begin(ledger, Write(a, pages(10, 11, 12), 1, 2), puts={1: pages(10, 11, 12)})
    assert end(ledger) == {1: 1}


def test_a_prefix_that_is_being_loaded_is_not_known() -> None:
    ledger, a = StepLedger(), tracked(1)
    sync_load(ledger, a, 10)
    assert ledger.trust(a.keys(), 1) is Trust.UNKNOWN
    assert ledger.trust(a.keys(), 0) is Trust.GOOD
    begin(ledger, Write(a, pages(10, 11), 1, 1))
    assert ledger.trust(a.keys(), 2) is Trust.UNKNOWN
    end(ledger)
    assert ledger.trust(a.keys(), 2) is Trust.GOOD


@pytest.mark.parametrize("loaded", [False, True])
def test_pages_of_an_asynchronous_load_count_when_it_is_reported(loaded: bool) -> None:
    ledger, a = StepLedger(), tracked(1)
    ledger.load_started("r", pages(10), False, 0, b"")
    begin(ledger)
    end(ledger, (), ("r",) if loaded else ())
    begin(ledger, Write(a, pages(10, 11), 1, 1), puts={1: pages(10, 11)})
    assert end(ledger) == {1: None if loaded else 0}


@pytest.mark.parametrize("sync", [False, True])
def test_a_bad_page_is_good_again_when_it_is_loaded(sync: bool) -> None:
    ledger, a = StepLedger(), tracked(1)
    begin(ledger, Write(a, pages(10, 11), 0, 0))
    end(ledger, (10,))
    ledger.load_started("r", pages(10, 11), sync, 0, a.keys()[0].tobytes())
    begin(ledger, *([Write(a, pages(10, 11, 12), 2, 2)] if sync else []))
    end(ledger, (), () if sync else ("r",))
    begin(ledger, Write(a, pages(10, 11, 12), 2, 2), puts={1: pages(10, 11, 12)})
    assert end(ledger) == {1: None}


def test_a_report_is_of_the_oldest_step() -> None:
    ledger, a, b = StepLedger(several=True), tracked(1), tracked(2)
    begin(ledger, Write(a, pages(10, 11), 1, 1), puts={1: pages(10, 11)})
    begin(ledger, Write(b, pages(10, 20), 0, 0), puts={2: pages(10, 20)})       # computes page 10 again
    assert [end(ledger, (10,)), end(ledger)] == [{1: 0}, {2: None}]


@pytest.mark.parametrize(("several", "stop"), [(False, None), (True, 0)])
def test_a_request_whose_outputs_are_dropped_with_steps_in_flight_is_bad_from_there_on(
    several: bool, stop: int | None
) -> None:
    ledger, a, b = StepLedger(several), tracked(1), tracked(2)
    begin(ledger, Write(a, pages(10, 11), 1, 1))
    end(ledger, (10,))
    begin(ledger, Write(a, pages(10, 11), 0, 0), puts={1: pages(10, 11)})
    assert end(ledger) == {1: stop}
    begin(ledger, Write(b, pages(10, 11), 0, 0), puts={2: pages(10, 11)})
    assert end(ledger) == {2: None}


def test_a_sequence_without_keys_may_have_any_page() -> None:
    ledger, a, nothing = StepLedger(), tracked(1), np.empty((0, 2), dtype=np.uint64)
    sync_load(ledger, a, 10)
    assert [ledger.trust(nothing, num_blocks) for num_blocks in (0, 1)] == [Trust.GOOD, Trust.UNKNOWN]
    begin(ledger, Write(a, pages(10, 11), 1, 1))
    end(ledger, (11,))
    assert [ledger.trust(nothing, num_blocks) for num_blocks in (0, 1)] == [Trust.GOOD, Trust.BAD]
    begin(ledger, Write(a, pages(10, 11), 1, 1))
    end(ledger)
    assert ledger.trust(nothing, 1) is Trust.GOOD


def test_nothing_is_known_of_what_an_unreported_step_has_loaded() -> None:
    ledger, a = StepLedger(), tracked(1)
    sync_load(ledger, a, 10)
    begin(ledger, Write(a, pages(10, 11), 1, 1))
    end(ledger, reported=False)
    begin(ledger, Write(a, pages(10, 11), 1, 1), puts={1: pages(10, 11)})
    assert end(ledger) == {1: 0}


def test_a_step_that_computes_and_is_not_reported_is_not_accepted() -> None:
    ledger, a = StepLedger(), tracked(1)
    begin(ledger, Write(a, pages(10, 11), 0, 0), puts={1: pages(10)})
    begin(ledger, puts={2: pages(30)})                          # computes nothing, and says nothing
    assert [end(ledger, reported=False), end(ledger, reported=False)] == [{1: 0}, {2: None}]
    begin(ledger, Write(a, pages(10, 11, 12), 2, 2), puts={3: pages(10, 11, 12)})
    assert end(ledger) == {3: 0}


def test_an_engine_that_never_ends_its_steps_saves_nothing_and_keeps_little() -> None:
    ledger, a = StepLedger(), tracked(1)
    dropped = []
    for task_id in range(3 * _MAX_IN_FLIGHT):
        dropped += ledger.begin(True, [Write(a, pages(10), 0, 0)])
        ledger.add_put(task_id, pages(10))
    assert ledger.lost
    assert dropped == list(range(3 * _MAX_IN_FLIGHT - 1))
    assert end(ledger) == {3 * _MAX_IN_FLIGHT - 1: 0}
    assert ledger.end() is None                                 # the steps before it were forgotten


def test_dropped_puts_are_not_decided() -> None:
    ledger, a = StepLedger(), tracked(1)
    begin(ledger, Write(a, pages(10), 0, 0), puts={1: pages(10), 2: pages(10)})
    assert ledger.drop_puts({2, 9}) == [2]
    assert end(ledger) == {1: None}
    begin(ledger, puts={3: pages(10)})
    assert ledger.drop_puts() == [3]
    assert end(ledger) == {}
    assert ledger.end() is None
