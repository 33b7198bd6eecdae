"""The setting of namespaces: where it comes from, and how a wrong one is refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import load_config
from flexkv.config.namespaces import Quota
from flexkv.errors import ConfigError

SMALL = {"cpu_cache_gb": 0.5}


def test_quotas_come_from_a_file_a_variable_or_the_engine(tmp_path: Path) -> None:
    expected = {"gold": Quota(0.5, priority=2), "": Quota(limit=0.25, ttl_s=600)}
    (tmp_path / "c.yml").write_text(
        "cpu_cache_gb: 0.5\nnamespaces:\n  gold: {guaranteed: 0.5, priority: 2}\n  default: {limit: 0.25, ttl_s: 600}\n"
    )
    assert load_config(tmp_path / "c.yml", env={}).cache.quotas == expected
    as_json = '{"gold": {"guaranteed": 0.5, "priority": 2}, "": {"limit": 0.25, "ttl_s": 600}}'
    for text in (as_json, "gold: {guaranteed: 0.5, priority: 2}\ndefault: {limit: 0.25, ttl_s: 600, }"):
        assert load_config(env={"FLEXKV_NAMESPACES": text}, **SMALL).cache.quotas == expected
    given = {"gold": {"guaranteed": 0.5, "priority": 2}, "default": {"limit": 0.25, "ttl_s": 600}}
    assert load_config(env={}, namespaces=given, **SMALL).cache.quotas == expected
    assert load_config(env={}, **SMALL).cache.quotas == {}
    assert load_config(env={}, namespaces={"a": {}}, **SMALL).cache.quotas == {"a": Quota(0.0, 1.0, 0, math.inf)}


@pytest.mark.parametrize(
    ("namespaces", "message"),
    [
        ([1], r"namespaces = \[1\]: must be a mapping"),
        ({7: {}}, "namespaces = 7: a name must be text"),
        ({"a": 0.5}, "namespaces: a = 0.5: must be a mapping with some of guaranteed, limit"),
        ({"a": {"limits": 0.5}}, "namespaces: a: limits = 0.5: .*did you mean limit"),
        ({"a": {"limit": "half"}}, "namespaces: a: limit = 'half': must be a number"),
        ({"a": {"limit": True}}, "must be a number"),
        ({"a": {"priority": 1.5}}, "namespaces: a: priority = 1.5: must be a whole number"),
        ({"a": {"guaranteed": 0.5, "limit": 0.4}}, "0 <= guaranteed <= limit <= 1"),
        ({"a": {"limit": 0}}, "limit and ttl_s > 0"),
        ({"a": {"limit": 1.1}}, "<= 1"),
        ({"a": {"guaranteed": math.nan}}, "0 <= guaranteed"),
        ({"a": {"ttl_s": 0}}, "ttl_s > 0"),
        ({"a": {"ttl_s": math.nan}}, "ttl_s > 0"),
        ({"": {}, "default": {}}, "the same as ''"),
        ({"a": {"guaranteed": 0.6}, "b": {"guaranteed": 0.6}}, "1.2 guaranteed in all"),
    ],
)
def test_wrong_quotas_are_named(namespaces: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env={}, namespaces=namespaces, **SMALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{a: ", "FLEXKV_NAMESPACES = .*JSON or YAML"), ("gold", "must be a mapping"),
     ('{"a": {}, "a": {}}', "FLEXKV_NAMESPACES: a: is given twice"),
     ("{a: {limit: 1, limit: 2}}", "limit: is given twice, again in line 1")],
)
def test_wrong_text_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env={"FLEXKV_NAMESPACES": text}, **SMALL)


def test_the_share_of_pins_has_bounds() -> None:
    with pytest.raises(ConfigError, match=r"max_pinned_share = 1.0: .* at most 0.9"):
        load_config(env={}, max_pinned_share=1.0, **SMALL)
