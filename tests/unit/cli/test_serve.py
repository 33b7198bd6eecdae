"""``flexkv serve`` as a process."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

from flexkv.cli.main import main
from flexkv.config import process_environment
from flexkv.server.launch import is_running
from tests.support.harness import until

COMMAND = [sys.executable, "-m", "flexkv.cli", "serve", "--socket"]


def test_it_reports_to_systemd_and_ends_at_sigterm(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(20.0)
        process = subprocess.Popen(
            [*COMMAND, str(tmp_path / "s")], env=process_environment(NOTIFY_SOCKET=str(tmp_path / "notify"))
        )
        assert notify.recv(100) == b"READY=1"
        assert is_running(tmp_path / "s")
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        other = subprocess.run([*COMMAND, str(tmp_path / "s")], capture_output=True, text=True, timeout=20, check=False)
        assert other.returncode == 1
        assert "listens at" in other.stderr
        process.send_signal(signal.SIGTERM)
        assert notify.recv(100) == b"STOPPING=1"
        assert process.wait(10) == 0
    assert not (tmp_path / "s").exists()


def test_it_ends_when_it_is_not_used(tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, str(tmp_path / "s"), "--idle-exit", "0.1"])
    until(lambda: process.poll() is not None, 20.0)
    assert process.returncode == 0


def test_a_file_that_does_not_exist(tmp_path: Path, capsys: object) -> None:
    assert main(["serve", "--config", str(tmp_path / "no.yaml")]) == 1
