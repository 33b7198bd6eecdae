"""Odd requests and orders of hooks around vLLM's real scheduler: no wrong KV, and caching goes on."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from tests.integration.paged_engine import PagedEngine
from tests.integration.paged_model import BLOCK, answer
from tests.integration.test_paged_cases import LONG, PREFIX, ask, fill
from tests.integration.workload import make_requests, serve, wrong_answers

PEER = {
    "kv_connector": "FailingPeer", "kv_connector_module_path": "tests.integration.failing_peer", "kv_role": "kv_both",
}


def expect_caching(engine: PagedEngine) -> None:
    """What is asked for twice is loaded the second time."""
    engine.forget()
    ask(engine, "one", LONG)
    engine.forget()
    hits = engine.side.stats()["hit_tokens"]
    ask(engine, "two", LONG)
    assert engine.side.stats()["hit_tokens"] >= hits + 10 * BLOCK


@pytest.mark.parametrize("new_weights", [False, True])
def test_a_reset_that_preempts_what_runs(engines: Any, new_weights: bool) -> None:
    """The requests are preempted and resumed in the same step, and their pages of then are others."""
    engine = engines()
    prompts = {"r": LONG, "s": [*PREFIX, *([9] * 9)]}
    for name, prompt in prompts.items():
        engine.add(name, prompt, 60)
    for _ in range(9):
        engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    if new_weights:
        assert engine.side.reset_cache()
    engine.run()
    for name, prompt in prompts.items():
        assert engine.answers[name] == answer(prompt, 60)
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked > 10) == (0, not new_weights)        # after new weights, none under keys of the old ones
    expect_caching(engine)


def test_a_preemption_that_is_not_listed(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.23 does not list the requests that a reset has preempted."""
    engine = engines()
    side, dropped, real = engine.side, [], engine.side.build_connector_meta
    drop_puts = side._drop_puts

    def build(output: Any) -> Any:
        output.preempted_req_ids = set()
        return real(output)

    def drop(task_ids: Any = None) -> None:
        dropped.append(task_ids)
        drop_puts(task_ids)

    monkeypatch.setattr(side, "build_connector_meta", build)
    monkeypatch.setattr(side, "_drop_puts", drop)
    engine.add("r", LONG, 40)
    for _ in range(5):
        engine.step()
    saves = set(side._requests["r"].saves)
    assert saves
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.step()
    assert len(dropped) == 1
    engine.run()
    assert len(dropped) == 1
    assert engine.answers["r"] == answer(LONG, 40)
    assert engine.wrong_blocks()[1] == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_are_not_shown_for_what_another_connector_loads(
    engines: Any, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """A MultiConnector of vLLM 0.23 gives a request's pages to the connector that loads, and none to the others."""
    nothing = SimpleNamespace(get_block_ids=lambda: ([],))

    def update_state_after_alloc(self: Any, request: Any, blocks: Any, num_external_tokens: int) -> None:
        chosen = self._requests_to_connector.get(request.request_id, -1)
        for i, connector in enumerate(self._connectors):
            given = (blocks, num_external_tokens) if i == chosen else (nothing, 0)
            connector.update_state_after_alloc(request, *given)

    monkeypatch.setattr(MultiConnector, "update_state_after_alloc", update_state_after_alloc)
    engine = engines(depth, beside=PEER)
    requests = make_requests(40, 5)
    serve(engine, requests)
    if depth == 1:
        assert wrong_answers(engine, requests) == []
    checked, wrong = engine.wrong_blocks()
    assert (wrong, checked > 50) == (0, True)


def test_a_request_whose_keys_cannot_be_computed_is_alone_without_cache(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.23, and any vLLM without a tokenizer, lets negative tokens through."""
    engine = engines()
    for number, tokens in enumerate(([-7] * 40, [3] * 40 + [1 << 40] * 20)):
        request = engine.request(f"bad {number}", tokens, 3)
        engine.side.on_new_request(request)
        assert engine.side.get_num_new_matched_tokens(request, 0) == (0, False)
        engine.side.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)), 0)
        engine.side._save(engine.side._requests[request.request_id], 48)
        assert not engine.side._requests[request.request_id].saves
        engine.side.request_finished(request, [])
    expect_caching(engine)


def test_keys_that_are_gone_when_the_offered_load_starts(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the files of a LoRA change between the two calls: the offered blocks are loaded, and nothing is saved."""
    engine = engines()
    fill(engine)
    real = engine.side.update_state_after_alloc

    def update(request: Any, blocks: Any, num_external_tokens: int) -> None:
        if request.request_id == "r":
            engine.side._requests["r"]._has_keys = False
        real(request, blocks, num_external_tokens)

    monkeypatch.setattr(engine.side, "update_state_after_alloc", update)
    hits = engine.side.stats()["hit_tokens"]
    ask(engine, "r", [*PREFIX, 8])
    assert engine.side.stats()["hit_tokens"] == hits + 4 * BLOCK
    assert engine.wrong_blocks()[1] == 0
    expect_caching(engine)
