"""Which ranks of vLLM have equal KV."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.integration.vllm.replicas import copy_name


def config(ranks: int, heads: int, use_mla: bool = False, shares: int = 1) -> Any:
    model = SimpleNamespace(use_mla=use_mla, get_total_num_kv_heads=lambda: heads)
    parallel = SimpleNamespace(tensor_parallel_size=ranks, decode_context_parallel_size=shares)
    return SimpleNamespace(model_config=model, parallel_config=parallel)


@pytest.mark.parametrize(("ranks", "heads", "use_mla", "names"), [
    (1, 8, False, [None]), (1, 1, True, [None]), (2, 8, False, [None] * 2), (8, 8, False, [None] * 8),
    (2, 1, True, ["all ranks"] * 2), (4, 16, True, ["all ranks"] * 4),
    (4, 1, False, ["head 0"] * 4), (4, 2, False, ["head 0", "head 0", "head 1", "head 1"]),
    (6, 4, False, [None] * 6),
])
def test_names(ranks: int, heads: int, use_mla: bool, names: list[str | None]) -> None:
    assert [copy_name(config(ranks, heads, use_mla), rank) for rank in range(ranks)] == names


@pytest.mark.parametrize(("ranks", "heads", "use_mla", "shares", "names"), [
    (2, 1, False, 2, [None] * 2), (4, 2, False, 2, [None] * 4), (4, 1, False, 4, [None] * 4),
    (4, 1, True, 4, [None] * 4),
    (4, 1, False, 2, ["head 0, share 0", "head 0, share 1"] * 2),
    (4, 16, True, 2, ["all ranks, share 0", "all ranks, share 1"] * 2),
    (8, 2, False, 2, [f"head {head}, share {share}" for head in (0, 1) for _ in range(2) for share in (0, 1)]),
])
def test_ranks_that_store_different_tokens_are_no_copies(
    ranks: int, heads: int, use_mla: bool, shares: int, names: list[str | None]
) -> None:
    engine = config(ranks, heads, use_mla, shares)
    assert [copy_name(engine, rank, rank % shares) for rank in range(ranks)] == names


@pytest.mark.parametrize(("use_mla", "draft_heads", "draft_mla", "is_copy"), [
    (True, 8, False, False), (True, 16, True, True), (False, 8, False, False), (False, 4, False, True),
    (False, 4, True, False),
])
def test_layers_of_a_draft_with_other_heads_are_no_copies(
    use_mla: bool, draft_heads: int, draft_mla: bool, is_copy: bool
) -> None:
    engine = config(8, 4, use_mla)
    draft = SimpleNamespace(use_mla=draft_mla, get_total_num_kv_heads=lambda: draft_heads)
    engine.speculative_config = SimpleNamespace(draft_model_config=draft)
    assert (copy_name(engine, 0) is not None) == is_copy


@pytest.mark.parametrize("text", [{"block_configs": []}, {"num_key_value_heads": [4, 8]}])
def test_a_model_whose_layers_have_different_heads_has_no_copies(text: dict[str, Any]) -> None:
    engine = config(8, 4)
    engine.model_config.hf_text_config = SimpleNamespace(**text)
    assert copy_name(engine, 0) is None
