"""Settings from any file, environment and mapping: they load, or a ConfigError of bounded length says why not."""

import contextlib
import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flexkv.cli.config import main
from flexkv.config import FlexKVConfig, directories, engine_config, load_config, runtime_directory
from flexkv.config.sources import FIELDS
from flexkv.config.upstream import MEANINGLESS, UNAVAILABLE
from flexkv.errors import ConfigError

from .budget import case, mutated, seeds

YAML = [
    b"cpu_cache_gb: 0.5\nevict_ratio: 0.2\naudit: on\nssd_cache_gb: 2 GiB\nssd_cache_dir: ~/a;/b\n",
    b"num_cpu_blocks: 8\nnamespaces:\n  gold: &a {guaranteed: 0.2, ttl_s: 600}\n  silver: {<<: *a, priority: 1}\n",
    b"# comment\nnum_cpu_blocks: 0x10\nop_timeout_s: 1:30\ntrace_path: 2020-01-01\nmetrics_host: !!str 1\n---\n",
    b"? audit\n: |\n  yes\nlog_level: >-\n  debug\nkey_secret: !!binary aGk=\nload_policy: [a, {b: c}]\n",
]
JSON = [
    b'{"cpu_cache_gb": "512MB", "namespaces": {"a": {"limit": 0.5, "priority": 3}}, "audit": true}',
    b'{"num_cpu_blocks": 8, "ssd_cache_dir": ["/a", "/b"], "ssd_cache_gb": 1e1, "enable_mps": 1}',
]
TEXTS = ["", " ", "none", "0", "1", "-1", "1e999", "32GB", "1 GiB", "9" * 400, "true", "LRU", "~/x", "~nobody/x",
         "$HOME/x", "/a;/b", "/a,/b", "/a;/a", "tcp://10.0.0.1:80", "ipc:///x", "ipc://", "a\0b", "\ud800", "é" * 200,
         "{a: {limit: 1}}",
         '{"a": {}}', "[" * 3000, "a: &a [*a]", "<<: 1", "nan", ".inf", "0x10", "1_0", "debug", "auto", "/" * 300]
NAMES = [*FIELDS, *MEANINGLESS, *UNAVAILABLE]
SUFFIXES = ["", "", "", "_SERVICE_HOST", "_SERVICE_PORT_X", "_PORT", "_PORT_80_TCP", "_PORT_80_UDP_ADDR", "X"]


def check(error: ConfigError) -> None:
    text = str(error)
    assert text
    assert len(text) < 5000
    text.encode("utf-8", "backslashreplace")


def text_of(rng: Random) -> str:
    text = rng.choice(TEXTS)
    if rng.random() < 0.3:
        text = mutated(rng, text.encode("utf-8", "surrogatepass"), 4000).decode("utf-8", "surrogateescape")
    return text


def value_of(rng: Random, depth: int = 0) -> Any:
    match rng.randrange(10 if depth < 4 else 7):
        case 0:
            return rng.choice([None, True, False, b"x", object(), ..., {1, 2}, 1j, float("nan"), float("inf")])
        case 1:
            return rng.choice([0, 1, 16, -1, 1 << 64, 10**400, -(10**5000)])
        case 2:
            return rng.choice([0.0, 0.5, -0.0, 1e300, -1e-300])
        case 3 | 4 | 5 | 6:
            return text_of(rng)
        case 7:
            return [value_of(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            keys = ["limit", "ttl_s", "guaranteed", "priority", "gold", "default", "", text_of(rng)]
            return {rng.choice(keys) if rng.random() < 0.9 else rng.choice([1, None, True]): value_of(rng, depth + 1)
                    for _ in range(rng.randrange(4))}


def test_files(tmp_path: Path) -> None:
    loaded = refused = 0
    for seed in seeds():
        with case(seed) as rng:
            ending = rng.choice([".yaml", ".json"])
            path = tmp_path / f"c{ending}"
            path.write_bytes(mutated(rng, rng.choice(YAML if ending == ".yaml" or rng.random() < 0.1 else JSON)))
            try:
                config = load_config(path, env={})
            except ConfigError as error:
                check(error)
                refused += 1
            else:
                assert isinstance(config, FlexKVConfig)
                assert config.given.items() <= dict.fromkeys(FIELDS, f"in {path}").items()
                loaded += 1
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                status = main(["--check", str(path)])
            problems = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
            assert bool(problems) == bool(status)
    assert loaded
    assert refused


def test_environments() -> None:
    for seed in seeds():
        with case(seed) as rng:
            env = {
                "FLEXKV_" + rng.choice(NAMES).upper() + rng.choice(SUFFIXES): text_of(rng)
                for _ in range(rng.randrange(1, 4))
            }
            if rng.random() < 0.1:
                env["FLEXKV_CONFIG_PATH"] = text_of(rng)
            try:
                load_config(env={"FLEXKV_NUM_CPU_BLOCKS": "8"} | env)
            except ConfigError as error:
                check(error)


def test_mappings_of_an_engine() -> None:
    for seed in seeds():
        with case(seed) as rng:
            given: Any = {
                rng.choice(NAMES) if rng.random() < 0.9 else value: value_of(rng)
                for value in [text_of(rng) for _ in range(rng.randrange(1, 4))]
            }
            try:
                config = engine_config({"num_cpu_blocks": 8} | given if rng.random() < 0.99 else value_of(rng))
            except ConfigError as error:
                check(error)
            else:
                for settings in (config.cache, config.transfer, config.connector):
                    assert settings.replace() == settings          # values are as they would be read again
                json.dumps(config.cache.ssd_directories, default=str)


def test_runtime_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("link")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(directories, "_log_once", lambda text: None)
    for seed in seeds():
        with case(seed) as rng:
            base = rng.choice(["", "/", "/proc", "file", "folder", "link", "folder/new", "\udcff", "x" * 300, "~"])
            base = mutated(rng, os.fsencode(base), 400).decode("utf-8", "surrogateescape").replace("\0", "")
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / base) if rng.random() < 0.5 else base)
            if os.path.exists("/flexkv") or base.startswith(("/", "..")):
                continue                                            # nothing is made outside of the test
            found = runtime_directory()
            assert found.stat().st_mode & 0o777 == 0o700
            assert found.name in ("flexkv", f"flexkv-{os.geteuid()}")
