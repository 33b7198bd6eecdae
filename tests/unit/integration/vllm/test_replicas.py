"""Which ranks of vLLM have equal KV."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.integration.vllm.replicas import copy_name


def config(ranks: int, heads: int, use_mla: bool = False) -> Any:
    model = SimpleNamespace(use_mla=use_mla, get_total_num_kv_heads=lambda: heads)
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=ranks))


@pytest.mark.parametrize(("ranks", "heads", "use_mla", "names"), [
    (1, 8, False, [None]), (1, 1, True, [None]), (2, 8, False, [None] * 2), (8, 8, False, [None] * 8),
    (2, 1, True, ["all ranks"] * 2), (4, 16, True, ["all ranks"] * 4),
    (4, 1, False, ["head 0"] * 4), (4, 2, False, ["head 0", "head 0", "head 1", "head 1"]),
    (6, 4, False, [None] * 6),
])
def test_names(ranks: int, heads: int, use_mla: bool, names: list[str | None]) -> None:
    assert [copy_name(config(ranks, heads, use_mla), rank) for rank in range(ranks)] == names
