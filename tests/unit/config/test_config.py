"""Settings: where they come from, and how wrong ones are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import CacheConfig, ModelConfig, TransferConfig, domain, layout_of, load_config
from flexkv.config.memory import memory_limit
from flexkv.errors import ConfigError

SMALL = {"cpu_cache_gb": 0.5}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_order_of_sources(tmp_path: Path) -> None:
    env = {"FLEXKV_CPU_CACHE_GB": "0.1", "FLEXKV_EVICT_RATIO": "0.2", "FLEXKV_SAVE_MODE": "at_finish", "HOME": "/"}
    assert load_config(env=env).cache.cpu_cache_gb == 0.1
    env["FLEXKV_CONFIG_PATH"] = write(tmp_path / "c.yml", "cpu_cache_gb: 0.3\nop_timeout_s: 7\n")
    config = load_config(env=env)
    assert (config.cache.cpu_cache_gb, config.cache.evict_ratio, config.transfer.op_timeout_s) == (0.3, 0.2, 7)
    assert config.connector.save_mode == "at_finish"
    assert load_config(env=env, cpu_cache_gb=0.4).cache.cpu_cache_gb == 0.4
    as_json = write(tmp_path / "c.json", json.dumps({"audit": True, **SMALL}))
    assert load_config(as_json, env={}).connector.audit is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu_cache_gbb": 1}, "cpu_cache_gbb = 1: .*did you mean cpu_cache_gb"),
        ({"cpu_cache_gb": "much"}, "cpu_cache_gb = 'much': must be a number"),
        ({"cpu_cache_gb": True}, "cpu_cache_gb = True: must be a number"),
        ({"cpu_cache_gb": math.nan}, "cpu_cache_gb = nan"),
        ({"cpu_cache_gb": math.inf}, "cpu_cache_gb = inf"),
        ({"cpu_cache_gb": -1}, "cpu_cache_gb = -1: must be a number, at least 0"),
        ({"cpu_cache_gb": 0}, "cpu_cache_gb = 0: must be more than 0"),
        ({"cpu_cache_gb": 1e9}, "must leave room"),
        ({"tokens_per_block": 16.0, **SMALL}, "tokens_per_block = 16.0: must be a whole number"),
        ({"tokens_per_block": 0, **SMALL}, "at least 1"),
        ({"evict_ratio": 1.5, **SMALL}, "at most 1"),
        ({"eviction_policy": "magic", **SMALL}, "one of adaptive, lru"),
        ({"hugepage_size_bytes": 5000, **SMALL}, "power of two"),
        ({"ring_bytes": 5000, **SMALL}, "power of two"),
        ({"audit": 1, **SMALL}, "true or false"),
        ({"key_secret": 5, **SMALL}, r"key_secret = '\*\*\*'"),
        ({"ssd_cache_gb": 0.5, **SMALL}, r"ssd_cache_gb = 0.5: must be more than cpu_cache_gb \(0.5\)"),
        ({"ssd_cache_gb": 1, "ssd_cache_dir": ";", **SMALL}, "ssd_cache_dir = ';': must name at least one"),
        ({"ssd_admission": "most", **SMALL}, "one of second_touch, all"),
        ({"enable_gds": True, **SMALL}, "enable_gds = True: needs an SSD tier"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env={}, **settings)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FLEXKV_CPU_CACHE", "1", "did you mean FLEXKV_CPU_CACHE_GB"),
        ("FLEXKV_CPU_CACHE_GB", "lots", "must be a number"),
        ("FLEXKV_AUDIT", "perhaps", "true or false"),
        ("FLEXKV_SSD_CACHE_GB", "much", "must be a number"),
        ("FLEXKV_CONFIG_PATH", "/nowhere/c.yml", "cannot be read"),
        ("FLEXKV_CONFIG_PATH", "/etc/hostname", "must be a .yml"),
    ],
)
def test_wrong_variables_are_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env={variable: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "cannot be parsed"), ("- 1\n", "a mapping"), ("cpu_cache_gb: 1\ncpu_cache_gb: 2\n", "given twice"),
     ("1: 2\n", "a mapping")],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "c.yml", text), env={})
    assert load_config(write(tmp_path / "empty.yml", ""), env={}, **SMALL).cache.cpu_cache_gb == 0.5


def test_upstream_names_are_accepted() -> None:
    env = {"FLEXKV_ENABLE_MPS": "1", "FLEXKV_SSD_CACHE_GB": "0", "FLEXKV_ENABLE_GDS": "0",
           "FLEXKV_USE_CE_TRANSFER_H2D": "1", "FLEXKV_CPU_CACHE_GB": "0.5", "FLEXKV_NUM_LOG_INTERVAL_REQUESTS": "5"}
    config = load_config(env=env, server_recv_port="ipc:///x", enable_p2p_cpu=False)
    assert config.connector.num_log_interval_requests == 5


def test_settings_are_frozen_and_keep_secrets() -> None:
    config = CacheConfig(key_secret="hunter2", **SMALL)
    assert "hunter2" not in repr(config)
    with pytest.raises(AttributeError):
        config.cpu_cache_gb = 2  # type: ignore[misc]
    with pytest.raises(ConfigError):
        TransferConfig().replace(op_timeout_s=0)


def test_memory_limit_is_the_smallest_of_machine_and_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\n")
    assert memory_limit(tmp_path) == 1000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/engine\n")
    group = tmp_path / "sys/fs/cgroup/pod/engine"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == 1000 * 1024
    (group.parent / "memory.max").write_text("4096\n")
    assert memory_limit(tmp_path) == 4096
    old = tmp_path / "sys/fs/cgroup/memory/pod"
    old.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/pod\n")
    (old / "memory.limit_in_bytes").write_text("2048\n")
    assert memory_limit(tmp_path) == 2048


def test_domain_depends_on_all_that_makes_bytes_comparable() -> None:
    model, cache = ModelConfig(model_id="m"), CacheConfig(**SMALL)
    domains = {
        domain(model.replace(**change), cache)
        for change in ({}, {"model_id": "n"}, {"revision": "2"}, {"dtype": "float16"}, {"tp_size": 2},
                       {"num_layers": 3}, {"use_mla": True}, {"engine": "vllm 1.0 cuda"},
                       {"weights_id": "1f"}, {"config_digest": "1f"})
    }
    domains.add(domain(model, cache.replace(tokens_per_block=32)))
    assert len(domains) == 11
    assert domain(model, cache) == domain(model, cache.replace(cpu_cache_gb=0.25))
    assert ModelConfig(num_layers=2, num_kv_heads=4, head_size=8).kv_bytes_per_token == 2 * 2 * 4 * 8 * 2


def test_the_layout_of_a_domain_is_that_of_all_models_with_its_shape() -> None:
    def layout(**model: Any) -> str:
        return layout_of(domain(ModelConfig(**model), CacheConfig()).decode())

    assert layout(model_id="a", weights_id="x", revision="1", config_digest="y") == layout(model_id="b")
    for other in ({"num_layers": 2}, {"dtype": "int8"}, {"tp_size": 2}, {"engine": "e"}, {"head_size": 2}):
        assert layout(**other) != layout()
    assert layout_of("no JSON") == "no JSON"
    assert layout_of("[1]") == "[1]"
    assert layout_of("[" * 100_000) == "[" * 100_000
