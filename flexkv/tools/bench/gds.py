"""SSD to GPU by GPUDirect Storage, beside the route through host memory and its legs. The measurements alternate."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from flexkv._core.device.cuda_driver import load_driver
from flexkv.errors import FlexKVError
from flexkv.tools.bench.pipeline import CASES, KIB, Pipeline, cache_options
from flexkv.tools.bench.report import Line, line_of
from flexkv.tools.bench.session import LAYERS, session

_READY_S = 30.0


def _direct_turn(direct: Pipeline) -> float:
    """Load from SSD to pages without host memory, and compare the bytes; returns the microseconds of the load."""
    direct.forget()
    took = direct.loaded.checked_get()
    if direct.loaded.manager.stats()["ssd_store_device_is_ready"] != 1:
        raise FlexKVError("GPUDirect Storage has been taken out of service; see the log")
    return took


def _await_device(pipeline: Pipeline) -> None:
    until = time.monotonic() + _READY_S
    while pipeline.loaded.manager.stats().get("ssd_store_device_is_ready") != 1:
        if time.monotonic() > until:
            raise FlexKVError("GPUDirect Storage is not in service; see the log")
        time.sleep(0.01)


def run(folder: Path | None, n: int = 7) -> Iterator[Line]:
    """Measure the load of blocks that are on SSD only. The ceiling of the direct route is the route through host
    memory.

    Raises
    ------
    CudaUnavailableError
        No GPU was found.
    FlexKVError
        GPUDirect Storage cannot be used.
    """
    load_driver()
    for size, count in CASES:
        with (
            TemporaryDirectory(dir=folder) as store,
            session(count, size // LAYERS, True, **cache_options(f"{store}/host", size, count)) as through_host,
            session(
                count, size // LAYERS, True, enable_gds=True, **cache_options(f"{store}/gds", size, count)
            ) as directly,
        ):
            host, direct = Pipeline(through_host), Pipeline(directly)
            _await_device(direct)
            host.turn()                                 # the first turn is slower
            _direct_turn(direct)
            took = np.array([(*host.turn(), _direct_turn(direct)) for _ in range(n)])
        case = f"{count:,} blocks of {size // KIB} KiB"
        ceiling = float(max(np.median(took[:, 0]), np.median(took[:, 1])))
        yield line_of("gds", f"{case}: SSD to host", took[:, 0])
        yield line_of("gds", f"{case}: host to GPU", took[:, 1])
        yield line_of("gds", f"{case}: SSD to GPU; ceiling: slower leg", took[:, 2], ceiling)
        yield line_of("gds", f"{case}: directly; ceiling: by host", took[:, 3], float(np.median(took[:, 2])))
