"""Directories for sockets and for files to keep: the choice, and directories that other users can write to."""

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv.config import cache_directory, directories, runtime_directory
from flexkv.errors import ConfigError


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short, as a path of sockets has to be; everything temporary is below it."""
    with tempfile.TemporaryDirectory(prefix="fk") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        directories._log_once.cache_clear()
        yield Path(name)


def private(directory: Path) -> bool:
    return stat.S_IMODE(directory.lstat().st_mode) == 0o700


def test_the_variable_wins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place / "run"))
    assert runtime_directory() == place / "run" / "flexkv"
    assert private(runtime_directory())


def test_without_the_variable(place: Path) -> None:
    assert runtime_directory() == place / f"flexkv-{os.geteuid()}"
    assert private(runtime_directory())


def _file(base: Path) -> None:
    base.write_text("")


def _foreign(base: Path) -> None:
    base.mkdir()
    os.chown(base, 12345, 12345)


def _open_to_others(base: Path) -> None:
    (base / "flexkv").mkdir(parents=True)
    (base / "flexkv").chmod(0o777)


def _link(base: Path) -> None:
    base.mkdir()
    (base / "target").mkdir(mode=0o700)
    (base / "flexkv").symlink_to(base / "target")


def _file_inside(base: Path) -> None:
    base.mkdir()
    (base / "flexkv").write_text("precious")


USELESS = [None, _file, _open_to_others, _link, _file_inside]
if os.geteuid() == 0:                                      # others cannot give a directory away
    USELESS.append(_foreign)


@pytest.mark.parametrize("make", USELESS)
def test_one_that_cannot_be_used_is_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make: object
) -> None:
    base = place / "run"
    if callable(make):
        make(base)
    before = sorted(place.rglob("*"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with caplog.at_level(logging.WARNING, logger="flexkv.config"):
        assert runtime_directory() == runtime_directory() == place / f"flexkv-{os.geteuid()}"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"XDG_RUNTIME_DIR = '{base}' cannot be used: ")
    assert sorted(place.rglob("*")) == sorted([*before, place / f"flexkv-{os.geteuid()}"])


@pytest.mark.parametrize(
    "base", ["/proc/1", "/proc/self/fd", "relative/run", "/" + "x" * 60, "/a/\udcff" + "y" * 70, "~/run"]
)
def test_odd_directories_are_replaced(place: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    assert runtime_directory() == place / f"flexkv-{os.geteuid()}"


def test_a_directory_that_cannot_be_written_to_is_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = place / "run"
    (base / "flexkv").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).parent != base and real(path, mode))
    assert runtime_directory() == place / f"flexkv-{os.geteuid()}"


@pytest.mark.parametrize("make", [_link, _open_to_others, _file_inside])
def test_nothing_is_shared_with_another_user(place: Path, monkeypatch: pytest.MonkeyPatch, make: object) -> None:
    """Somebody else was first in the directory that all users share."""
    assert callable(make)
    make(place / "trap")
    (place / "trap" / "flexkv").rename(place / f"flexkv-{os.geteuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/1")
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR to a directory of this user alone") as caught:
        runtime_directory()
    assert f"flexkv-{os.geteuid()}" in str(caught.value)
    assert "XDG_RUNTIME_DIR = '/proc/1' cannot be used either" in str(caught.value)


def test_no_temporary_directory_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(ConfigError, match="TMPDIR: "):
        runtime_directory()


def test_the_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/kv")
    assert cache_directory() == Path("/var/kv/flexkv")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_directory() == Path("/home/me/.cache/flexkv")
    monkeypatch.setattr(os.path, "expanduser", str)                        # no home directory
    assert cache_directory() == place / f"flexkv-{os.geteuid()}" / "cache"
