"""Copies between GPU pages and host slots, through the device agent, beside plain memcpy in the same run."""

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.device.agent import DeviceAgent
from flexkv._core.device.cuda_driver import load_driver
from flexkv._core.device.ring import ControllerRings
from flexkv.config import TransferConfig
from flexkv.errors import FlexKVError
from flexkv.protocol.ring import OpKind
from flexkv.rank.kernels import move_function
from flexkv.rank.regions import regions_from_tensors
from flexkv.rank.tensors import tensor_spec
from flexkv.storage.host_pool import HostPool
from flexkv.storage.layout import SlotLayout
from flexkv.tools.bench.report import Line

TOTAL_BYTES = 1 << 30
REPEATS = 15
KIB = 1024

_SLICES = 25
"""Number of slices of matrix products with each background copy."""


@dataclass(frozen=True)
class Case:
    """A shape of KV: ``num_tensors`` tensors, each with ``chunk_bytes`` bytes of a page."""

    name: str
    chunk_bytes: int
    num_tensors: int
    scattered_slots: bool = False

    @property
    def num_blocks(self) -> int:
        """Number of blocks that make up ``TOTAL_BYTES``."""
        return TOTAL_BYTES // (self.chunk_bytes * self.num_tensors)


MAIN = Case("64 KiB x 32 layers, slots in a run", 64 * KIB, 32)
CASES = [
    MAIN,
    Case("64 KiB x 32 layers, slots one by one", 64 * KIB, 32, scattered_slots=True),
    *(Case(f"{size} KiB x 32 layers", size * KIB, 32) for size in (4, 16, 32, 256, 1024)),
    Case("MLA, 18 KiB x 61 layers", 18 * KIB, 61),
    Case("K and V separate, 32 KiB x 64", 32 * KIB, 64),
    Case("block-major pool, 2 MiB", 2048 * KIB, 1),
]


class Session:
    """A device agent with the tensors of a case on the GPU. It is driven over its rings, like by the controller."""

    def __init__(self, case: Case, config: TransferConfig) -> None:
        import torch

        self.case = case
        self.rng = np.random.default_rng(0)
        num_pages = 2 * case.num_blocks
        self.layers = [
            torch.randint(0, 256, (num_pages, case.chunk_bytes), dtype=torch.uint8, device="cuda")
            for _ in range(case.num_tensors)
        ]
        regions, num_pages, segment_bytes = regions_from_tensors([tensor_spec(layer) for layer in self.layers])
        layout = SlotLayout.sharded([segment_bytes])
        num_slots = (2 if case.scattered_slots else 1) * case.num_blocks
        self.pool = HostPool(layout.slot_bytes, num_slots)
        populated = threading.Event()
        self.pool.populate(lambda slots, last: populated.set() if last else None)
        populated.wait()
        self.rings = ControllerRings(config.ring_bytes)
        self.rings.note_populated(num_slots, True)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device = load_driver().device(torch.cuda.current_device())
        self.agent = DeviceAgent(
            regions=regions, num_pages=[num_pages], pool_fd=os.dup(self.pool.fd), pool_bytes=self.pool.num_bytes,
            slot_bytes=layout.slot_bytes, ring_fd=os.dup(self.rings.fd),
            ring_bytes=self.rings.ring_bytes, submission_event_fd=os.dup(self.rings.sending_event_fd),
            completion_event_fd=os.dup(self.rings.receiving_event_fd), socket_fd=theirs.detach(), device=device,
            move_function=move_function(device), strategy=config.gpu_strategy,
            window_bytes=config.gpu_window_mb << 20, num_ctas=config.gpu_num_ctas,
        )
        while self.agent.pin_next():
            pass
        torch.cuda.synchronize()
        self._ids = 0
        self.slots = np.arange(case.num_blocks, dtype=np.int32)
        if case.scattered_slots:
            self.slots = self.rng.permutation(case.num_blocks).astype(np.int32) * 2
        self.pages = self.rng.permutation(num_pages).astype(np.int32)

    def submit(self, kind: OpKind, slots: NDArray[np.int32], pages: NDArray[np.int32]) -> int:
        """Send an op to the agent; returns its number."""
        self._ids += 1
        if not self.rings.push_op(self._ids, self._ids, kind, 0, slots, pages, len(slots), False):
            raise FlexKVError("the ring is full: use a larger ring_bytes")
        return self._ids

    def wait(self, num_ops: int, pause_s: float = 0.0) -> None:
        """Wait until ``num_ops`` ops have succeeded; polls without a pause, or every ``pause_s`` seconds."""
        while num_ops:
            result = self.rings.pop_result()
            if result is None:
                if self.agent.status:
                    raise FlexKVError(f"the agent ended: {self.agent.device_error}")
                if pause_s:
                    time.sleep(pause_s)
                continue
            _, _, ok, last = result
            if not ok.all():
                raise FlexKVError(f"blocks were not moved: {self.agent.device_error}")
            num_ops -= bool(last)
        while self.agent.take() is not None:
            pass

    def move(self, kind: OpKind, half: int = 0) -> None:
        """Move all blocks from or to one half of the pages."""
        count = self.case.num_blocks
        self.submit(kind, self.slots, self.pages[half * count : (half + 1) * count])
        self.wait(1)

    def keep_moving(self, kind: OpKind, stop: threading.Event) -> None:
        """Move all blocks repeatedly without a pause between ops, with little processor time."""
        self.submit(kind, self.slots, self.pages[: self.case.num_blocks])
        while not stop.is_set():
            self.submit(kind, self.slots, self.pages[: self.case.num_blocks])
            self.wait(1, pause_s=1e-3)
        self.wait(1, pause_s=1e-3)

    def check(self) -> None:
        """Save pages, load them into other pages, and compare the bytes on the device."""
        import torch

        count = self.case.num_blocks
        here, there = (torch.from_numpy(self.pages[i * count : (i + 1) * count].astype(np.int64)) for i in range(2))
        self.move(OpKind.D2H)
        for layer in self.layers:
            layer[there] = 0
        torch.cuda.synchronize()
        self.move(OpKind.H2D, half=1)
        if not all(bool(torch.equal(layer[here], layer[there])) for layer in self.layers):
            raise FlexKVError(f"{self.case.name}: bytes differ")

    def close(self) -> None:
        """Stop the agent, and free rings and pool."""
        self.agent.close()
        self._socket.close()
        self.rings.close()
        self.pool.close()


@contextmanager
def _session(case: Case, config: TransferConfig) -> Iterator[Session]:
    import torch

    session = Session(case, config)
    try:
        session.check()
        yield session
        session.check()
    finally:
        session.close()
        del session.layers
        torch.cuda.empty_cache()


class Plain:
    """Plain memcpy between pinned memory and the device: the ceiling."""

    def __init__(self, num_bytes: int = TOTAL_BYTES) -> None:
        import torch

        self._torch = torch
        self.host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.device = [torch.zeros(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.streams = [torch.cuda.Stream() for _ in range(2)]

    def start(self, kind: OpKind) -> None:
        """Submit a copy of all bytes to the stream of its direction."""
        down = kind is OpKind.D2H
        with self._torch.cuda.stream(self.streams[down]):
            if down:
                self.host[0].copy_(self.device[0], non_blocking=True)
            else:
                self.device[1].copy_(self.host[1], non_blocking=True)

    def finish(self) -> None:
        """Wait for all submitted copies."""
        for stream in self.streams:
            stream.synchronize()

    def move(self, *kinds: OpKind) -> None:
        """Copy all bytes in each direction, at the same time, and wait for the copies."""
        for kind in kinds:
            self.start(kind)
        self.finish()

    def keep_moving(self, kind: OpKind, stop: threading.Event) -> None:
        """Copy all bytes repeatedly, until ``stop`` is set."""
        self.start(kind)
        while not stop.is_set():
            self.start(kind)
            self.finish()


def _times(*functions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median duration of each function in seconds. The functions alternate."""
    took: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 2):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            took[i].append(time.perf_counter() - start)
    return [float(np.median(times[2:])) for times in took]


def _rate(case: str, ours: float, plain: float, num_bytes: int) -> Line:
    return Line("gpu", case, round(num_bytes / ours / 1e9, 2), "GB/s", round(num_bytes / plain / 1e9, 2),
                round(plain / ours, 3), REPEATS)


def _copies(session: Session, plain: Plain) -> Iterator[Line]:
    name, count = session.case.name, session.case.num_blocks
    num_bytes = session.case.num_blocks * session.case.chunk_bytes * session.case.num_tensors
    share = num_bytes / TOTAL_BYTES
    for kind in (OpKind.D2H, OpKind.H2D):
        ours, theirs = _times(functools.partial(session.move, kind), functools.partial(plain.move, kind))
        yield _rate(f"{kind.name} {name}", ours, theirs * share, num_bytes)
    if session.case is not MAIN:
        return

    def both() -> None:
        half = count // 2
        session.submit(OpKind.D2H, session.slots[:half], session.pages[:half])
        session.submit(OpKind.H2D, session.slots[half:], session.pages[count : 2 * count - half])
        session.wait(2)

    ours, theirs = _times(both, lambda: plain.move(OpKind.D2H, OpKind.H2D))
    yield _rate(f"both ways {name}", ours, theirs / 2, num_bytes)


def _latency(session: Session) -> Iterator[Line]:
    import torch

    size = session.case.chunk_bytes * session.case.num_tensors
    small = Plain(size)
    event = torch.cuda.Event()
    for kind in (OpKind.D2H, OpKind.H2D):
        slots, pages = session.slots[:1], session.pages[:1]

        def ours(kind: OpKind = kind, slots: NDArray[np.int32] = slots, pages: NDArray[np.int32] = pages) -> None:
            session.submit(kind, slots, pages)
            session.wait(1)

        def bare(kind: OpKind = kind) -> None:
            small.start(kind)
            event.record(small.streams[kind is OpKind.D2H])
            event.synchronize()

        mine, theirs = _times(ours, bare, repeats=300)
        yield Line("gpu", f"{kind.name} of one block of {size >> 20} MiB, call to ready", round(mine * 1e6, 1), "us",
                   round(theirs * 1e6, 1), round(mine / theirs, 3), 300)


class _Products:
    """A stream of bf16 matrix products without gaps. Their slowdown is the cost of a copy in the background."""

    COUNT = 30

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._a, self._b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._stream = torch.cuda.Stream()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _give(self, count: int) -> None:
        for _ in range(count):
            self._torch.mm(self._a, self._b, out=self._out)

    def seconds(self, background: Callable[[threading.Event], object] | None) -> float:
        """Seconds of a product while ``background`` runs. ``background`` runs until the next call, which sets its stop
        event."""
        self._stop.set()
        with self._torch.cuda.stream(self._stream):
            self._give(self.COUNT)                      # while the background before ends
            if self._thread is not None:
                self._thread.join()
            self._thread = None
            if background is not None:
                self._stop = threading.Event()
                self._thread = threading.Thread(target=background, args=(self._stop,), daemon=True)
                self._thread.start()
            self._give(self.COUNT // 2)
            self._events[0].record()
            self._give(self.COUNT)
            self._events[1].record()
        self._stream.synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3 / self.COUNT


def _slowdowns(products: _Products, *backgrounds: Callable[[threading.Event], object]) -> list[tuple[float, float]]:
    """Median slowdown by each background and its standard error, in percent.

    The clocks of a GPU under load drift by more than the measured slowdown. So slices of about 40 ms with and without
    background alternate, and each is compared with the slices before and after it."""
    ratios: list[list[float]] = [[] for _ in backgrounds]
    products.seconds(None)
    before = products.seconds(None)
    for _ in range(_SLICES):
        for i, background in enumerate(backgrounds):
            with_it = products.seconds(background)
            after = products.seconds(None)
            ratios[i].append(2 * with_it / (before + after))
            before = after
    return [(100 * (float(np.median(r)) - 1), 100 * 1.25 * float(np.std(r)) / len(r) ** 0.5) for r in ratios]


def _interference(session: Session, plain: Plain) -> Iterator[Line]:
    products = _Products()
    for kind in (OpKind.D2H, OpKind.H2D):
        (mine, error), (memcpy, _) = _slowdowns(
            products, functools.partial(session.keep_moving, kind), functools.partial(plain.keep_moving, kind)
        )
        yield Line("gpu", f"slowdown of a bf16 GEMM stream during {kind.name} (± {error:.2f}); ceiling: plain memcpy",
                   round(mine, 2), "%", round(memcpy, 2), None, _SLICES)


def run(config: TransferConfig | None = None, only: str = "") -> Iterator[Line]:
    """Measure copies of every shape in both directions, the latency of one block, and the slowdown of compute.

    Raises
    ------
    CudaUnavailableError
        No GPU was found.
    """
    config = config or TransferConfig(ring_bytes=1 << 22)
    load_driver()
    plain = Plain()
    for case in CASES:
        if only not in case.name:
            continue
        with _session(case, config) as session:
            yield from _copies(session, plain)
            if case is MAIN:
                yield from _latency(session)
                yield from _interference(session, plain)
