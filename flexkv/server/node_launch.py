"""How an engine starts the storage host on each of its nodes but the first."""

import logging
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from flexkv.config import load_config
from flexkv.errors import ConfigError
from flexkv.server.launch import start_command

logger = logging.getLogger("flexkv.server")

_END_S = 10.0


_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
"""Pause before a storage host that has failed is started again, in seconds; it doubles each time."""


class TransferManagerOnRemote:
    """The process of a storage host (``flexkv node``), under upstream's name. It ends with the process that started it.
    If it ends before ``terminate`` or ``shutdown``, it is started again after 1 to 30 s, as another process.

    Parameters
    ----------
    arguments : sequence of str
        Of the command ``flexkv``.
    settings : mapping
    """

    def __init__(self, arguments: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._arguments, self._settings = list(arguments), dict(settings)
        self._ending, self._lock = threading.Event(), threading.Lock()
        self._process = self._start()
        threading.Thread(target=self._supervise, name="flexkv-node", daemon=True).start()

    @classmethod
    def create_process(
        cls, master_host: str = "", master_ports: str | int | Sequence[str | int] = "", *, gpu_register_port: str = "",
        **settings: Any,
    ) -> "TransferManagerOnRemote":
        """Start the storage host of this node.

        Parameters
        ----------
        master_host : str
            Address of the engine's first node; empty: the setting.
        master_ports : str, int or sequence
            TCP port of the first node, or several, of which the first is used; empty: the setting.
        gpu_register_port : str
            Socket at which the ranks of this node register; empty: the setting.
        settings : optional
            Further settings of the storage host, such as ``cpu_cache_gb``; None: not given.

        Raises
        ------
        ConfigError
            ``node_secret`` is not set.
        """
        given = master_ports if isinstance(master_ports, str | int) else ",".join(map(str, master_ports))
        settings |= {"master_host": master_host or None, "master_ports": str(given) or None}
        values = {key: value for key, value in settings.items() if value is not None}
        if not load_config(**values).transfer.node_secret:
            raise ConfigError("node_secret", "", "must be set to the same text on all nodes")
        register = ["--register", gpu_register_port] if gpu_register_port else []
        return cls(["node", "--parent", str(os.getpid()), *register], values)

    def _start(self) -> "subprocess.Popen[bytes]":
        process = start_command(self._arguments, self._settings)
        logger.info("started the storage host of this node (process %d)", process.pid)
        return process

    def _supervise(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            status = self._process.wait()
            if self._ending.is_set():
                return
            logger.error("the storage host of this node has ended with status %d: it is started again", status)
            if self._ending.wait(pause):
                return
            pause = min(_MAX_PAUSE_S, 2 * pause)
            with self._lock:                         # no process may start after ``terminate``
                if self._ending.is_set():
                    return
                try:
                    self._process = self._start()
                except OSError as error:
                    logger.error("the storage host cannot be started: %s", error)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the current process, at most ``timeout`` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            logger.debug("the storage host still runs")

    def terminate(self) -> None:
        """Ask the process to end, for good."""
        with self._lock:
            self._ending.set()
            self._process.terminate()

    def shutdown(self) -> None:
        """End the process; it is killed if it does not end in time."""
        self.terminate()
        self.join(_END_S)
        if self.is_alive():
            self._process.kill()
            self.join()
