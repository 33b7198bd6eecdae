"""Engines with several ranks, on one node and on two: latency of a get, and with GPUs the bandwidth of all ranks."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from flexkv.config import TransferConfig
from flexkv.tools.bench.report import Line, line_of
from flexkv.tools.bench.session import LAYERS, session

_SMALL_BYTES, _LARGE_BYTES = 4096, 1 << 19
"""Bytes of a block in a layer of one rank: for latency, and for bandwidth."""

_SMALL_BLOCKS, _LARGE_BLOCKS = 32, 1024
_COPIES = 8
_SAVING_MODES = ("sharded", "rank0_only")            # the other modes are like one of these
_COUNTS = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (2, 2), (16, 2))


def _copies(pipe: Connection, device: int, num_bytes: int) -> None:
    """Copy from pinned memory to a GPU whenever it is asked."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    pipe.send(None)
    for _ in iter(pipe.recv, "stop"):
        into.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        pipe.send(None)


def _plain_copies(num_ranks: int, num_bytes: int) -> float:
    """Shortest time of plain copies to all GPUs at once, in microseconds."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for device in range(num_ranks):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_copies, args=(theirs, device, num_bytes), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    took = []
    for _ in range(_COPIES + 1):                     # the first reply is that a process is ready
        for pipe in pipes:
            pipe.recv()
        took.append(time.perf_counter_ns())
        for pipe in pipes:
            pipe.send("copy")
    for pipe in pipes:
        pipe.recv()
        pipe.send("stop")
    for process in processes:
        process.join(10)
    return float(np.diff(took)[1:].min() / 1e3)


def _bandwidth(num_ranks: int) -> Line:
    """GB/s of a get by all ranks, beside plain copies to all their GPUs at once."""
    rank_bytes = _LARGE_BLOCKS * _LARGE_BYTES * LAYERS
    with session(_LARGE_BLOCKS, _LARGE_BYTES, True, ranks=num_ranks, num_cpu_blocks=2 * _LARGE_BLOCKS) as loaded:
        took = min([loaded.get(_LARGE_BLOCKS) for _ in range(_COPIES)][1:])
    plain = _plain_copies(num_ranks, rank_bytes)
    ours, ceiling = (num_ranks * rank_bytes / microseconds / 1e3 for microseconds in (took, plain))
    case = f"host to GPU, {num_ranks} GPUs at once"
    return Line("ranks", case, round(ours, 1), "GB/s", round(ceiling, 1), round(plain / took, 3))


def _replicated(num_ranks: int, on_gpu: bool) -> Iterator[Line]:
    """GB/s of KV that is equal on all ranks: a get in an exchange and without, and a put in each mode. Each byte counts
    once."""
    blocks = _LARGE_BLOCKS if on_gpu else _SMALL_BLOCKS
    num_bytes = blocks * _LARGE_BYTES * LAYERS
    plain = [(_SAVING_MODES[0], False)] if on_gpu else []           # processes without GPUs do not exchange
    for mode, exchanges in [*((mode, True) for mode in _SAVING_MODES), *plain]:
        transfer = TransferConfig(kv_shared_across_ranks_mode=mode, exchange_copies=exchanges)
        with session(
            blocks, _LARGE_BYTES, on_gpu, transfer, num_ranks, is_copy=True, num_cpu_blocks=2 * blocks
        ) as loaded:
            saved = min([loaded.put(loaded.other_tokens()) for _ in range(_COPIES)][1:])
            loaded.put(loaded.tokens)                # the others may have evicted it
            took = min([loaded.get(blocks) for _ in range(_COPIES)][1:])
        if exchanges:
            speed = round(num_bytes / saved / 1e3, 1)
            yield Line("ranks", f"save of one copy, {num_ranks} ranks, {mode}", speed, "GB/s")
        if mode == _SAVING_MODES[0]:
            case = f"load of one copy by {num_ranks} ranks" + (", which exchange it" if exchanges and on_gpu else "")
            yield Line("ranks", case, round(num_bytes / took / 1e3, 1), "GB/s")


def run(n: int = 400, counts: Sequence[tuple[int, int]] = _COUNTS) -> Iterator[Line]:
    """Measure ``n`` gets of one block, in microseconds, for each (ranks, nodes) of ``counts``; with GPUs also the
    bandwidth of 1, 2, 4 and 8 of them at once, in GB/s of 1e9 bytes. Last, KV that is equal on two ranks or more."""
    import torch

    for num_ranks, nodes in counts:
        with session(
            _SMALL_BLOCKS, _SMALL_BYTES, ranks=num_ranks, nodes=nodes, num_cpu_blocks=2 * _SMALL_BLOCKS
        ) as loaded:
            took = np.array([loaded.get(1) for _ in range(n)])[n // 10 :]
        where = "" if nodes == 1 else f" on {nodes} nodes"
        yield line_of("ranks", f"get of 1 block, {num_ranks} rank{'s' * (num_ranks > 1)}{where}", took)
    num_gpus = torch.cuda.device_count()
    for num_ranks in (1, 2, 4, 8):
        if num_ranks <= num_gpus:
            yield _bandwidth(num_ranks)
    yield from _replicated(max(2, num_gpus), num_gpus >= 2)
