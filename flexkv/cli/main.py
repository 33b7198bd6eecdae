"""The command ``flexkv``."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence

import flexkv
from flexkv.errors import FlexKVError

_USAGE = """\
usage: flexkv COMMAND [OPTIONS]

  serve    keep the KV of this node's engines in one cache that they share
  node     keep a node's part of the KV of an engine whose first node is another one
  demo     run a real vLLM that loads KV from memory and SSD instead of computing it
  bench    measure the control plane, a disk (ssd) or a GPU (gpu)
  replay   compute the hit rate of a trace of requests, by capacity and eviction policy
  config   print the configuration reference, check settings, show them
  inspect  show the contents of directories of the SSD tier
  pin      keep a prefix in the cache of a running engine
  unpin    release a pinned prefix
  pins     list the pinned prefixes

flexkv COMMAND --help lists the options of a command."""

_SIGINT_STATUS = 128 + signal.SIGINT
_SIGPIPE_STATUS = 128 + signal.SIGPIPE
"""Exit statuses, as shells report them, after an interrupt and after a write to a pipe without a reader."""


def _serve(argv: list[str]) -> int:
    from flexkv.cli.serve import main

    return main(argv)


def _node(argv: list[str]) -> int:
    from flexkv.cli.node import main

    return main(argv)


def _demo(argv: list[str]) -> int:
    from flexkv.tools.demo.command import main

    return main(argv)


def _bench(argv: list[str]) -> int:
    from flexkv.tools.bench import main

    return main(argv)


def _replay(argv: list[str]) -> int:
    from flexkv.tools.replay import main

    return main(argv)


def _config(argv: list[str]) -> int:
    from flexkv.cli.config import main

    return main(argv)


def _inspect(argv: list[str]) -> int:
    from flexkv.cli.inspect import main

    return main(argv)


def _pin(argv: list[str]) -> int:
    from flexkv.cli.pin import pin

    return pin(argv)


def _unpin(argv: list[str]) -> int:
    from flexkv.cli.pin import unpin

    return unpin(argv)


def _pins(argv: list[str]) -> int:
    from flexkv.cli.pin import pins

    return pins(argv)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve, "node": _node, "demo": _demo, "bench": _bench, "replay": _replay, "config": _config,
    "inspect": _inspect, "pin": _pin, "unpin": _unpin, "pins": _pins,
}


def _usage(args: Sequence[str]) -> int:
    """Print the usage, on request or with the error of an unknown command; returns the exit status."""
    if args and args[0] in ("--help", "-h", "help"):
        print(_USAGE)
        return 0
    print(_USAGE, file=sys.stderr)
    if args:
        close = difflib.get_close_matches(args[0].lower(), _COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"\nflexkv: unknown command {args[0]!r}{hint}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        print(f"flexkv {flexkv.__version__}")
        return 0
    if not args or args[0] not in _COMMANDS:
        return _usage(args)
    try:
        status = _COMMANDS[args[0]](args[1:])
        sys.stdout.flush()
        return status
    except FlexKVError as error:
        print(f"flexkv {args[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _SIGINT_STATUS
    except BrokenPipeError:              # the reader (for example head) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # else the interpreter writes the rest at exit and fails
        return _SIGPIPE_STATUS

