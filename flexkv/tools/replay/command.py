"""The command ``flexkv replay``."""

import argparse
import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flexkv.cache.eviction import POLICIES
from flexkv.config import CacheConfig
from flexkv.config.values import COUNTS, read_number
from flexkv.errors import ConfigError, TraceError
from flexkv.tools.replay.bounds import unbounded_hits
from flexkv.tools.replay.curves import check_plot, plot
from flexkv.tools.replay.model import Model, find_model
from flexkv.tools.replay.reader import MAX_BLOCK_TOKENS, read_trace
from flexkv.tools.replay.report import Line, show_json, show_table
from flexkv.tools.replay.simulation import Outcome
from flexkv.tools.replay.trace import Trace
from flexkv.tools.replay.workers import OPT, Task, outcomes

_SWEEP = 8
"""Number of capacities if none is given. Each is half of the next; the largest is the number of different blocks."""

_ALWAYS = (OPT, "unbounded")
"""References that are always printed."""

_PAGE_BYTES = 4096
"""Size of a memory page in bytes; the size of a slot is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes of the tiers, in tokens; ``ssd`` 0: no SSD tier. A size is rounded down to whole blocks."""

    host: int
    ssd: int = 0


def main(argv: list[str]) -> int:
    """Replay traces and print the hit rates; returns the exit status."""
    args = _parse(argv)
    policies = _policies(args.policy)
    model = _model(args)
    if args.plot:
        check_plot(args.plot)           # before the work, not after it
    for path in args.trace[1:]:
        if not path.exists():
            raise TraceError(str(path), 0, "cannot be read: No such file or directory")
    lines: list[Line] = []

    def results() -> Generator[Line]:
        for path in args.trace:
            trace = read_trace(path, args.block_tokens)
            capacities = _capacities(args, trace, model)
            with closing(
                replay(trace, policies, capacities, model, args.ssd_admission == "all", args.jobs)
            ) as of_trace:
                for line in of_trace:
                    lines.append(line)
                    yield line

    with closing(results()) as shown:
        if args.json:
            show_json(shown)
        else:
            show_table(shown, _optional_columns(args, model))
    if args.plot:
        plot(lines, args.plot)
    return 0


def replay(
    trace: Trace, policies: list[str], capacities: list[Capacity], model: Model | None = None, write_all: bool = False,
    jobs: int = 1,
) -> Generator[Line]:
    """Replay a trace with each policy at each capacity, and compute the upper bounds.

    Parameters
    ----------
    model : Model, optional
        Needed for the bytes written to SSD, and for the prefill time saved.
    write_all : bool
        Write all blocks to SSD; see ``WriteBack``.
    jobs : int
        Number of processes that share the work.
    """
    size = trace.block_tokens
    work = []
    for capacity in capacities:
        # slots beyond the number of different blocks have no effect
        host, ssd = (min(tokens // size, trace.num_distinct) for tokens in (capacity.host, capacity.ssd))
        work += [(capacity, Task(policy, max(1, host), ssd, write_all)) for policy in [*policies, OPT]]
    with closing(outcomes(trace, [task for _, task in work], jobs)) as results:
        for (capacity, task), outcome in zip(work, results, strict=True):
            yield _line(trace, task.policy, capacity, outcome, model)
    yield _line(trace, "unbounded", Capacity(trace.num_distinct * size), Outcome(unbounded_hits(trace)), model)


def _line(trace: Trace, policy: str, capacity: Capacity, outcome: Outcome, model: Model | None) -> Line:
    size, blocks = trace.block_tokens, max(1, trace.num_blocks)
    written = per_day = None
    tiered = capacity.ssd > 0 and policy in POLICIES
    if tiered and model is not None:
        written = outcome.ssd_written * _slot_bytes(size, model)
        if trace.is_timed and trace.duration_s > 0:
            per_day = round(outcome.ssd_written / (capacity.ssd // size) * 86_400 / trace.duration_s, 3)
    rate = model.prefill_tokens_per_s if model is not None else 0.0
    return Line(
        trace.name, policy, capacity.host, round(outcome.hits / blocks, 6), trace.num_requests,
        trace.num_blocks,
        ssd_capacity_tokens=capacity.ssd or None,
        host_hit_rate=round(outcome.host_hits / blocks, 6) if tiered else None,
        ssd_written_bytes=written,
        ssd_drive_writes_per_day=per_day,
        prefill_seconds_saved=round(outcome.hits * size / rate, 1) if rate else None,
    )


def _slot_bytes(block_tokens: int, model: Model) -> int:
    return -(-block_tokens * model.kv_bytes_per_token // _PAGE_BYTES) * _PAGE_BYTES


# ---- arguments ------------------------------------------------------------------------------------------------------


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flexkv replay", description="Compute the hit rate that a trace of requests would have had. Two "
        "references are added: opt knows the future, unbounded keeps everything.",
    )
    parser.add_argument("trace", nargs="+", type=Path, help="recorded by FlexKV, or JSON lines; may be .gz or .xz")
    parser.add_argument("--block-tokens", type=_block_tokens, metavar="N",
                        help="block size of a JSON trace, instead of its own; FlexKV's traces have theirs")
    parser.add_argument("--policy", default=",".join({CacheConfig.eviction_policy: 0, "lru": 0}), metavar="NAME[,NAME]",
                        help=f"all, or of: {', '.join(POLICIES)} (default %(default)s)")
    parser.add_argument("--capacity-tokens", type=_list_of_whole, metavar="N[,N]",
                        help="sizes of host memory, such as 500k,1M (default: 8 sizes, up to all blocks of the trace)")
    parser.add_argument("--host-gb", type=_positive, metavar="G",
                        help="GiB of host memory, instead of --capacity-tokens; needs --model")
    parser.add_argument("--ssd-gb", type=_positive, metavar="G", help="GiB of SSD; needs --host-gb")
    parser.add_argument("--ssd-admission", choices=("second_touch", "all"), default=CacheConfig.ssd_admission,
                        help="blocks that are written to SSD (default %(default)s)")
    parser.add_argument("--model", metavar="NAME",
                        help="model that gives KV bytes and prefill speed; see docs/sizing.md")
    parser.add_argument("--kv-bytes-per-token", type=_whole, metavar="N", help="instead of the model's")
    parser.add_argument("--prefill-tokens-per-s", type=_positive, metavar="N", help="instead of the model's")
    parser.add_argument("--jobs", type=_whole, metavar="N", default=len(os.sched_getaffinity(0)),
                        help="processes that replay side by side (default: processors, %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw hit rate over capacity")
    args = parser.parse_args(argv)
    if args.capacity_tokens and args.host_gb:
        parser.error("--capacity-tokens and --host-gb: give one of them")
    if args.ssd_gb and not args.host_gb:
        parser.error("--ssd-gb needs --host-gb")
    if args.host_gb and not (args.model or args.kv_bytes_per_token):
        parser.error("--host-gb needs --model or --kv-bytes-per-token")
    if args.host_gb and args.plot:
        parser.error("--plot needs several capacities: give --capacity-tokens, or no size")
    return args


def _whole(text: str) -> int:
    number = read_number(text, int, COUNTS)
    if number is None or not 1 <= number < 1 << 62:
        raise ValueError
    return int(number)


def _block_tokens(text: str) -> int:
    number = _whole(text)
    if number > MAX_BLOCK_TOKENS:
        raise ValueError
    return number


def _list_of_whole(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e15:
        raise ValueError
    return number


_whole.__name__ = "whole number, at least 1"                    # argparse shows it as the expected value
_block_tokens.__name__ = f"whole number from 1 to {MAX_BLOCK_TOKENS}"
_list_of_whole.__name__ = "list of whole numbers"
_positive.__name__ = "number above 0"


def _policies(text: str) -> list[str]:
    names = list(dict.fromkeys(POLICIES if text == "all" else text.split(",")))
    for name in names:
        if name not in POLICIES and name not in _ALWAYS:
            raise ConfigError("--policy", name, f"must be all, or of {', '.join([*POLICIES, *_ALWAYS])}")
    return [name for name in names if name not in _ALWAYS]


def _model(args: argparse.Namespace) -> Model | None:
    model = find_model(args.model) if args.model else Model(0, 0.0)
    model = Model(args.kv_bytes_per_token or model.kv_bytes_per_token,
                  args.prefill_tokens_per_s or model.prefill_tokens_per_s)
    return model if model.kv_bytes_per_token or model.prefill_tokens_per_s else None


def _capacities(args: argparse.Namespace, trace: Trace, model: Model | None) -> list[Capacity]:
    size = trace.block_tokens
    if args.host_gb and model is not None:
        slot_bytes = _slot_bytes(size, model)
        host, ssd = (int((gb or 0) * (1 << 30)) // slot_bytes for gb in (args.host_gb, args.ssd_gb))
        if host == 0 or (args.ssd_gb and ssd == 0):
            raise ConfigError("--host-gb", args.host_gb, f"a block of this trace takes {slot_bytes / (1 << 30):g} GiB")
        return [Capacity(host * size, ssd * size)]
    if not args.capacity_tokens:
        sweep = {max(1, trace.num_distinct >> shift) for shift in range(_SWEEP)}
        return [Capacity(blocks * size) for blocks in sorted(sweep)]
    for tokens in args.capacity_tokens:
        if tokens < size:
            raise ConfigError("--capacity-tokens", tokens, f"must be at least a block of {size} tokens")
    return [Capacity(tokens) for tokens in args.capacity_tokens]


def _optional_columns(args: argparse.Namespace, model: Model | None) -> set[str]:
    columns = set()
    if args.ssd_gb:
        columns |= {"ssd_capacity_tokens", "host_hit_rate", "ssd_written_bytes", "ssd_drive_writes_per_day"}
    if model is not None and model.prefill_tokens_per_s:
        columns.add("prefill_seconds_saved")
    return columns
