"""The command ``flexkv bench``."""

import argparse
from collections.abc import Callable, Iterator

from flexkv.bench import api, gpu, hash, insert, match, memory, recover
from flexkv.bench.report import Line, show

_BENCHES: dict[str, Callable[[int], Iterator[Line]]] = {
    "hash": lambda blocks: hash.run(),
    "match": match.run,
    "insert": insert.run,
    "memory": memory.run,
    "recover": recover.run,
    "api": lambda blocks: api.run(),
    "gpu": lambda blocks: gpu.run(),
}
_EVERYWHERE = [name for name in _BENCHES if name != "gpu"]


def main(argv: list[str]) -> int:
    """Run one bench, or all."""
    parser = argparse.ArgumentParser(prog="flexkv bench", description="Measures; asserts no time, but right results.")
    parser.add_argument("bench", choices=[*_BENCHES, "all"], help="all: those that need no GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the index (default 1,000,000)")
    args = parser.parse_args(argv)
    if not 10_000 <= args.blocks <= 500_000_000:
        parser.error("--blocks must be between 10,000 and 500,000,000")
    chosen = _EVERYWHERE if args.bench == "all" else [args.bench]
    show((line for name in chosen for line in _BENCHES[name](args.blocks)), args.json)
    return 0
