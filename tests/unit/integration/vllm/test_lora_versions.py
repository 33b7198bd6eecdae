"""A LoRA's version names the content that the engine computes with, or there is none."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from flexkv.integration.vllm import lora_versions
from flexkv.integration.vllm.lora_versions import LoraVersions
from tests.unit.config.test_weights import safetensors


def adapter(path: Path, content: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text('{"r": 8}')
    safetensors(path / "adapter_model.safetensors", {"a": content * 100})
    return path


def lora(path: Path | str, number: int = 1, in_place: bool = False, name: str = "sql") -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(path), load_inplace=in_place)


@pytest.fixture(name="started_later")
def _started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is started an hour after the files were written."""
    monkeypatch.setattr(lora_versions, "time", SimpleNamespace(time_ns=lambda: time.time_ns() + 3600 * 10**9))


@pytest.mark.usefixtures("started_later")
def test_files_from_before_the_start_have_a_version_that_outlives_it(tmp_path: Path) -> None:
    first = LoraVersions().version(lora(adapter(tmp_path / "a", b"Monday")))
    assert first
    assert LoraVersions().version(lora(tmp_path / "a", 7)) == first
    adapter(tmp_path / "a", b"Friday")
    assert LoraVersions().version(lora(tmp_path / "a")) not in (first, None)
    os.utime(tmp_path / "a/adapter_model.safetensors", ns=(1, 1))
    third = LoraVersions().version(lora(tmp_path / "a"))
    (tmp_path / "a/adapter_config.json").write_text('{"r": 8, "use_rslora": true}')
    assert LoraVersions().version(lora(tmp_path / "a")) != third


@pytest.mark.usefixtures("started_later")
def test_two_adapters_of_one_name_are_two(tmp_path: Path) -> None:
    versions = LoraVersions()
    first = versions.version(lora(adapter(tmp_path / "a", b"Monday"), 1))
    assert versions.version(lora(adapter(tmp_path / "b", b"Friday"), 2)) != first


def test_files_from_after_the_start_have_a_version_of_this_process(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", b"Monday")
    versions = LoraVersions()
    assert versions.version(lora(path)) == versions.version(lora(path))
    assert LoraVersions().version(lora(path)) != versions.version(lora(path))


def test_an_overwritten_adapter_has_no_version_until_it_is_loaded_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = adapter(tmp_path / "a", b"Monday")
    versions = LoraVersions()
    monday = versions.version(lora(path))
    adapter(path, b"Friday")
    assert [versions.version(lora(path)) for _ in range(3)] == [None] * 3        # vLLM may have either
    assert len([record for record in caplog.records if "were changed after it was loaded" in record.getMessage()]) == 1
    friday = versions.version(lora(path, in_place=True))
    assert friday not in (None, monday)
    assert versions.version(lora(path)) == friday            # requests that do not load it again
    adapter(path, b"Sunday")
    assert versions.version(lora(path)) is None
    assert versions.version(lora(path, in_place=True)) not in (None, monday, friday)
    assert versions.version(lora(path, number=2)) is not None        # unloaded, and loaded under a new number


def test_content_first_seen_is_not_taken_for_content_loaded_in_place(tmp_path: Path) -> None:
    """The adapter may have been loaded, and then been written over, before its first request."""
    path = adapter(tmp_path / "a", b"Monday")
    versions = LoraVersions()
    seen = versions.version(lora(path))
    adapter(path, b"Friday")
    adapter(path, b"Monday")
    assert versions.version(lora(path, in_place=True)) != seen


def test_adapters_without_files(tmp_path: Path) -> None:
    for path in ("simon_lora_path", str(tmp_path / "missing"), "org/adapter"):
        versions = LoraVersions()
        first = versions.version(lora(path, 1))
        assert first == versions.version(lora(path, 1))
        assert first != versions.version(lora(path, 2))
        assert first != LoraVersions().version(lora(path, 1))
        assert versions.version(lora(path, 1, in_place=True)) is None
    (tmp_path / "empty").mkdir()
    assert LoraVersions().version(lora(tmp_path / "empty")) is not None


@pytest.mark.usefixtures("started_later")
def test_names_of_the_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(lora_versions, "snapshot", lambda name, revision: adapter(tmp_path / "snapshot", b"Monday"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert LoraVersions().version(lora("org/adapter")) == LoraVersions().version(lora(tmp_path / "snapshot"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)     # resolved when it is loaded
    assert LoraVersions().version(lora("org/adapter")) != LoraVersions().version(lora("org/adapter"))
