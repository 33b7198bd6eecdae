"""Loads fail at random around vLLM's real scheduler: each answer is right, and each block in the index has, bit by bit,
the content that computing its tokens writes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import PAGES
from tests.integration.paged_engine import PagedEngine
from tests.integration.workload import FailingLoads, make_requests, serve, wrong_answers
from tests.support.harness import until

MODES = [
    ("always", 1, 0.3), ("always", 2, 0.3), ("auto", 1, 0.05), ("never", 1, 0.3), ("never", 2, 0.3), ("never", 3, 0.5)
]
NIGHTLY = int(os.environ.get("ORACLE_REQUESTS", "4000"))


def expect_right(
    engine: PagedEngine, count: int, seed: int, per_step: float = 0.3, share: float = 0.05,
    pace: Callable[[], object] = lambda: None, least: int = 100,
) -> int:
    """How many loads have failed. ``least``: blocks that are checked at least."""
    requests = make_requests(count, seed, per_step=per_step)
    failing = FailingLoads(engine, share, seed)
    serve(engine, requests, pace)
    failing.stop()
    assert wrong_answers(engine, requests) == []
    checked, wrong = engine.wrong_blocks()
    assert wrong == 0
    assert checked > least
    stats = engine.manager.stats()
    if "ssd_slots" not in stats:                            # else a block of the index may be on either tier
        assert checked == stats["indexed_blocks"]           # all of them, not only those that were asked for
    assert not engine.side._requests
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == PAGES - 1          # no page is held for good
    engine.manager.check_integrity()
    return failing.num_failed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("mode", "depth", "per_step"), MODES)
def test_nothing_wrong_is_answered_or_kept(engines: Any, mode: str, depth: int, per_step: float, ranks: int) -> None:
    engine = engines(depth, ranks, layerwise_loads=mode)
    assert expect_right(engine, 80, 5, per_step) > 0
    assert (engine.side.stats()["layerwise_loads"] > 3) == (mode != "never" and depth == 1)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_nothing_wrong_comes_from_ssd(engines: Any, tmp_path: Path, mode: str) -> None:
    engine = engines(
        slots=60, layerwise_loads=mode, ssd_cache_gb=0.05, ssd_cache_dir=str(tmp_path / "ssd"), ssd_admission="all",
        load_policy="always",
    )
    def write() -> None:                        # before the small host tier evicts the blocks
        until(lambda: engine.manager.stats().get("ssd_queued_blocks") == 0, 20.0)

    assert expect_right(engine, 60, 6, pace=write) > 0
    assert engine.manager.stats()["ssd_store_blocks_read"] > 0


@pytest.mark.nightly
@pytest.mark.parametrize("save_mode", ["as_computed", "at_finish"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("mode", "depth", "per_step"), MODES)
def test_nothing_wrong_is_answered_or_kept_over_a_night(
    engines: Any, mode: str, depth: int, per_step: float, ranks: int, save_mode: str
) -> None:
    rounds = max(1, NIGHTLY // 24 // 80)
    for seed in range(100, 100 + rounds):
        engine = engines(depth, ranks, seed=seed, layerwise_loads=mode, save_mode=save_mode)
        expect_right(engine, 80, seed, per_step, share=0.05 if seed % 2 else 0.3)
        engine.close()
