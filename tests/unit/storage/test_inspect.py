"""``flexkv inspect``."""

import json
import os
from pathlib import Path

import pytest

from flexkv.cli import main
from tests.tier import SLOT_BYTES, opened


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
    assert "cannot be read" in capsys.readouterr().err
