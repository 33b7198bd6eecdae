"""The scheduler's side with blocks on SSD: they are read while the request waits, and loaded with the others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexkv.config import ConnectorConfig
from flexkv.integration.vllm.scheduler import SchedulerSide
from tests.support.harness import TOKENS, until
from tests.support.ssd_stage import Stage, stage

BLOCKS = 5


def request(seed: int, extra: int = 2) -> Any:
    """As much of a vLLM request as is looked at."""
    tokens = np.random.default_rng(seed).integers(0, 50_000, BLOCKS * TOKENS).tolist() + [1] * extra
    return SimpleNamespace(
        request_id=f"r{seed}", lora_request=None, cache_salt=None, prompt_embeds=None, prompt_token_ids=tokens,
        all_token_ids=tokens, num_tokens=len(tokens), mm_features=(),
    )


def side_of(made: Stage) -> SchedulerSide:
    made.put(BLOCKS, 1)
    made.flood()
    return SchedulerSide(made.manager.blocks, TOKENS, ConnectorConfig(layerwise_loads="always"))


def test_a_queued_request_is_read_ahead(tmp_path: Path) -> None:
    with stage(tmp_path) as made:
        side, queued = side_of(made), request(1)
        side.on_new_request(queued)
        side.on_new_request(request(2))                         # of which nothing is there
        until(lambda: made.manager.blocks.lookup(made.keys(BLOCKS, 1)).num_to_fetch == 0)
        assert made.store.num_reads == BLOCKS
        assert side.get_num_new_matched_tokens(queued, 0) == (BLOCKS * TOKENS, False)    # layer by layer, by now
        side._collect()
        assert not side._prefetches


@pytest.mark.parametrize("num_computed", [0, 2 * TOKENS])
def test_a_request_that_is_considered_is_read_ahead_too(tmp_path: Path, num_computed: int) -> None:
    with stage(tmp_path) as made:
        side, queued = side_of(made), request(1)
        made.store.held = True
        for _ in range(3):                                      # there may be no room for it yet
            offered = side.get_num_new_matched_tokens(queued, num_computed)
            assert offered == (BLOCKS * TOKENS - num_computed, True)
        assert made.manager.stats()["full_hits"] == 1           # counted once
        assert made.store.num_waiting == BLOCKS - num_computed // TOKENS      # the engine has the others
        pages = list(range(32, 32 + BLOCKS))
        blocks = SimpleNamespace(get_block_ids=lambda: (pages,))
        made.tensors.zero()
        made.client.advance_fence(1)
        side.update_state_after_alloc(queued, blocks, offered[0])
        made.store.release()
        made.settle()
        task = side._loads[0].task_id
        assert made.manager.wait(task)[task].status.value == "success"
        first = num_computed // TOKENS
        size = len(made.contents[1]) // BLOCKS
        assert made.tensors.read(pages[first:]) == made.contents[1][first * size :]
        assert made.store.num_reads == BLOCKS - first


def test_a_request_is_recorded_once_however_often_it_is_considered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stage(tmp_path) as made:
        side = side_of(made)
        recorded: list[int] = []
        monkeypatch.setattr(made.manager.blocks, "record_request", lambda keys: recorded.append(len(keys)))
        first, second = request(1), request(2, extra=2 * TOKENS)
        side.on_new_request(first)
        for asked in (first, second, first, second):
            side.get_num_new_matched_tokens(asked, 0)
        assert recorded == [BLOCKS, BLOCKS + 2]
