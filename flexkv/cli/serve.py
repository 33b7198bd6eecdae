"""The command ``flexkv serve``."""

import argparse
import socket

from flexkv.cli.service import add_options, load, stop_at_signals
from flexkv.config import process_environment
from flexkv.errors import RegistrationError
from flexkv.protocol.sockets import socket_path
from flexkv.server.daemon import Daemon
from flexkv.server.launch import is_running, server_port


def _notify_systemd(state: str) -> None:
    """Report a state to systemd, if that has started this process (sd_notify(3))."""
    address = process_environment().get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(state.encode())


def main(argv: list[str]) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="flexkv serve", description="Keep the KV of this node's engines, in one cache that they share."
    )
    add_options(parser)
    parser.add_argument("--socket", default="", help="path at which engines connect (default: server_recv_port)")
    parser.add_argument(
        "--idle-exit", type=float, default=0.0, metavar="SECONDS",
        help="end after so long without an engine (default: never)",
    )
    args = parser.parse_args(argv)
    config = load(args)
    port = args.socket or server_port(config.transfer)
    try:
        daemon = Daemon(config, port, idle_exit_s=args.idle_exit)
    except RegistrationError:
        if args.settings_from_stdin and is_running(socket_path(port)):       # another engine was faster
            return 0
        raise
    stop_at_signals(daemon.stop)
    _notify_systemd("READY=1")
    daemon.run()
    _notify_systemd("STOPPING=1")
    return 0
