"""The progress bar."""

import io
import sys

import pytest

from flexkv.replay.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(3, "trace lru") as done:
        for _ in range(3):
            done(1)
    assert "trace lru" in sys.stderr.getvalue()


def test_silence_elsewhere_and_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with progress(3, "trace lru") as done:
            done(1)
        assert stream.getvalue() == ""
