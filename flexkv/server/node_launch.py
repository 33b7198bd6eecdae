"""How an engine starts the storage host on each of its nodes but the first."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from flexkv.config import process_environment
from flexkv.server.launch import FLEXKV

logger = logging.getLogger("flexkv.server")

_END_S = 10.0


class TransferManagerOnRemote:
    """The process of a storage host (``flexkv node``), under upstream's name. It ends with the process that started
    it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @classmethod
    def create_process(
        cls, master_host: str = "", master_ports: str | int | Sequence[str | int] = "", *, gpu_register_port: str = "",
        **settings: object,
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
        """
        given = master_ports if isinstance(master_ports, str | int) else ",".join(map(str, master_ports))
        settings |= {"master_host": master_host or None, "master_ports": str(given) or None}
        command = [sys.executable, "-c", FLEXKV, "node", "--parent", str(os.getpid()), "--settings-from-stdin"]
        if gpu_register_port:
            command += ["--register", gpu_register_port]
        environment = process_environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)
        assert process.stdin is not None  # narrowing: a pipe
        with process.stdin as pipe:
            pipe.write(json.dumps({key: value for key, value in settings.items() if value is not None}).encode())
        logger.info("started the storage host of this node (process %d)", process.pid)
        return cls(process)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the process, at most ``timeout`` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            logger.debug("the storage host still runs")

    def terminate(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def shutdown(self) -> None:
        """End the process; it is killed if it does not end in time."""
        self.terminate()
        self.join(_END_S)
        if self.is_alive():
            self._process.kill()
            self.join()
