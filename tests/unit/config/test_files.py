"""Files of settings: encodings, keys, and everything that a file can hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexkv.config import load_config
from flexkv.config.namespaces import Quota
from flexkv.errors import ConfigError


def load(tmp_path: Path, name: str, content: str | bytes) -> object:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_config(path, env={}).cache


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin1.yaml", "# a\n# mémoire\ncpu_cache_gb: 1\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("utf16.yaml", "cpu_cache_gb: 1\n".encode("utf-16"), "UTF-16"),
        ("utf16.json", '{"cpu_cache_gb": 1}'.encode("utf-16"), "UTF-16"),
        ("utf32.json", '{"cpu_cache_gb": 1}'.encode("utf-32"), "UTF-16 or UTF-32"),
        ("bare16.yaml", "cpu_cache_gb: 1\n".encode("utf-16-le"), "cannot be parsed"),
        ("surrogate.json", b'{"cpu_cache_gb": 1}\xed\xa0\x80', "not UTF-8"),
        ("binary.yml", bytes(range(256)), "not UTF-8"),
        ("nul.yaml", b"cpu_cache_gb: 1\0\n", "cannot be parsed"),
        ("large.yaml", b"#" * (1 << 20) + b"\n", "larger than 1 MiB"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, name, content)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "c.json", "C.JSON"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, name: str, mark: bytes) -> None:
    cache = load(tmp_path, name, mark + '{"cpu_cache_gb": 0.5, "namespaces": {"ü€": {"limit": 0.5}}}'.encode())
    assert cache.quotas == {"ü€": Quota(limit=0.5)}  # type: ignore[attr-defined]


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("num_cpu_blocks: 1\nnamespaces: {ü: {}}\n".encode())
    code = "import sys; from flexkv.config import load_config; print(ascii(load_config(sys.argv[1]).cache.quotas))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "c.yaml")], capture_output=True, text=True,
        check=True, env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )
    assert "'\\xfc'" in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "num_cpu_blocks: 1\naudit: on\nnum_cpu_blocks: 2\n", "num_cpu_blocks: is given twice.* line 3"),
        ("a.json", '{"num_cpu_blocks": 1, "num_cpu_blocks": 2}', "num_cpu_blocks: is given twice"),
        ("a.json", '{"namespaces": {"gold": {"limit": 0.1}, "gold": {}}}', "gold: is given twice"),
        ("a.json", '{"namespaces": {"gold": {"limit": 0.1, "limit": 1}}}', "limit: is given twice"),
        ("a.json", '{"namespaces": {"g": [{"x": 1, "x": 1}]}}', "x: is given twice"),
        ("a.json", '{"audit": true, "\\u0061udit": true}', "audit: is given twice"),
        ("a.yaml", "namespaces:\n  gold: {limit: 0.1}\n  gold: {}\n", "gold: is given twice, again in line 3"),
        ("a.yaml", "a: &a {x: 1}\nb:\n  <<: *a\n  y: 1\n  y: 2\n", "y: is given twice, again in line 5"),
        ("a.yaml", "a: &a {x: 1}\nb: &b\n  <<: *a\n  y: 1\n  y: 2\nc: {<<: *b}\n", "y: is given twice"),
        ("a.yaml", "c: {<<: {y: 1, y: 2}}\n", "y: is given twice"),
        ("a.yaml", "'audit': on\naudit: on\n", "audit: is given twice"),
    ],
)
def test_a_key_given_twice_is_an_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, name, text)
    assert name in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": {}, "a": {}}', "{a: {limit: 1, limit: 2}}", '{"a": {"limit": 1, "limit": 1}}'])
def test_a_key_given_twice_in_a_variable_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"FLEXKV_NAMESPACES: .* is given twice"):
        load_config(env={"FLEXKV_NAMESPACES": text})


def test_merge_keys(tmp_path: Path) -> None:
    text = """\
num_cpu_blocks: 1
namespaces:
  gold: &usual {guaranteed: 0.2, ttl_s: 600}
  silver: &lower
    <<: *usual
    priority: -1
  bronze:
    guaranteed: 0.1
    <<: [*lower, *usual]
  tin: {<<: {limit: 0.5}, limit: 0.25}
"""
    assert load(tmp_path, "c.yaml", text).quotas == {  # type: ignore[attr-defined]
        "gold": Quota(0.2, ttl_s=600), "silver": Quota(0.2, ttl_s=600, priority=-1),
        "bronze": Quota(0.1, ttl_s=600, priority=-1), "tin": Quota(limit=0.25),
    }


def test_merges_of_merges_stay_small(tmp_path: Path) -> None:
    levels = [f"  n{i}: &n{i} {{<<: [{', '.join([f'*n{i - 1}'] * 20)}]}}" for i in range(1, 12)]
    text = "num_cpu_blocks: 1\nnamespaces:\n  n0: &n0 {priority: 3}\n" + "\n".join(levels) + "\n"
    assert set(load(tmp_path, "c.yaml", text).quotas.values()) == {Quota(priority=3)}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("deep.json", '{"namespaces": ' + "[" * 100_000, "nested too deeply"),
        ("deep.yaml", "namespaces: " + "[" * 100_000, "nested too deeply"),
        ("nan.json", '{"num_cpu_blocks": 1, "op_timeout_s": NaN}', "NaN is not a number"),
        ("inf.json", '{"num_cpu_blocks": 1, "op_timeout_s": -Infinity}', "-Infinity is not a number"),
        ("inf.yaml", "num_cpu_blocks: 1\nop_timeout_s: .inf\n", "op_timeout_s = inf"),
        ("huge.json", '{"num_cpu_blocks": ' + "9" * 400 + "}", "num_cpu_blocks = "),
        ("huger.json", '{"num_cpu_blocks": ' + "9" * 5000 + "}", "cannot be parsed"),
        ("huger.yaml", "num_cpu_blocks: " + "9" * 5000 + "\n", "cannot be parsed"),
        ("exp.json", '{"op_timeout_s": 1e999}', "op_timeout_s = inf"),
        ("bool.yaml", "audit: !!bool perhaps\n", "cannot be parsed"),
        ("int.yaml", 'num_cpu_blocks: !!int ""\n', "cannot be parsed"),
        ("date.yaml", "trace_path: 2020-13-45\n", "cannot be parsed"),
        ("object.yaml", "audit: !!python/object/apply:os.getcwd []\n", "cannot be parsed"),
        ("key.yaml", "? [a, b]\n: 1\n", "cannot be parsed"),
        ("two.yaml", "audit: on\n---\naudit: off\n", "cannot be parsed"),
        ("long.yaml", "? '" + "x" * 10_000 + "'\n: 1\n", "x = 1: is not a setting"),
        ("long.json", '{"' + "x" * 10_000 + '": 1}', "x = 1: is not a setting"),
        ("alias.yaml", "namespaces: &a {g: *a}\n", "namespaces: g: g = "),
        ("laughs.yaml", "l0: &l0 [x]\n" + "".join(
            f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 12)), "l0 = .* is not a setting"),
    ],
)
def test_odd_content_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, name, text)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_value_from_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpu_cache_gb = -1: must be .* \(in .*c.yaml\)"):
        load(tmp_path, "c.yaml", "cpu_cache_gb: -1\n")
    with pytest.raises(ConfigError, match=r"cpu_cache_gib = 1: .*did you mean cpu_cache_gb\? \(in .*c.yaml\)"):
        load(tmp_path, "c.yaml", "cpu_cache_gib: 1\n")
    with pytest.raises(ConfigError, match=r"namespaces: a = .* \(in .*c.yaml\)"):
        load(tmp_path, "c.yaml", "num_cpu_blocks: 1\nnamespaces: {a: {limit: 2}}\n")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")                       # would wait for a writer
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, message in (
        ("pipe.yaml", "ordinary file"), ("folder.yaml", "cannot be read"), ("loop.yaml", "cannot be read"),
        ("none.yaml", "cannot be read"), ("a\0.yaml", "NUL"), ("$HOME.yaml", "not expanded"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name, env={})
