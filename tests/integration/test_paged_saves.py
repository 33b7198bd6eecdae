"""Saves around vLLM's real scheduler. Each test is a situation in which one rule of the ledger keeps wrong KV out."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.paged_engine import PagedEngine
from tests.integration.paged_model import BLOCK, answer
from tests.integration.test_paged_cases import LONG, PREFIX, ask, fill


def test_a_request_without_keys_beside_a_load_that_its_step_computes_behind(
    engines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM has a prefix of the request in its own cache, and FlexKV cannot say whether the load is of that."""
    engine = engines(layerwise_loads="always")
    logging.getLogger("flexkv").addHandler(caplog.handler)
    fill(engine)
    cached = list(range(200, 200 + 4 * BLOCK))
    ask(engine, "before", [*cached, 7])
    engine.add("loads", [*PREFIX, 8], 6)
    engine.add("no keys", [*cached, *([-7] * BLOCK)], 6)
    engine.run()
    for name in ("loads", "no keys"):
        assert engine.answers[name] == answer(engine.prompts[name][0], 6)
    assert not [one for one in caplog.records if one.levelname == "CRITICAL"]
    assert engine.side.stats()["layerwise_loads"] == 1


def wrong_answers_of(engine: PagedEngine) -> list[str]:
    """Requests whose answer, as far as there is one, is not the model's."""
    return [name for name, got in engine.answers.items() if got != answer(engine.prompts[name][0], len(got))]


def hold(engine: PagedEngine, monkeypatch: pytest.MonkeyPatch, kind: str) -> Callable[[], None]:
    """Copies of one kind, "load" or "save", do not start before the returned function is called."""
    client = engine.workers[0].connector._flexkv_connector.worker._client
    advance, held = client.advance_fence, 0

    def hold_back(**fences: Any) -> None:
        nonlocal held
        held = max(held, fences.pop(kind, None) or 0)
        advance(**fences)

    def let_go() -> None:
        monkeypatch.setattr(client, "advance_fence", advance)
        advance(**{kind: held})

    monkeypatch.setattr(client, "advance_fence", hold_back)
    return let_go


def use_all_free_pages(engine: PagedEngine) -> None:
    """Compute over every page that is free, without saving it; the last request still runs then."""
    engine.side._may_save = False
    for name, num_blocks, tokens in (("s", 30, 1), ("t", 40, 3 * BLOCK)):
        engine.add(name, [400 + len(engine.answers)] * (num_blocks * BLOCK), tokens)
        for _ in range(20):
            engine.step()
        assert engine.answers[name]
    engine.side._may_save = True


@pytest.mark.parametrize("ending", ["preempted", "preempted and aborted", "aborted", "finished"])
def test_pages_are_not_given_to_others_while_they_are_saved(
    engines: Any, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """The saves are accepted, and have not begun to copy, when their request loses its pages."""
    engine = engines()
    let_go = hold(engine, monkeypatch, "save")
    engine.add("r", LONG, 1 if ending == "finished" else 40)
    engine.step()
    assert (len(engine.side._outstanding) > 0, engine.side._steps._steps) == (True, deque())
    if "preempted" in ending:
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    if "aborted" in ending:
        engine.abort("r")
    use_all_free_pages(engine)
    let_go()
    engine.run()
    assert wrong_answers_of(engine) == []
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked >= len(PREFIX) // BLOCK) == (0, True)


def test_pages_are_not_given_to_others_while_they_are_loaded_for_a_request_that_is_aborted(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(layerwise_loads="never")
    fill(engine)
    let_go = hold(engine, monkeypatch, "load")
    engine.add("r", [*PREFIX, 8], 6)
    engine.step()
    engine.abort("r")
    use_all_free_pages(engine)
    let_go()
    engine.run()
    assert wrong_answers_of(engine) == []
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked >= len(PREFIX) // BLOCK) == (0, True)
