"""An engine finds the daemon, or starts one with its own settings."""

import os
import signal
import time
from pathlib import Path

import pytest

from flexkv.config import CacheConfig, TransferConfig
from flexkv.errors import ConfigError
from flexkv.protocol.peer_process import peer_credentials
from flexkv.protocol.sockets import connect
from flexkv.server import launch
from flexkv.server.launch import ensure_daemon, is_running, server_port, with_daemon
from tests.support.daemon import engine, running
from tests.support.harness import until


@pytest.mark.parametrize(("settings", "uses"), [
    ({}, False), ({"server_client_mode": True}, True), ({"server_recv_port": "/tmp/s"}, True),
    ({"instance_num": 2}, True),
    ({"instance_id": 1}, False), ({"server_launch_mode": "external"}, False),
])
def test_settings_that_ask_for_a_daemon(settings: dict[str, object], uses: bool) -> None:
    assert TransferConfig(**settings).uses_daemon is uses       # type: ignore[arg-type]


def test_the_socket_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert server_port(TransferConfig()) == f"ipc://{tmp_path}/flexkv/server.sock"
    assert server_port(TransferConfig(server_recv_port="ipc:///tmp/x")).endswith("/tmp/x")


def test_a_daemon_at_the_default_socket_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "flexkv").mkdir(mode=0o700)
    config = TransferConfig()
    assert with_daemon(config) is config
    with running(tmp_path / "flexkv" / "server.sock"):
        assert with_daemon(config).uses_daemon

    def fails() -> Path:
        raise ConfigError("XDG_RUNTIME_DIR", "/no", "no directory")

    monkeypatch.setattr("flexkv.server.launch.runtime_directory", fails)
    assert with_daemon(config) is config


def test_a_daemon_that_an_engine_starts_has_its_settings_and_outlives_it(tmp_path: Path) -> None:
    path = tmp_path / "server"
    assert not is_running(path)
    cache = CacheConfig(num_cpu_blocks=20, namespaces={"calm": {"guaranteed": 0.25}}, key_secret="s" * 40)
    for _ in range(2):                                          # of two at once, one stays
        ensure_daemon(path, cache, TransferConfig(gpu_register_port="/tmp/no", op_timeout_s=7.0))
    until(lambda: is_running(path), 20.0)
    # the other has found the path in use: it must not start to listen once the first has ended
    until(lambda: sum(process.poll() is None for process in launch._started) == 1, 20.0)
    with connect(path, time.monotonic() + 5.0) as connection:
        pid, _ = peer_credentials(connection)
    try:
        with engine(path, tmp_path / "r") as (manager, _, _):
            stats = manager.stats()
            assert stats["num_slots"] == 20
            assert "namespace_calm_blocks" in stats
        assert is_running(path)
    finally:
        os.kill(pid, signal.SIGTERM)
    until(lambda: all(process.poll() is not None for process in launch._started), 10.0)
    assert not path.exists()
