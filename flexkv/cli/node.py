"""The command ``flexkv node``."""

import argparse
import json
import logging
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from flexkv.config import load_config, runtime_directory
from flexkv.errors import ConfigError
from flexkv.server.storage_host import StorageHost


def main(argv: list[str]) -> int:
    """Run the storage host until SIGTERM or SIGINT; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="flexkv node",
        description="Keep this node's part of the KV of an engine whose first node is another one.",
    )
    parser.add_argument("--config", type=Path, help="configuration file (default: FLEXKV_CONFIG_PATH)")
    parser.add_argument(
        "--register", default="", metavar="SOCKET",
        help="path at which the ranks of this node register (default: gpu_register_port)",
    )
    parser.add_argument("--parent", type=int, default=0, metavar="PID", help="end when this process, the parent, ends")
    parser.add_argument("--settings-from-stdin", action="store_true", help=argparse.SUPPRESS)    # by an engine
    args = parser.parse_args(argv)
    if args.config is not None and not args.config.is_file():
        raise ConfigError("--config", str(args.config), "is no file")
    config = load_config(args.config, **(json.load(sys.stdin) if args.settings_from_stdin else {}))
    if not config.transfer.node_secret:
        raise ConfigError("node_secret", "", "must be set to the same text on all nodes")
    logging.basicConfig(
        stream=sys.stderr, level=config.connector.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    port = args.register or config.transfer.gpu_register_port or f"ipc://{runtime_directory()}/register-0.sock"
    host = StorageHost(config, port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: host.stop())
    if args.parent:
        threading.Thread(target=_stop_after, args=(args.parent, host), daemon=True).start()
    host.run()
    return 0


def _stop_after(pid: int, host: StorageHost) -> None:
    """Stop the storage host when its parent, process ``pid``, has ended."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        if os.getppid() == pid:                      # else it had ended, and another process has its number
            select.select([fd], [], [])
        os.close(fd)
    host.stop()
