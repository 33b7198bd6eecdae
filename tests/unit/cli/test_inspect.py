"""``flexkv inspect``."""

import json
import os
from pathlib import Path

import pytest

from flexkv.cli.main import main
from tests.support.ssd_store import SLOT_BYTES, opened


def test_inspect_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened([tmp_path / "a"]) as tier:
        assert tier.write(range(5)).all()
        assert main(["inspect", "--json", str(tmp_path / "a")]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["used_by"].startswith(f"process {os.getpid()} ")
        assert (told["num_slots"], told["slot_bytes"], told["closed_cleanly"]) == (16, SLOT_BYTES, False)
        assert told["slots"] == {"used": 5, "void": 0, "broken": 0, "unreadable": 0, "empty": 11}
        assert list(told["domains"].values()) == [5]
        tier.store.clear()
    assert main(["inspect", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "16 slots of 4096 bytes: 0" not in text
    assert "5 void, 11 empty" in text
    assert "not in use; closed cleanly; last cleared: 20" in text
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path} is not a directory of the SSD tier" in error
    assert "cannot be read" in error


def test_inspect_of_a_directory_that_is_not_closed_or_has_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened([tmp_path / "a"]) as tier:
        assert tier.write(range(5)).all()
        assert main(["inspect", str(tmp_path / "a")]) == 0
        text = capsys.readouterr().out
        assert f"used by process {os.getpid()} " in text
        assert "closed" not in text                                 # it cannot be, while it is in use
        (tmp_path / "killed").mkdir()
        (tmp_path / "killed" / "flexkv.table").write_bytes((tmp_path / "a" / "flexkv.table").read_bytes())
    assert main(["inspect", str(tmp_path / "killed")]) == 0
    text = capsys.readouterr().out
    assert "not in use; not closed cleanly; last cleared: never" in text
    assert "flexkv.data is missing: no block can be read" in text
    (tmp_path / "killed" / "flexkv.data").write_bytes(bytes(SLOT_BYTES))
    assert main(["inspect", str(tmp_path / "killed")]) == 0
    assert f"flexkv.data is too short by {15 * SLOT_BYTES} bytes" in capsys.readouterr().out
