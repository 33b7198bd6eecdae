"""Values that are given as text."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from flexkv.config import CacheConfig, ConnectorConfig, TransferConfig, load_config
from flexkv.config.values import COUNTS, read_number
from flexkv.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("32GB", 32e9), ("32 GiB", 32 * GIB), ("32gib", 32 * GIB), ("32G", 32e9), ("32Gi", 32 * GIB), ("32", 32 * GIB),
        ("0.5", GIB / 2), (" 512MB ", 512e6), ("512 MiB", 512 << 20), ("1M", 1e6), ("1 TB", 1e12), ("1e9 bytes", 1e9),
        ("4096b", 4096), ("1_000MB", 1e9), ("+2GiB", 2 * GIB), ("2.5e0 GiB", 2.5 * GIB),
    ],
)
def test_sizes(text: str, num_bytes: float) -> None:
    given = CacheConfig(num_cpu_blocks=1, ssd_cache_gb=text)  # type: ignore[arg-type]
    assert given.ssd_bytes == pytest.approx(num_bytes, abs=1)
    assert load_config(env={"FLEXKV_SSD_CACHE_GB": text, "FLEXKV_NUM_CPU_BLOCKS": "1"}).cache == given


@pytest.mark.parametrize(
    "text", ["32 GX", "GB", "1,5", "1 000", "--1GB", "1GB2", "0x10", "nan", "infGB", "1e999", "1e999 GB", "٣", "-1MB",
             "9" * 5000, "1e5000kB", "1__0", "five", "1 GiB/s"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ssd_cache_gb = .*: must be a number, at least 0 \(GiB\)"):
        CacheConfig(num_cpu_blocks=1, ssd_cache_gb=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("owner", "name", "text", "value"),
    [
        (TransferConfig, "gpu_window_mb", "10MB", 9), (TransferConfig, "gpu_window_mb", "16 MiB", 16),
        (TransferConfig, "ring_bytes", "1MiB", 1 << 20), (TransferConfig, "op_timeout_s", "500ms", 0.5),
        (TransferConfig, "op_timeout_s", "5min", 300), (TransferConfig, "connect_timeout_s", "1h", 3600),
        (CacheConfig, "ssd_write_mb_per_s", "500MB/s", 500e6 / (1 << 20)),
        (CacheConfig, "ssd_write_mb_per_s", "500 MiB", 500), (CacheConfig, "prefill_tokens_per_s", "12k", 12_000),
        (CacheConfig, "prefill_tokens_per_s", "12 tokens/s", 12), (CacheConfig, "tokens_per_block", "32", 32),
        (CacheConfig, "eviction_policy", "LRU", "lru"), (CacheConfig, "load_policy", " Never ", "never"),
        (ConnectorConfig, "log_level", "debug", "DEBUG"), (ConnectorConfig, "audit", "TRUE", True),
        (ConnectorConfig, "audit", "off", False), (CacheConfig, "num_cpu_blocks", "None", None),
    ],
)
def test_other_values(owner: Any, name: str, text: str, value: object) -> None:
    more = {"cpu_cache_gb": 0.5} if owner is CacheConfig else {}
    assert getattr(owner(**{name: text, **more}), name) == value


@pytest.mark.parametrize(
    ("owner", "name", "text"),
    [
        (CacheConfig, "tokens_per_block", "1k"), (CacheConfig, "tokens_per_block", "16.0"),
        (TransferConfig, "gpu_window_mb", "1kB"), (TransferConfig, "ring_bytes", "1MB"),
        (TransferConfig, "op_timeout_s", "5 parsecs"), (ConnectorConfig, "audit", "maybe"),
        (CacheConfig, "eviction_policy", "LRUU"), (CacheConfig, "py_metrics_port", "8k"),
    ],
)
def test_other_values_are_refused(owner: Any, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = "):
        owner(**{name: text, **({"cpu_cache_gb": 0.5} if owner is CacheConfig else {})})


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 10**5000, 1 << 64, float("inf"), float("nan"), 1e300], ids=lambda _: ""
)
@pytest.mark.parametrize("name", ["cpu_cache_gb", "num_cpu_blocks", "tokens_per_block", "ssd_deadline_s"])
def test_numbers_beyond_all_bounds(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} = ") as caught:
        load_config(env={}, **{name: value})
    assert len(str(caught.value)) < 300


def test_the_largest_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv.config.settings.memory_limit", lambda: int(23.456 * GIB))
    with pytest.raises(ConfigError, match=r"must leave room in the 23.5 GiB .*: at most 23.45 \(GiB\)"):
        CacheConfig(cpu_cache_gb=24)
    assert CacheConfig(cpu_cache_gb=23.45).cpu_cache_gb == 23.45
    monkeypatch.setattr("flexkv.config.settings.memory_limit", lambda: None)
    assert CacheConfig(cpu_cache_gb=1e6).cpu_cache_gb == 1e6


def test_counts() -> None:
    assert [read_number(text, int, COUNTS) for text in ("1M", "1Mi", "64k", "7", "1MB", "")] == [
        1_000_000, 1 << 20, 64_000, 7, None, None
    ]


# ---- paths ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_home_directories_are_expanded_everywhere(home: Path) -> None:
    home.mkdir()
    (home / "c.yaml").write_text("ssd_cache_dir: ~/a; ~/b/\nssd_cache_gb: 1\nnum_cpu_blocks: 1\naudit: on\n")
    config = load_config(env={
        "FLEXKV_CONFIG_PATH": "~/c.yaml", "FLEXKV_TRACE_PATH": "~/t", "FLEXKV_AUDIT_PATH": "~/audit",
        "FLEXKV_GPU_REGISTER_PORT": "ipc://~/s.sock",
    })
    assert config.cache.ssd_directories == [home / "a", home / "b"]
    assert (config.cache.trace_path, config.connector.audit_path) == (f"{home}/t", f"{home}/audit")
    assert config.transfer.gpu_register_port == f"ipc://{home}/s.sock"
    assert TransferConfig(gpu_register_port="~").gpu_register_port == str(home)
    root = pwd.getpwuid(0)
    assert CacheConfig(num_cpu_blocks=1, trace_path=f"~{root.pw_name}/t").trace_path == f"{root.pw_dir}/t"
    as_list = load_config(env={}, ssd_cache_dir=["~/a", "/b"], ssd_cache_gb=1, num_cpu_blocks=1)
    assert as_list.cache.ssd_directories == [home / "a", Path("/b")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trace_path", "~nobody-of-this-name/t", "no home directory of the user 'nobody-of-this-name'"),
        ("trace_path", "$HOME/t", "environment variables are not expanded"),
        ("trace_path", "${HOME}/t", "environment variables are not expanded"),
        ("ssd_cache_dir", "/a;$(DISK)/b", "environment variables are not expanded"),
        ("trace_path", "file:///t", "without a scheme"),
        ("trace_path", "a\0b", "NUL"),
        ("audit_path", "/a/\ud800", "no file name"),
        ("ssd_cache_dir", "a1,/tmp/a2", "',' cannot stand .* separate them by ';'"),
        ("ssd_cache_dir", "a1,a2", "separate them by ';'"),
        ("ssd_cache_dir", "/a1:/a2", "':' cannot stand"),
        ("ssd_cache_dir", "/a1 /a2", "separate them by ';'"),
        ("ssd_cache_dir", "/a1\n~/a2", "separate them by ';'"),
        ("ssd_cache_dir", "/a1|/a2", "separate them by ';'"),
        ("ssd_cache_dir", "/a;/b;/a", "'/a' is named twice"),
        ("ssd_cache_dir", "kv;./kv/", "'./kv/' is named twice"),
        ("ssd_cache_dir", "~/kv;~/x/../kv", "is named twice"),
        ("ssd_cache_dir", ["/a", 5], "list of texts"),
        ("ssd_cache_dir", ["/a;/b"], "list of texts"),
        ("gpu_register_port", "tcp://127.0.0.1:5555", "Unix socket: give a path or ipc://PATH"),
        ("gpu_register_port", "unix:///run/s", "Unix socket"),
        ("gpu_register_port", "unix:/run/s", "Unix socket"),
        ("gpu_register_port", "localhost:5555", "Unix socket"),
        ("gpu_register_port", "*:5555", "Unix socket"),
        ("gpu_register_port", "5555", "Unix socket"),
        ("gpu_register_port", "ipc://", "must name the file"),
        ("gpu_register_port", "/run/flexkv/", "must name the file"),
        ("gpu_register_port", "/" + "x" * 107, "at most 107 bytes"),
    ],
)
def test_paths_that_cannot_be_meant(home: Path, name: str, text: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(env={}, num_cpu_blocks=1, ssd_cache_gb=1, audit=True, **{name: text})
    assert name in str(caught.value)
    assert os.listdir(".") == []


def test_a_link_to_the_same_directory_is_the_same(home: Path) -> None:
    Path("kv").mkdir()
    Path("link").symlink_to("kv")
    with pytest.raises(ConfigError, match="'link' is named twice"):
        CacheConfig(num_cpu_blocks=1, ssd_cache_gb=1, ssd_cache_dir="kv;link")


def test_without_a_home_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(ConfigError, match="no home directory of this user"):
        CacheConfig(num_cpu_blocks=1, trace_path="~/t")
