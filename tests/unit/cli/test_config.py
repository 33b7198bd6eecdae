"""The command ``flexkv config``."""

import time
from pathlib import Path

import pytest

from flexkv.cli.main import main
from flexkv.config import settings
from flexkv.config.reference import reference


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("FLEXKV_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(settings, "memory_limit", lambda: 32 << 30)


def test_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out == reference()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", "--help"])
    assert ended.value.code == 0
    assert "--check" in capsys.readouterr().out


def test_check_says_ok(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cpu_cache_gb: 2\nssd_io: uring\n")
    assert main(["config", "--check"]) == 0
    assert main(["config", "--check", str(tmp_path / "c.yaml")]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "ok; settings given: 0, all others have their defaults",
        "ok; settings given: 2, all others have their defaults",
    ]
    assert captured.err.startswith("warning: ssd_io (in ")


def test_check_names_every_problem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("cpu_cache_gib: 2\nevict_ratio: 5\nnamespaces: [a,\n  b]\n")
    monkeypatch.setenv("FLEXKV_SAVE_MODE", "never")
    monkeypatch.setenv("FLEXKV_SSD_CACHE_DIR", "/a,/b")
    started = time.monotonic()
    assert main(["config", "--check", str(tmp_path / "c.yaml")]) == 1
    assert time.monotonic() - started < 5
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)
    for name in ("cpu_cache_gib", "evict_ratio", "namespaces", "FLEXKV_SAVE_MODE", "FLEXKV_SSD_CACHE_DIR"):
        assert any(line.startswith(f"error: {name} = ") for line in lines), name


def test_check_names_every_conflict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "cpu_cache_gb: 33\nssd_cache_gb: 1\nuse_hugepage_cpu_buffer: on\nhugepage_size_bytes: 5000\n"
        "ring_bytes: 5000\nnamespaces: {a: {limit: 7}}\n"
    )
    assert main(["config", "--check", str(tmp_path / "c.yaml")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "hugepage_size_bytes", "cpu_cache_gb", "ssd_cache_gb", "namespaces:", "ring_bytes"
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"{" * 100_000, b"cpu_cache_gb: 1\ncpu_cache_gb: 2\n"])
def test_check_of_a_broken_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(tmp_path / "c.yaml"))
    for option in ("--check", "--show"):
        assert main(["config", option]) == 1
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert "c.yaml" in captured.err


def test_show(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text("cpu_cache_gb: 2GiB\nkey_secret: hunter2\n")
    monkeypatch.setenv("FLEXKV_EVICTION_POLICY", "LRU")
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "3")
    assert main(["config", "--show", str(tmp_path / "c.yaml")]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.splitlines()}
    assert rows["cpu_cache_gb"].split() == ["2", "GiB", "in", str(tmp_path / "c.yaml")]
    assert rows["eviction_policy"].split() == ["lru", "FLEXKV_EVICTION_POLICY"]
    assert rows["num_cpu_blocks"].split() == ["none", "default"]
    assert rows["key_secret"].split() == ["***", "in", str(tmp_path / "c.yaml")]
    assert "hunter2" not in shown
    assert len(rows) == len(settings.CacheConfig.__dataclass_fields__) + len(
        settings.TransferConfig.__dataclass_fields__) + len(settings.ConnectorConfig.__dataclass_fields__)


def test_unknown_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for word, hint in (("cofnig", "; did you mean 'config'?"), ("PIN", "; did you mean 'pin'?"), ("status", "")):
        assert main([word]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"flexkv: unknown command {word!r}{hint}"
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "usage:" in capsys.readouterr().out
