"""Where the demo's model is kept."""

from pathlib import Path

import pytest

from flexkv.errors import FlexKVError
from flexkv.tools.demo import model


def convert(partial: Path) -> None:
    (partial / "model.safetensors").write_text("weights")


def test_the_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_convert", convert)
    directory = tmp_path / "cache" / "small"
    assert model.prepare_model(directory) == directory
    monkeypatch.setattr(model, "_convert", None)
    assert model.prepare_model(directory) == directory
    assert [path.name for path in directory.parent.iterdir()] == ["small"]


def test_an_empty_folder_is_taken_and_another_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_convert", convert)
    (tmp_path / "small").mkdir()
    assert model.prepare_model(tmp_path / "small") == tmp_path / "small"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FlexKVError, match="is not the demo's model"):
        model.prepare_model(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(partial: Path) -> None:
        convert(partial)
        monkeypatch.setattr(model, "_convert", convert)
        model.prepare_model(tmp_path / "small")          # another process is first

    monkeypatch.setattr(model, "_convert", slow)
    assert model.prepare_model(tmp_path / "small") == tmp_path / "small"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(partial: Path) -> None:
        (partial / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        model.prepare_model(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
