"""The command ``flexkv`` as a process: how it ends."""

import json
import os
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


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "flexkv.cli", *command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["demo", "bench", "replay", "config", "inspect", "pin", "unpin", "pins"])
def test_every_command_has_help(command: str) -> None:
    status, output = run(command, "--help")
    assert (status, output.split()[:3]) == (0, ["usage:", "flexkv", command])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "ssd", "--dir", "/nope"], "--dir /nope is not a folder"),
        (["bench", "ssd", "--dir", "/proc/self"], "choose a folder"),
        (["bench", "gds", "--dir", os.devnull], "is not a folder"),
        (["inspect", "/nope"], "/nope is not a directory of the SSD tier"),
        (["inspect", os.devnull], "Not a directory"),
        (["replay", "/nope"], "/nope cannot be read: No such file"),
        (["replay", "/"], "cannot be read: Is a directory"),
        (["replay", "/dev/zero"], "/dev/zero is not an ordinary file"),
        (["pins", "--socket", "tcp://1.2.3.4:80"], "a path or ipc://PATH"),
        (["pins", "--socket", "/nope"], "no controller listens at /nope; start"),
        (["pin", "--socket", "/nope", "--tokens", "/nope"], "/nope cannot be read"),
    ],
)
def test_faults_are_lines_and_no_tracebacks(command: list[str], message: str) -> None:
    status, output = run(*command)
    assert status in (1, 2)
    assert message in output
    assert "Traceback" not in output
