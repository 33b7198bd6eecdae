"""Settings without effect are named."""

import logging
from typing import Any

import pytest

from flexkv.config import engine_config, load_config, warn_overruled
from flexkv.errors import ConfigError

SMALL = {"cpu_cache_gb": 0.5}


def warnings(caplog: pytest.LogCaptureFixture, **settings: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flexkv.config"):
        load_config(env={}, **settings)
    return [record.getMessage() for record in caplog.records]


def test_a_directory_without_a_size_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    for env, settings in (({"FLEXKV_SSD_CACHE_DIR": "/disk"}, {}), ({}, {"ssd_cache_dir": "/disk"})):
        with pytest.raises(ConfigError, match=r"ssd_cache_dir = '/disk': has no effect without ssd_cache_gb: set .* 0"):
            load_config(env=env, **settings, **SMALL)
    assert warnings(caplog, ssd_cache_dir="/disk", ssd_cache_gb=0, **SMALL) == []
    assert warnings(caplog, ssd_cache_dir="/disk", ssd_cache_gb=1, **SMALL) == []
    assert load_config(env={"FLEXKV_SSD_CACHE_DIR": "/disk", "FLEXKV_SSD_CACHE_GB": "0"}, **SMALL).cache.ssd_bytes == 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"ssd_admission": "all"}, "ssd_admission"), ({"ssd_io": "threads"}, "ssd_io"),
        ({"load_policy": "never"}, "load_policy"), ({"prefill_tokens_per_s": "12k"}, "prefill_tokens_per_s"),
        ({"ssd_write_mb_per_s": 5}, "ssd_write_mb_per_s"), ({"num_cpu_blocks": 8}, "cpu_cache_gb"),
        ({"hugepage_size_bytes": 1 << 30}, "hugepage_size_bytes"), ({"hit_reward_seconds": 1}, "hit_reward_seconds"),
        ({"metrics_host": "0.0.0.0"}, "metrics_host"), ({"py_metrics_port": 9000}, "py_metrics_port"),
        ({"trace_max_mb": 1}, "trace_max_mb"), ({"audit_path": "/a"}, "audit_path"),
    ],
)
def test_each_is_named_once(caplog: pytest.LogCaptureFixture, settings: dict[str, Any], name: str) -> None:
    (line,) = warnings(caplog, **SMALL, **settings)
    assert line.startswith(f"{name} (argument) has no effect: ")


def test_settings_with_an_effect_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(
        caplog, ssd_cache_gb=1, ssd_admission="all", enable_metrics=True, py_metrics_port=0, trace_path="t",
        trace_max_mb=1, audit=True, audit_path="/a", eviction_policy="lru", hit_reward_seconds=1,
        use_hugepage_cpu_buffer=True, hugepage_size_bytes=1 << 30, **SMALL,
    ) == []
    assert warnings(caplog, ssd_cache_gb=0, ssd_admission="all", **SMALL) == []        # a tier that is off for a while
    assert warnings(caplog, py_metrics_port=8080, **SMALL) == []                       # the default


def test_a_setting_that_the_engine_overrules(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(env={"FLEXKV_TOKENS_PER_BLOCK": "256", "FLEXKV_CPU_CACHE_GB": "0.5"})
    for block_size in (256, 128):
        warn_overruled(config.given, "tokens_per_block", config.cache.tokens_per_block, block_size, "vLLM's block size")
        warn_overruled({}, "tokens_per_block", 16, block_size, "vLLM's block size")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "tokens_per_block = 256 (FLEXKV_TOKENS_PER_BLOCK) has no effect: 128 is used, vLLM's block size"
    )


def test_the_log_is_set_up_before_the_first_line(caplog: pytest.LogCaptureFixture) -> None:
    order: list[object] = []
    logging.getLogger("flexkv.config").addFilter(order.append)
    try:
        settings = {"trace_max_mb": 1, "log_level": "warning", **SMALL}
        engine_config(settings, lambda level: order.append(f"set up {level}"))
    finally:
        logging.getLogger("flexkv.config").removeFilter(order.append)
    assert order[0] == "set up WARNING"
    assert len(order) == 2


def test_settings_of_an_engine() -> None:
    assert engine_config(None).given == engine_config({}).given
    assert engine_config({"num_cpu_blocks": 3}).cache.num_cpu_blocks == 3
    for settings, message in (
        ({"path": "/etc/x.yml"}, "path = .*not a setting"), ({"env": {}}, "env = .*not a setting"),
        ([1], "must be a mapping"), ({5: 1}, "name of a setting = 5: must be text"),
        ({"overrides": {}}, "overrides = .*not a setting"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_config(settings)  # type: ignore[arg-type]
