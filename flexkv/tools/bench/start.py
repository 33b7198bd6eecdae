"""Start of a host pool: time to populate and pin it, and duration of an engine's steps meanwhile."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from flexkv._core.device.agent import DeviceAgent
from flexkv._core.device.cuda_driver import load_driver
from flexkv._core.device.ring import ControllerRings
from flexkv.config import TransferConfig
from flexkv.errors import CudaUnavailableError
from flexkv.rank.pool_pinning import PoolPinner
from flexkv.storage.host_pool import HostPool
from flexkv.tools.bench.report import Line

_SLOT_BYTES = 2 << 20
_LAUNCHES = 400
"""Number of small kernels of a step. A decode step of a model with 30 to 60 layers launches as many without CUDA
graphs."""

_ALONE_S = 2.0
"""Duration of a measurement of steps without a growing pool, in seconds."""


class Steps:
    """A thread that imitates an engine's steps: many small launches, then a wait for the GPU.

    Attributes
    ----------
    took_ms : list of float
        Milliseconds of each step since ``restart``.
    """

    def __init__(self) -> None:
        import torch

        self._matrix = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
        self._torch = torch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.took_ms: list[float] = []
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            for _ in range(_LAUNCHES):
                self._torch.mm(self._matrix, self._matrix)
            self._torch.cuda.synchronize()
            self.took_ms.append((time.perf_counter() - start) * 1e3)

    def restart(self) -> list[float]:
        """Begin a new list of steps; returns the old one."""
        took, self.took_ms = self.took_ms, []
        return took

    def close(self) -> list[float]:
        """End the thread; returns the steps since ``restart``."""
        self._stop.set()
        self._thread.join()
        return self.took_ms


class Start:
    """A pool of ``num_gib`` GiB with one rank on the current GPU. The pool starts to grow at once."""

    def __init__(self, num_gib: int) -> None:
        import torch

        from flexkv.rank.kernels import move_function
        from flexkv.rank.regions import regions_from_tensors
        from flexkv.rank.tensors import tensor_spec

        config, device = TransferConfig(), load_driver().device(torch.cuda.current_device())
        self.pages = torch.zeros(64, _SLOT_BYTES, dtype=torch.uint8, device="cuda")
        regions, num_pages, _ = regions_from_tensors([tensor_spec(self.pages)])
        self.pool = HostPool(_SLOT_BYTES, (num_gib << 30) // _SLOT_BYTES)
        self.rings = ControllerRings(config.ring_bytes)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.agent = DeviceAgent(
            regions=regions, num_pages=[num_pages], pool_fd=os.dup(self.pool.fd), pool_bytes=self.pool.num_bytes,
            slot_bytes=_SLOT_BYTES, ring_fd=os.dup(self.rings.fd), ring_bytes=self.rings.ring_bytes,
            submission_event_fd=os.dup(self.rings.sending_event_fd),
            completion_event_fd=os.dup(self.rings.receiving_event_fd), socket_fd=theirs.detach(), device=device,
            move_function=move_function(device), window_bytes=config.gpu_window_mb << 20,
            num_ctas=config.gpu_num_ctas,
        )
        self._began = time.perf_counter()
        self.populated_s = self.pinned_s = 0.0
        self.pool.populate(self._on_extent)
        self._pinner = threading.Thread(target=self._pin, daemon=True)
        self._pinner.start()

    def _on_extent(self, num_slots: int, last: bool) -> None:
        self.rings.note_populated(num_slots, last)
        if last:
            self.populated_s = time.perf_counter() - self._began

    def _pin(self) -> None:
        PoolPinner(self.agent, threading.Event().wait).run()
        self.pinned_s = time.perf_counter() - self._began

    def wait(self) -> None:
        """Wait until the whole pool is pinned."""
        self._pinner.join()

    def close(self) -> None:
        """Free pool and rank."""
        self.agent.close()
        self._socket.close()
        self.rings.close()
        self.pool.close()


def _populate_only(num_gib: int) -> Iterator[Line]:
    pool, done = HostPool(_SLOT_BYTES, (num_gib << 30) // _SLOT_BYTES), threading.Event()
    start = time.perf_counter()
    pool.populate(lambda slots, last: done.set() if last else None)
    done.wait()
    yield Line("start", f"{num_gib} GiB: populated", round((time.perf_counter() - start) / num_gib, 3), "s/GiB")
    yield Line("start", f"{num_gib} GiB: in huge pages", round(pool.huge_bytes / pool.num_bytes, 3), "share")
    pool.close()


def _steps(case: str, took_ms: list[float], alone_ms: float | None = None) -> Line:
    p50, p99, most = (round(float(np.percentile(took_ms, q)), 2) for q in (50, 99, 100))
    return Line("start", f"{case}: longest step", most, "ms", alone_ms, None, len(took_ms), p50, p99)


def run(num_gib: int, on_pinned: Callable[[Start], None] = lambda start: None) -> Iterator[Line]:
    """Populate and pin a pool beside an engine's steps, and measure both. Without a GPU, the pool is only populated.

    Parameters
    ----------
    num_gib : int
        Size of the pool.
    on_pinned : callable
        Called with the pool and its rank when the whole pool is pinned.
    """
    try:
        load_driver()
    except CudaUnavailableError:
        yield from _populate_only(num_gib)
        return
    steps = Steps()
    time.sleep(_ALONE_S)                                # the first steps are slower
    steps.restart()
    time.sleep(_ALONE_S)
    alone = steps.restart()
    start = Start(num_gib)
    start.wait()
    meanwhile = steps.restart()
    time.sleep(_ALONE_S)
    after = steps.close()
    case = f"{num_gib} GiB"
    yield _steps(f"{case}: nothing beside", alone)
    yield _steps(f"{case}: while populated, pinned", meanwhile, round(float(np.median(alone)), 2))
    yield _steps(f"{case}: afterwards", after)
    yield Line("start", f"{case}: populated", round(start.populated_s / num_gib, 3), "s/GiB")
    yield Line("start", f"{case}: in huge pages", round(start.pool.huge_bytes / start.pool.num_bytes, 3), "share")
    yield Line("start", f"{case}: pinned, with pauses", round(start.pinned_s, 2), "s")
    on_pinned(start)
    start.close()
