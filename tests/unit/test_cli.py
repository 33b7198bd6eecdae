"""The command ``flexkv`` as a process: how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [["replay", "TRACE", "--json"], ["config"], ["bench", "hash"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path, arguments: list[str]) -> None:
    trace = tmp_path / "trace"
    trace.write_text("".join(json.dumps({"timestamp": i, "hash_ids": [i]}) + "\n" for i in range(9)))
    command = [str(trace) if word == "TRACE" else word for word in arguments]
    with subprocess.Popen(
        [sys.executable, "-m", "flexkv.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()                              # before it has written anything
        assert process.stderr.read() == b""
        assert process.wait() == 128 + 13
