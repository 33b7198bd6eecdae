"""The command ``flexkv node``."""

import argparse
import os
import select
import threading
from contextlib import suppress

from flexkv.cli.service import add_options, load, stop_at_signals
from flexkv.config import runtime_directory
from flexkv.errors import ConfigError
from flexkv.server.storage_host import StorageHost


def main(argv: list[str]) -> int:
    """Run the storage host until SIGTERM or SIGINT; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="flexkv node",
        description="Keep this node's part of the KV of an engine whose first node is another one.",
    )
    add_options(parser)
    parser.add_argument(
        "--register", default="", metavar="SOCKET",
        help="path at which the ranks of this node register (default: gpu_register_port)",
    )
    parser.add_argument("--parent", type=int, default=0, metavar="PID", help="end when this process, the parent, ends")
    args = parser.parse_args(argv)
    config = load(args)
    if not config.transfer.node_secret:
        raise ConfigError("node_secret", "", "must be set to the same text on all nodes")
    port = args.register or config.transfer.gpu_register_port or f"ipc://{runtime_directory()}/register-0.sock"
    host = StorageHost(config, port)
    stop_at_signals(host.stop)
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
