"""How an engine finds the daemon, and starts one where none runs."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexkv.config import CacheConfig, TransferConfig, process_environment, runtime_directory
from flexkv.errors import FlexKVError, RegistrationError
from flexkv.protocol.sockets import connect, socket_path

logger = logging.getLogger("flexkv.server")

_FLEXKV = "import sys; sys.path.remove(''); from flexkv.cli.main import main; sys.exit(main())"
"""The command ``flexkv`` of this interpreter and its path, wherever it is installed; not that of the directory in which
the engine runs."""

_started: list["subprocess.Popen[bytes]"] = []
"""Daemons that this process has started: they outlive it."""

_IDLE_EXIT_S = 60.0
"""A daemon that an engine has started ends after so long without an engine, in seconds."""


def server_port(config: TransferConfig) -> str:
    """The daemon's socket."""
    return config.server_recv_port or f"ipc://{runtime_directory()}/server.sock"


def is_running(path: Path) -> bool:
    """Whether a daemon listens at a path."""
    try:
        connect(path, time.monotonic()).close()
    except (RegistrationError, OSError):
        return False
    return True


def with_daemon(config: TransferConfig) -> TransferConfig:
    """The settings of an engine that uses the daemon, if one listens at the default socket; else the same settings."""
    if config.uses_daemon:
        return config
    try:
        path = socket_path(server_port(config))
    except FlexKVError:                              # there is no directory for sockets
        return config
    return config.replace(server_client_mode=True) if is_running(path) else config


def _given(config: CacheConfig | TransferConfig) -> dict[str, Any]:
    """The settings that are not the defaults."""
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def start_command(arguments: Sequence[str], settings: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
    """Start a command of ``flexkv`` that outlives this process's session, with settings for its standard input.

    Raises
    ------
    OSError
        It cannot be started.
    """
    environment = process_environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    process = subprocess.Popen(
        [sys.executable, "-c", _FLEXKV, *arguments, "--settings-from-stdin"], stdin=subprocess.PIPE,
        start_new_session=True, env=environment,
    )
    assert process.stdin is not None  # narrowing: a pipe
    with suppress(BrokenPipeError), process.stdin as pipe:       # it may have ended: its status shows that
        pipe.write(json.dumps(settings, default=dict).encode())
    return process


def ensure_daemon(path: Path, cache: CacheConfig, transfer: TransferConfig) -> None:
    """Start a daemon with these settings, unless one listens at the path. It outlives this process, and ends when no
    engine has used it for a minute. Of several that start at once, one stays."""
    if is_running(path):
        return
    _started[:] = [process for process in _started if process.poll() is None]
    settings = {**_given(cache), **_given(transfer)}
    for name in ("tokens_per_block", "gpu_register_port"):
        settings.pop(name, None)
    try:
        process = start_command(
            ["serve", "--socket", str(path), "--idle-exit", str(_IDLE_EXIT_S)], settings
        )
    except OSError as error:
        logger.error("no daemon at %s, and none can be started: %s", path, error)
        return
    _started.append(process)
    logger.info("no daemon at %s: started one (process %d)", path, process.pid)
