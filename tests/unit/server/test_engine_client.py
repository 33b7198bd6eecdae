"""An engine of the daemon behaves as one with a controller in its process: the same tests on another Blocks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonPerManager
from tests.unit import test_kvmanager
from tests.unit.controller import test_blocks

test_round_trip = test_kvmanager.test_round_trip_in_one_process
test_two_ranks = test_kvmanager.test_round_trip_with_two_ranks_in_other_processes
test_only_what_is_missing_moves = test_kvmanager.test_only_what_is_missing_moves
test_nothing_to_do_succeeds = test_kvmanager.test_nothing_to_do_succeeds
test_bad_arguments_change_nothing = test_kvmanager.test_bad_arguments_change_nothing
test_a_page_that_does_not_exist_fails_alone = test_kvmanager.test_a_page_that_does_not_exist_fails_alone
test_namespaces_and_extras_separate = test_kvmanager.test_namespaces_and_extras_separate
test_fences_hold_transfers_back = test_kvmanager.test_fences_hold_transfers_back
test_a_full_pool_evicts_and_a_pinned_one_misses = test_kvmanager.test_a_full_pool_evicts_and_a_pinned_one_misses
test_a_get_that_finds_nothing = test_kvmanager.test_a_get_that_finds_nothing_ends_with_an_empty_mask
test_reset_forgets_what_is_in_flight = test_kvmanager.test_reset_forgets_what_is_in_flight
test_two_clients_put_the_same_prefix_at_once = test_kvmanager.test_two_clients_put_the_same_prefix_at_once
test_groups_of_tensors_and_sleep = test_kvmanager.test_groups_of_tensors_and_sleep
test_before_the_ranks_are_there_nothing_is_found = test_kvmanager.test_before_the_ranks_are_there_nothing_is_found
test_a_flood_cannot_push_another_under_its_guarantee = test_blocks.test_a_flood_cannot_push_another_under_its_guarantee
test_every_match_has_a_reason_and_is_counted = test_blocks.test_every_match_has_a_reason_and_is_counted
test_pins = test_blocks.test_pins
test_pins_by_the_command_line = test_blocks.test_pins_by_the_command_line


@pytest.fixture(autouse=True)
def daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = DaemonPerManager(tmp_path)
    monkeypatch.setattr("flexkv.kvmanager.connect", made.connect)
    try:
        yield
    finally:
        made.close()
