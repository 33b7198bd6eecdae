"""Saves around vLLM's real scheduler. Each test is a situation in which one rule of the ledger keeps wrong KV out."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import PAGES
from tests.integration.failing_peer import BLOCKS
from tests.integration.paged_engine import PagedEngine
from tests.integration.paged_model import BLOCK, answer
from tests.integration.test_paged_cases import LONG, PREFIX, Loads, ask, end_copies_with_their_step, fill
from tests.integration.test_paged_requests import PEER

BUDGET = 16
"""Blocks that a step computes at most."""


def test_a_page_that_was_computed_behind_a_failed_load_is_followed_beyond_its_request(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request computes all but the last of these pages again, and is aborted. vLLM offers them to others."""
    engine = engines(layerwise_loads="always")
    end_copies_with_their_step(engine, monkeypatch)
    fill(engine)
    prompt = PREFIX + list(range(100, 100 + BUDGET * BLOCK))
    loads = Loads(engine, 3)
    engine.add("first", [*prompt, 9], 6)
    for _ in range(2):                                          # blocks 4 to 19 behind the load, then 3 to 18 again
        engine.step()
    engine.abort("first")
    loads.succeed()
    ask(engine, "second", [*prompt, 8, 8])
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked >= len(prompt) // BLOCK) == (0, True)


def test_what_another_request_computed_over_the_failed_load_of_another_connector(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares the pages of that load in the same step, and is aborted. The load's own request computes them again."""
    engine = engines(beside=PEER)
    end_copies_with_their_step(engine, monkeypatch)
    engine.add("r0", [*PREFIX[: BLOCKS * BLOCK], 7], 12)        # the peer offers its blocks, and they fail
    engine.add("r1", [*LONG, 9], 6)
    engine.step()
    engine.abort("r1")
    engine.step()
    ask(engine, "r2", [*LONG, 8, 8])
    assert engine.answers["r0"] == answer(engine.prompts["r0"][0], 12)
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked >= len(LONG) // BLOCK) == (0, True)


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


def test_the_fall_back_of_a_save_covers_pages_that_have_become_bad(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save finds no room, so the next one begins at block 0 again. Afterwards the load that all these pages
    are computed over is reported as failed."""
    engine = engines(2, beside=PEER)
    put_blocks, starts = engine.manager.put_blocks, []

    def put(keys: Any, start: int, *args: Any, **more: Any) -> Any:
        starts.append(start)
        return None if len(starts) == 1 else put_blocks(keys, start, *args, **more)

    monkeypatch.setattr(engine.manager, "put_blocks", put)
    prompt = PREFIX[: BLOCKS * BLOCK] + list(range(100, 100 + (BUDGET + 2) * BLOCK))
    engine.add("r0", [*prompt, 9], 2)
    engine.schedule()                                           # computes blocks 3 to 18
    engine.schedule()                                           # computes blocks 19 and 20
    assert starts == [0, BUDGET + BLOCKS, 0]
    for _ in range(2):
        engine.execute()
        engine.end_step()
    assert engine.wrong_blocks() == (0, 0)


def test_a_save_from_bad_pages_that_are_loaded_into_before_it_is_decided(engines: Any) -> None:
    """vLLM 0.23 frees the pages of an aborted request while a step in flight uses them, and the next step may load into
    them. The pages are good then, but the blocks that were saved from them before are not."""
    engine = engines(2, beside=PEER)
    engine.scheduler.defer_block_free = False
    big = [499 - i % 400 for i in range((PAGES - 1) * BLOCK)]               # all pages
    ask(engine, "r3", big, 1)
    engine.forget()
    engine.add("r0", [*PREFIX[: BLOCKS * BLOCK], 7], 60)        # its load by the peer fails
    engine.schedule()
    engine.add("r1", LONG, 60)                                  # computes blocks 3 to 9 over it; vLLM keeps them
    engine.schedule()
    for _ in range(2):
        engine.execute()
        engine.end_step()
    engine.settle()
    engine.schedule()                                           # saves the blocks of "r1"
    assert len(engine.side._steps._steps[-1].puts) > 0
    engine.execute()
    engine.settle()
    used = set(engine.side._requests["r1"].pages.tolist())
    engine.abort("r0")
    engine.abort("r1")
    engine.add("r2", big, 1)
    engine.schedule()
    assert used <= set(engine.side._requests["r2"].pages.tolist())
    engine.run()
    assert engine.answers["r2"] == answer(big, 1)
    assert engine.wrong_blocks() == (PAGES - 1, 0)


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

    def release() -> None:
        monkeypatch.setattr(client, "advance_fence", advance)
        advance(**{kind: held})

    monkeypatch.setattr(client, "advance_fence", hold_back)
    return release


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
    release = hold(engine, monkeypatch, "save")
    engine.add("r", LONG, 1 if ending == "finished" else 40)
    engine.step()
    assert (len(engine.side._outstanding) > 0, engine.side._steps._steps) == (True, deque())
    if "preempted" in ending:
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    if "aborted" in ending:
        engine.abort("r")
    use_all_free_pages(engine)
    release()
    engine.run()
    assert wrong_answers_of(engine) == []
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked >= len(PREFIX) // BLOCK) == (0, True)


def test_pages_are_not_given_to_others_while_they_are_loaded_for_a_request_that_is_aborted(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(layerwise_loads="never")
    fill(engine)
    release = hold(engine, monkeypatch, "load")
    engine.add("r", [*PREFIX, 8], 6)
    engine.step()
    engine.abort("r")
    use_all_free_pages(engine)
    release()
    engine.run()
    assert wrong_answers_of(engine) == []
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked >= len(PREFIX) // BLOCK) == (0, True)
