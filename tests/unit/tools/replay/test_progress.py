"""The progress bar."""

import io
import sys

import pytest

from flexkv.tools.replay.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(3, "trace") as bar:
        for _ in range(3):
            bar.update(1)
        bar.clear()
        assert sys.stderr.getvalue().endswith("\r")         # nothing is left on the line
    assert "trace" in sys.stderr.getvalue()


def test_silence_elsewhere_and_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with progress(3, "trace") as bar:
            bar.update(1)
            bar.clear()
        assert stream.getvalue() == ""
