"""The command ``flexkv bench``."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from flexkv.errors import FlexKVError
from flexkv.tools.bench import api, daemon, evict, gds, gpu, hash, insert, match, memory, ranks, recover, ssd, start
from flexkv.tools.bench.report import Line, show

_BENCHES: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "hash": lambda args: hash.run(),
    "match": lambda args: match.run(args.blocks),
    "insert": lambda args: insert.run(args.blocks),
    "evict": lambda args: evict.run(args.blocks),
    "memory": lambda args: memory.run(args.blocks),
    "recover": lambda args: recover.run(args.blocks),
    "api": lambda args: api.run(),
    "daemon": lambda args: daemon.run(),
    "ranks": lambda args: ranks.run(),
    "gpu": lambda args: gpu.run(),
    "ssd": lambda args: ssd.run(args.dir),
    "gds": lambda args: gds.run(args.dir),
    "start": lambda args: start.run(args.gib),
}
_EVERYWHERE = [name for name in _BENCHES if name not in ("gpu", "ssd", "gds", "start")]


def main(argv: list[str]) -> int:
    """Run one benchmark, or all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="flexkv bench", description="Measure parts of FlexKV. Results are checked, times are only reported."
    )
    parser.add_argument("bench", choices=[*_BENCHES, "all"], help="all: every benchmark that needs no GPU and no disk")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the index (default 1,000,000)")
    parser.add_argument("--dir", type=Path, help="for ssd and gds: a folder on the disk, with 1 GiB of free space")
    parser.add_argument("--gib", type=int, default=4, help="for start: GiB of the host pool (default 4)")
    args = parser.parse_args(argv)
    if args.gib < 1:
        parser.error(f"--gib is {args.gib}: it must be 1 or more")
    if args.dir is not None and not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a folder")
    if not 10_000 <= args.blocks <= 500_000_000:
        parser.error("--blocks must be between 10,000 and 500,000,000")
    chosen = _EVERYWHERE if args.bench == "all" else [args.bench]
    try:
        show((line for name in chosen for line in _BENCHES[name](args)), args.json)
    except BrokenPipeError:
        raise
    except OSError as error:                         # the measured disk is full, read-only or missing
        raise FlexKVError(
            f"{args.bench}: {error.filename or args.dir or 'a file'}: {error.strerror or error}; choose a folder that "
            f"can be written to with --dir"
        ) from error
    return 0
