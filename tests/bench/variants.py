"""How far the default policy is from the best fixed one, on variants of traces: other times, loops, Zipf, scans, turns.

``python -m tests.bench.variants conversation.jsonl.gz agentic.jsonl.xz`` prints one JSON object for each point and
policy, like ``flexkv replay --json``. All of it is drawn from fixed seeds.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.eviction import POLICIES
from flexkv.tools.replay.bounds import optimal_hits
from flexkv.tools.replay.reader import read_trace
from flexkv.tools.replay.simulation import Simulation
from flexkv.tools.replay.trace import Trace, make_trace

Point = tuple[Trace, list[int]]
"""A trace, and capacities in blocks."""

Requests = list[tuple[float, NDArray[np.uint64]]]
"""Seconds, and block ids."""


def _sequence(name: int, blocks: int) -> NDArray[np.uint64]:
    return (np.uint64(name) << np.uint64(20)) + np.arange(blocks, dtype=np.uint64)


def _trace(name: str, requests: Requests) -> Trace:
    return make_trace(name, 1, [time for time, _ in requests], [sequence for _, sequence in requests])


def loops() -> Iterator[Point]:
    """The same sequences in the same order, again and again: 20 blocks each, one block each, and beside chance."""
    sequences = [_sequence(i, 20) for i in range(300)]
    yield _trace("loop", [(float(i), sequences[i % 300]) for i in range(6000)]), [1000, 3000, 5400]
    yield _trace("loop of single blocks", [(0.1 * i, _sequence(i % 3000, 1)) for i in range(40000)]), [600, 1500, 2700]
    rng = np.random.default_rng(1)
    popular = _zipf(rng, 0.9, 2000, 6000)
    mixed: Requests = []
    for i in range(6000):
        mixed += [(float(i), sequences[i % 300]), (i + 0.5, _sequence(1000 + int(popular[i]), 4))]
    yield _trace("loop beside zipf", mixed), [2000, 6000]


def _zipf(rng: np.random.Generator, exponent: float, names: int, count: int) -> NDArray[np.int64]:
    weights = 1 / np.arange(1, names + 1) ** exponent
    return rng.choice(names, count, p=weights / weights.sum())


def zipfs() -> Iterator[Point]:
    """Sequences of four blocks by popularity alone; with a scan; and with popularity that changes."""
    for exponent in (0.6, 0.9, 1.2):
        names = _zipf(np.random.default_rng(2), exponent, 5000, 30000)
        yield _trace(f"zipf {exponent}", [(0.1 * i, _sequence(int(name), 4)) for i, name in enumerate(names)]), [
            500, 2000, 8000]
    names = _zipf(np.random.default_rng(3), 0.9, 5000, 20000)
    scanned: Requests = []
    for i, name in enumerate(names):
        scanned += [(0.1 * i, _sequence(int(name), 4))]
        if i % 4 == 0:
            scanned += [(0.1 * i + 0.05, _sequence(10000 + i, 16))]
    yield _trace("zipf 0.9 with a scan", scanned), [500, 2000, 8000]
    shifted = [(0.1 * i, _sequence(int(name) + 5000 * (i // 7500), 4)) for i, name in enumerate(
        _zipf(np.random.default_rng(4), 0.9, 5000, 30000))]
    yield _trace("zipf 0.9 that changes", shifted), [500, 2000, 8000]


def prompts() -> Iterator[Point]:
    """Popular system prompts of 30 blocks, each with a question that occurs once."""
    rng = np.random.default_rng(5)
    requests = [
        (0.5 * i, np.concatenate([_sequence(int(name), 30), _sequence(1000 + i, 10)]))
        for i, name in enumerate(_zipf(rng, 0.9, 200, 8000))
    ]
    yield _trace("system prompts", requests), [500, 1500, 4000]


def turns() -> Iterator[Point]:
    """Conversations that grow by four blocks a turn, with a minute between turns on average, and end by chance."""
    rng = np.random.default_rng(6)
    requests: Requests = []
    for name in range(3000):
        time, length = float(rng.uniform(0, 6000)), int(rng.integers(4, 40))
        while True:
            requests.append((time, _sequence(name, length)))
            if rng.random() < 0.3:
                break
            time, length = time + float(rng.exponential(60)), length + 4
    yield _trace("turns", requests), [500, 1500, 4000]


def other_times(trace: Trace, capacities: list[int]) -> Iterator[Point]:
    """The same requests in the same order."""
    seconds = trace.seconds
    ties = np.arange(len(seconds)) * 1e-6
    for name, times in (("times x 10", 10 * seconds), ("times / 10", seconds / 10), ("times all 0", ties),
                        ("times to the minute", np.maximum.accumulate(seconds // 60 * 60) + ties)):
        yield replace(trace, name=f"{trace.name} {name}", seconds=times), capacities


def points(paths: list[Path]) -> Iterator[Point]:
    """All variants; those of other times of the traces at ``paths``, conversation and agentic."""
    makers: list[Callable[[], Iterator[Point]]] = [loops, zipfs, prompts, turns]
    for make in makers:
        yield from make()
    for path in paths:
        trace = read_trace(path)
        tokens = (1, 3, 10) if trace.block_tokens == 512 else (0.5, 1, 2)
        yield from other_times(trace, [int(millions * 1e6) // trace.block_tokens for millions in tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("trace", nargs="*", type=Path, help="conversation.jsonl.gz, agentic.jsonl.xz")
    parser.add_argument("--policy", default=",".join(POLICIES))
    args = parser.parse_args()
    for trace, capacities in points(args.trace):
        for capacity in capacities:
            for policy in [*args.policy.split(","), "opt"]:
                hits = (optimal_hits(trace, capacity) if policy == "opt"
                        else Simulation(policy, min(capacity, trace.num_distinct)).run(trace).hits)
                print(json.dumps({"trace": trace.name, "policy": policy, "capacity_blocks": capacity,
                                  "hit_rate": round(hits / trace.num_blocks, 6)}), flush=True)


if __name__ == "__main__":
    main()
