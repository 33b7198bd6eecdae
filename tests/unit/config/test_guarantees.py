"""Guarantees of models: how they are written, and those that cannot be kept."""

from typing import Any

import pytest

from flexkv.config import CacheConfig
from flexkv.config.guarantees import read_guarantees
from flexkv.errors import ConfigError

GIB = 1 << 30


def test_guarantees_are_gib_by_model() -> None:
    assert read_guarantees({"llama": 2, "org/qwen": "0.5", "big": "3 GiB"}) == {
        "llama": 2 * GIB, "org/qwen": GIB // 2, "big": 3 * GIB
    }


@pytest.mark.parametrize(("model", "value"), [("a", 0), ("a", -1), ("a", True), ("a", [1]), ("a", float("nan")),
                                              ("", 1), (3, 1), ("a\0", 1)])
def test_what_is_no_guarantee_is_refused(model: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match="server_guarantees"):
        read_guarantees({model: value})


@pytest.mark.parametrize(("settings", "remedy"), [
    ({"server_max_pools": 1}, "set server_max_pools to 2"),
    ({"server_max_pools": 4, "server_guarantees": {"a": 0.6, "b": 0.5}}, "lower some, or raise cpu_cache_gb"),
    ({"server_max_pools": 2, "server_guarantees": {"a": 0.1, "b": 0.1, "c": 0.1}}, "set server_max_pools to 4"),
    ({"server_max_pools": 2, "num_cpu_blocks": 10}, "instead of num_cpu_blocks"),
    ({"server_max_pools": 2, "use_hugepage_cpu_buffer": True}, "use_hugepage_cpu_buffer off"),
])
def test_guarantees_that_cannot_be_kept_are_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        CacheConfig(**{"cpu_cache_gb": 1.0, "server_guarantees": {"a": 0.5}, **settings})


def test_guarantees_may_take_all_memory() -> None:
    config = CacheConfig(cpu_cache_gb=1.0, server_max_pools=2, server_guarantees={"a": 0.5, "b": 0.5})
    assert sum(config.guarantees.values()) == GIB
