"""Single situations around vLLM's real scheduler in which KV once was wrong, or the engine ended."""

import logging
from typing import Any

import pytest

from tests.integration.paged_engine import PagedEngine
from tests.integration.paged_model import BLOCK, answer
from tests.integration.workload import NO_PAGE, make_requests, serve, wrong_answers
from tests.support.harness import until

PREFIX = list(range(3, 3 + 4 * BLOCK))
LONG = PREFIX + list(range(100, 100 + 6 * BLOCK + 5))


def ask(engine: PagedEngine, name: str, prompt: list[int], tokens: int = 6) -> None:
    engine.add(name, prompt, tokens)
    engine.run()
    assert engine.answers[name] == answer(prompt, tokens)


def fill(engine: PagedEngine) -> None:
    """The prefix is cached, but not in the engine, whose pages hold something else."""
    ask(engine, "fill", [*PREFIX, 7])
    engine.forget()
    engine.add("other", [5] * (30 * BLOCK), 2, salt="other")
    engine.run()
    engine.forget()


def end_copies_with_their_step(engine: PagedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise blocks of a dropped save may still be copied when they are computed again: they are not saved then."""
    step = engine.step

    def step_and_copy() -> None:
        step()
        until(lambda: bool(engine._queue) or not engine.manager.tasks.unsettled())

    monkeypatch.setattr(engine, "step", step_and_copy)


class Loads:
    """Loads fail from a block on; counts them."""

    def __init__(self, engine: PagedEngine, first: int | None) -> None:
        self.count, self._first, self._real = 0, first, engine.manager.get_blocks
        engine.manager.get_blocks = self._get

    def _get(self, keys: Any, start: int, pages: Any, *args: Any, **more: Any) -> Any:
        self.count += 1
        pages = pages.copy()
        if self._first is not None:
            pages[self._first :] = NO_PAGE
        return self._real(keys, start, pages, *args, **more)

    def succeed(self) -> None:
        self._first = None


@pytest.mark.parametrize("first_failed", [0, 2, 3])
@pytest.mark.parametrize(("mode", "depth"), [("always", 1), ("always", 2), ("never", 1)])
def test_a_load_that_fails_leaves_nothing_wrong(
    engines: Any, monkeypatch: pytest.MonkeyPatch, mode: str, depth: int, first_failed: int
) -> None:
    engine = engines(depth, layerwise_loads=mode)
    end_copies_with_their_step(engine, monkeypatch)
    fill(engine)
    loads = Loads(engine, first_failed)
    ask(engine, "first", LONG)
    assert loads.count == 1
    loads.succeed()
    engine.forget()
    assert engine.wrong_blocks()[1] == 0
    hits = engine.side.stats()["hit_tokens"]
    ask(engine, "again", LONG)
    assert engine.side.stats()["hit_tokens"] == hits + 10 * BLOCK      # what was computed instead was saved


@pytest.mark.parametrize("first_failed", [0, 2])
def test_requests_that_share_the_pages_of_a_failed_load(engines: Any, first_failed: int) -> None:
    """In the same step, in the next one, and when the request that was to compute them again has gone."""
    engine = engines(layerwise_loads="always")
    fill(engine)
    loads = Loads(engine, first_failed)
    engine.add("first", LONG, 6)
    engine.add("same step", [*PREFIX, 9, 9, 9], 6)
    engine.step()
    engine.abort("first")
    engine.add("later", [*LONG[:-3], 4], 6)
    engine.run()
    for name in ("same step", "later"):
        assert engine.answers[name] == answer(engine.prompts[name][0], 6)
    loads.succeed()
    assert engine.wrong_blocks()[1] == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_reset_with_steps_in_flight_leaves_nothing(engines: Any, depth: int) -> None:
    engine = engines(depth)
    engine.add("r", LONG, 40)
    for _ in range(9):
        engine.step()
    assert engine.side.reset_cache()
    engine.run()
    assert engine.answers["r"] == answer(LONG, 40)
    assert engine.wrong_blocks() == (0, 0)                      # computed with the weights of before, for all it knows


@pytest.mark.parametrize("depth", [1, 2])
def test_the_failed_load_of_another_connector(engines: Any, depth: int) -> None:
    """With steps in flight vLLM itself answers over what has failed; nothing of that is kept."""
    peer = {
        "kv_connector": "FailingPeer", "kv_connector_module_path": "tests.integration.failing_peer",
        "kv_role": "kv_both",
    }
    engine = engines(depth, beside=peer)
    requests = make_requests(40, 3)
    serve(engine, requests)
    if depth == 1:
        assert wrong_answers(engine, requests) == []
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked > 50) == (0, True)


def test_a_request_that_skips_the_cache_is_offered_nothing(engines: Any) -> None:
    engine = engines()
    fill(engine)
    before = engine.manager.stats()
    request = engine.request("r", [*PREFIX, 5], 3)
    request.skip_reading_prefix_cache = True
    assert engine.side.get_num_new_matched_tokens(request, 0) == (0, False)
    engine.side.on_new_request(request)
    assert not engine.side._prefetches
    assert engine.manager.stats() == before


@pytest.mark.parametrize(
    "hook",
    ["get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "step_reported", "step_ended",
     "request_finished"],
)
@pytest.mark.parametrize(("mode", "depth"), [("always", 1), ("never", 2)])
def test_an_error_in_the_scheduler_turns_caching_off(
    engines: Any, caplog: pytest.LogCaptureFixture, hook: str, mode: str, depth: int
) -> None:
    engine = engines(depth, layerwise_loads=mode)
    expect_engine_goes_on(engine, engine.side, hook, caplog)


@pytest.mark.parametrize("hook", ["start_load", "wait_for_layer", "wait_for_save", "get_finished", "take_failed_pages"])
@pytest.mark.parametrize(("mode", "depth"), [("always", 1), ("never", 2)])
def test_an_error_in_a_worker_turns_caching_off(
    engines: Any, caplog: pytest.LogCaptureFixture, hook: str, mode: str, depth: int
) -> None:
    engine = engines(depth, ranks=2, layerwise_loads=mode)
    side = engine.workers[1].connector._flexkv_connector.worker
    expect_engine_goes_on(engine, side, hook, caplog)


def expect_engine_goes_on(engine: PagedEngine, side: Any, hook: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flexkv").addHandler(caplog.handler)
    fill(engine)
    calls, real = 0, getattr(side, hook)

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ZeroDivisionError("a fault of ours")
        return real(*args)

    setattr(side, hook, broken)
    requests = make_requests(30, 4)
    serve(engine, requests)
    assert wrong_answers(engine, requests) == []
    assert calls == 5
    assert len({id(one) for one in caplog.records if one.levelname == "CRITICAL"}) == 1
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
