"""Reasons of tasks that moved nothing, in the terms of a user, with a remedy."""

from pathlib import Path

import numpy as np
import pytest

from flexkv import KVManager, KVTPClient, tensor_spec
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from tests.support.harness import TOKENS, local, mapping, tokens_of


def test_what_is_launched_before_a_rank_has_registered_is_not_a_success(tmp_path: Path) -> None:
    cache = CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=8)
    with KVManager(ModelConfig(), cache, gpu_register_port=str(tmp_path / "s"), transfer_config=TransferConfig()) as m:
        tokens = tokens_of(2)
        tasks = [m.put_match(tokens)[0], m.get_match(tokens)[0]]
        m.launch(tasks, [[], []])
        tasks += [m.prefetch_async(tokens), m.put_async(tokens, mapping([0, 1]))]
        for response in m.wait(tasks).values():
            assert response.status is Status.UNREADY
            assert "wait_ready" in response.reason
            assert response.return_mask is not None
            assert not response.return_mask.any()


def test_what_is_put_after_a_shutdown_is_not_a_success(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _):
        pass
    task, mask = manager.put_match(tokens_of(2))
    assert not mask.any()
    manager.launch(task, [])
    response = manager.wait(task)[task]
    assert response.status is Status.UNREADY
    assert "was shut down" in response.reason


def test_what_has_nothing_to_move_is_a_success_once_ranks_have_registered(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _):
        tokens = tokens_of(2)
        tasks = [manager.put_async(tokens[:3], mapping([0])[:3]), manager.get_async(tokens, mapping([0, 1])),
                 manager.prefetch_async(tokens)]
        for response in manager.wait(tasks).values():
            assert (response.status, response.reason) == (Status.SUCCESS, "")


@pytest.mark.parametrize("page_dim", [0, 1])
def test_a_page_that_the_tensors_do_not_have_is_named(
    tmp_path: Path, page_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    port = str(tmp_path / "s")
    cache = CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=8)
    kv = np.zeros((2, 8, TOKENS, 16), dtype=np.int16)           # K and V first, pages second
    with (
        KVManager(ModelConfig(), cache, gpu_register_port=port, transfer_config=TransferConfig()) as manager,
        KVTPClient(port, transfer_config=TransferConfig()) as client,
    ):
        client.register_tensors([tensor_spec(kv, page_dim)])
        manager.wait_ready(20.0)
        for pages in ([1, 7], [7, 1]):
            task = manager.put_async(tokens_of(2, seed=sum(pages) + pages[0]), mapping(pages))
            response = manager.wait(task)[task]
            if page_dim == 1:
                assert (response.status, response.reason) == (Status.SUCCESS, "")
                continue
            assert response.status is Status.FAILED
            said = "1 of 2 blocks were not moved: page 7 of a cache with 2 pages: is the first dimension"
            assert response.reason.startswith(said)
            assert "page_dim" in response.reason
            assert said in caplog.text
