"""How fast each policy replays traces, in one process.

``python -m tests.bench.replay_speed --capacity-tokens 1000000 TRACE [TRACE]`` prints microseconds a request and million
blocks a second, in processor time of the replay alone, the best of three.
"""

import argparse
import time
from pathlib import Path

from flexkv.cache.eviction import POLICIES
from flexkv.tools.replay.reader import read_trace
from flexkv.tools.replay.simulation import Simulation
from flexkv.tools.replay.trace import Trace

_RUNS = 3


def seconds(trace: Trace, policy: str, capacity_blocks: int) -> float:
    """Processor time of one replay."""
    simulation = Simulation(policy, min(capacity_blocks, trace.num_distinct))
    start = time.process_time()
    simulation.run(trace)
    return time.process_time() - start


def main() -> None:
    """Print a row for each trace and policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", nargs="+", type=Path)
    parser.add_argument("--capacity-tokens", type=int, required=True)
    args = parser.parse_args()
    for path in args.trace:
        trace = read_trace(path)
        for policy in POLICIES:
            best = min(seconds(trace, policy, args.capacity_tokens // trace.block_tokens) for _ in range(_RUNS))
            print(f"{trace.name:<28} {policy:<10} {best / trace.num_requests * 1e6:8.1f} us "
                  f"{trace.num_blocks / best / 1e6:8.2f} M blocks/s", flush=True)


if __name__ == "__main__":
    main()
