"""A get through KVManager, from match to bytes in the engine's pages, with the device agent in another process."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from flexkv.tools.bench.report import Line, line_of
from flexkv.tools.bench.session import Session, session

NUM_BLOCKS = 2048
LAYER_BYTES = 16384                   # bytes of a block in a layer: 64 KiB a block in total
TINY_LAYER_BYTES = 16                 # blocks of 64 bytes: measures a get without its copy


def _times(loaded: Session, num_blocks: int, n: int) -> NDArray[np.float64]:
    """Durations of gets of ``num_blocks`` blocks in microseconds, (n,)."""
    return np.array([loaded.get(num_blocks) for _ in range(n + n // 10)])[n // 10 :]


def run(n: int = 2000) -> Iterator[Line]:
    """Measure gets of 1 and of 2,048 blocks of 64 KiB that are in host memory."""
    few = max(10, n // 20)
    with session(NUM_BLOCKS, LAYER_BYTES, num_cpu_blocks=2 * NUM_BLOCKS) as loaded:
        yield line_of("api", "get of 1 block of 64 KiB: match, launch, wait", _times(loaded, 1, n))
        yield line_of("api", "get of 2,048 blocks of 64 KiB", _times(loaded, NUM_BLOCKS, few))
    with session(NUM_BLOCKS, TINY_LAYER_BYTES, num_cpu_blocks=2 * NUM_BLOCKS) as loaded:
        yield line_of("api", "get of 2,048 blocks, less the copy (64 bytes each)", _times(loaded, NUM_BLOCKS, n))
