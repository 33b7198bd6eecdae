"""A storage host that an engine starts: has its settings, and ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexkv.errors import ConfigError
from flexkv.server import node_launch
from flexkv.transfer_manager import TransferManagerOnRemote
from tests.support.harness import until
from tests.support.node_cluster import SECRET, free_port

_ENGINE = """
import sys
from flexkv.errors import ConfigError
from flexkv.server import node_launch
from flexkv.transfer_manager import TransferManagerOnRemote
manager = TransferManagerOnRemote.create_process("127.0.0.1", ("1", "2", "3"), node_secret="s")
print(manager.pid, flush=True)
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_runs_until_it_is_shut_down(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    manager = TransferManagerOnRemote.create_process(
        "127.0.0.1", port, gpu_register_port="/tmp/unused", node_secret=SECRET, num_cpu_blocks=None
    )
    seen = ""

    def tries() -> bool:
        nonlocal seen
        seen += capfd.readouterr().err
        return f"no connection to the controller at 127.0.0.1:{port}" in seen

    until(tries, 20.0)
    assert manager.is_alive()
    manager.join(0.01)
    assert manager.is_alive()
    manager.shutdown()
    assert not manager.is_alive()


def test_without_a_secret_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="node_secret"):
        TransferManagerOnRemote.create_process("127.0.0.1", "5556,5557")


def test_one_that_fails_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_launch, "_FIRST_PAUSE_S", 0.01)
    manager = TransferManagerOnRemote.create_process("127.0.0.1", free_port(), node_secret=SECRET)
    first = manager.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: manager.pid != first and manager.is_alive(), 10.0)
    manager.shutdown()
    assert not manager.is_alive()


def test_one_that_was_terminated_in_the_pause_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_launch, "_FIRST_PAUSE_S", 0.2)
    manager = TransferManagerOnRemote.create_process("127.0.0.1", free_port(), node_secret=SECRET)
    first = manager.pid
    os.kill(first, signal.SIGKILL)
    manager.join(5.0)
    manager.terminate()
    time.sleep(0.5)
    assert manager.pid == first
    assert not manager.is_alive()


def test_it_ends_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", _ENGINE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        assert is_running(pid)
        engine.send_signal(signal.SIGKILL)
    until(lambda: not is_running(pid), 20.0)
