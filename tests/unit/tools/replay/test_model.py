"""The table of models."""

from pathlib import Path

import pytest

from flexkv.errors import ConfigError
from flexkv.tools.replay.model import MODELS, find_model


def test_known_figures() -> None:
    assert find_model("meta-llama/Llama-3.1-8B-Instruct").kv_bytes_per_token == 128 << 10
    assert find_model("meta-llama/Meta-Llama-3.1-8B") == find_model("llama-3.1-8b")
    assert find_model("deepseek-ai/DeepSeek-V3").kv_bytes_per_token == 61 * 576 * 2
    assert 25_000 < find_model("llama-3.1-8b").prefill_tokens_per_s < 40_000
    assert all(model.kv_bytes_per_token > 0 < model.prefill_tokens_per_s for model in MODELS.values())


def test_an_unknown_model_is_named_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9'.*llama-3.1-8b.*--kv-bytes-per-token"):
        find_model("gpt-9")


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[4] / "docs" / "sizing.md").read_text()
    for name, model in MODELS.items():
        assert f"| `{name}` | {model.kv_bytes_per_token:,} | {model.prefill_tokens_per_s:,.0f} |" in page
