"""Which engines with context parallelism are supported, and how many tokens a page stands for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv.integration.vllm.context_parallel import (
    interleave_size,
    layout_name,
    num_shares,
    page_tokens,
    share_of_rank,
    unsupported_context,
)
from flexkv.integration.vllm.support import unsupported
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from tests.support.vllm_stub import request, vllm_config


def engine(dcp: int = 2, tp: int = 4, heads: int = 1, interleave: int = 1, **changes: Any) -> Any:
    """An engine with blocks of 4 tokens."""
    return vllm_config(
        parallel_config__decode_context_parallel_size=dcp, parallel_config__tensor_parallel_size=tp,
        parallel_config__cp_kv_cache_interleave_size=interleave,
        model_config__get_total_num_kv_heads=lambda: heads, **changes,
    )


@pytest.mark.parametrize(
    ("dcp", "tp", "heads", "interleave"),
    [(2, 2, 1, 1), (2, 4, 1, 1), (2, 4, 2, 2), (4, 4, 1, 4), (2, 8, 2, 1), (3, 6, 2, 1)],
)
def test_supported_engines(dcp: int, tp: int, heads: int, interleave: int) -> None:
    config = engine(dcp, tp, heads, interleave)
    assert unsupported(config) is None
    assert (num_shares(config), page_tokens(config)) == (dcp, 4 * dcp)
    assert layout_name(config) == f"dcp {dcp} interleave {interleave}"


@pytest.mark.parametrize(("config", "reason"), [
    (engine(2, 3), "divisors of tensor_parallel_size, which is 3"),
    (engine(0, 2), "decode_context_parallel_size is 0"),
    (engine(2, 4, 4), "with 4 KV heads on 4 tensor-parallel ranks"),
    (engine(2, 6, 2), "no common head"),
    (engine(2, 4, 3), "no common head"),
    (engine(interleave=3), "cp_kv_cache_interleave_size is 3"),
    (engine(interleave=8), "divisors of the block size, which is 4"),
    (engine(interleave=0), "cp_kv_cache_interleave_size is 0"),
    (engine(parallel_config__dcp_kv_cache_interleave_size=3), "cp_kv_cache_interleave_size is 3"),
    (engine(kv_transfer_config__has_connector=lambda name: name == "NixlConnector"), "NixlConnector changes"),
    (engine(1, parallel_config__prefill_context_parallel_size=2), "prefill_context_parallel_size is 2"),
    (engine(2, parallel_config__prefill_context_parallel_size=2), "prefill_context_parallel_size is 2"),
])
def test_engines_that_are_not_supported(config: Any, reason: str) -> None:
    assert reason in str(unsupported_context(config))
    assert unsupported(config) == unsupported_context(config)


def test_without_context_parallelism_nothing_changes() -> None:
    config = engine(1, 4, 4, interleave=3)                      # the interleave has no effect
    assert unsupported_context(config) is None
    assert (num_shares(config), page_tokens(config), layout_name(config), share_of_rank(config)) == (1, 4, "", 0)
    del config.parallel_config.decode_context_parallel_size     # a vLLM without it
    assert (num_shares(config), unsupported_context(config)) == (1, None)


def test_mla_has_one_head_for_all_ranks() -> None:
    assert unsupported_context(engine(4, 4, 128, model_config__use_mla=True)) is None
    assert unsupported_context(engine(2, 4, 128, model_config__use_mla=True)) is None


def test_the_older_setting_overrides_the_interleave() -> None:
    """vLLM does that in the workers, after the scheduler has read its configuration."""
    assert interleave_size(engine(interleave=2, parallel_config__dcp_kv_cache_interleave_size=4)) == 4
    assert interleave_size(engine(interleave=2, parallel_config__dcp_kv_cache_interleave_size=1)) == 2


def test_the_share_is_the_rank_in_vllms_group() -> None:
    with patch("vllm.distributed.parallel_state.get_dcp_group", lambda: SimpleNamespace(rank_in_group=3)):
        assert share_of_rank(engine(4, 4)) == 3


def test_keys_are_of_pages_of_all_shares(tmp_path: Path) -> None:
    config = engine(2, 2)
    config.kv_transfer_config.kv_connector_extra_config["gpu_register_port"] = str(tmp_path / "s")
    adapter = FlexKVConnectorV1Impl(config, KVConnectorRole.SCHEDULER)
    try:
        first, second = ([1, 2, 3, 4, *[last] * 4] for last in (5, 6))       # equal in the first block of a rank
        keys = [adapter.scheduler._track(request(str(tokens), tokens)).keys() for tokens in (first, second)]
        assert [len(key) for key in keys] == [1, 1]
        assert keys[0].tobytes() != keys[1].tobytes()
        assert adapter._scheduler._block_size == 8
    finally:
        adapter.shutdown()
