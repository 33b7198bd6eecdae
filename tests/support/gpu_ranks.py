"""Ranks in processes of their own with tensors on a GPU each, of the fake driver or real ones."""

import ctypes
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.config import TransferConfig
from flexkv.kvmanager import KVManager
from flexkv.rank.rank import RankClient
from flexkv.rank.regions import TensorSpec
from tests.support.harness import make_manager, wait_ready
from tests.support.segment_ranks import Kind

SPOILT = 170
"""Value of each byte of a page that holds no KV."""


def computed(kind: Kind, index: int, rank: int, seed: int, position: int) -> NDArray[np.uint8]:
    """(page_bytes,) uint8: KV that computing writes into tensor ``index`` of a rank, for the block at ``position`` of
    sequence ``seed``; equal on all ranks that share a copy."""
    name = [rank] if kind.copy is None else [1000, *kind.copy.encode()]
    return np.random.default_rng([seed, position, index, *name]).integers(0, 256, kind.page_bytes, dtype=np.uint8)


class _FakeTensor:
    """Memory of the fake driver, which is memory of the process. Tensors of a rank are in one allocation or each in its
    own."""

    def __init__(self, ptr: int, shape: tuple[int, int], device: int) -> None:
        buffer = (ctypes.c_uint8 * (shape[0] * shape[1])).from_address(ptr)
        self._bytes: NDArray[np.uint8] = np.frombuffer(buffer, np.uint8).reshape(shape)
        self.spec = TensorSpec(ptr, shape, (shape[1], 1), 1, device=device)

    def write(self, page: int, data: NDArray[np.uint8]) -> None:
        self._bytes[page] = data

    def spoil(self) -> None:
        self._bytes[:] = SPOILT

    def read(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        return self._bytes[list(pages)].copy()


class _TorchTensor:
    def __init__(self, shape: tuple[int, int], device: int) -> None:
        import torch

        torch.cuda.set_device(device)
        self._tensor = torch.zeros(shape, dtype=torch.uint8, device=f"cuda:{device}")
        self.spec = TensorSpec(self._tensor.data_ptr(), shape, (shape[1], 1), 1, device=device)

    def write(self, page: int, data: NDArray[np.uint8]) -> None:
        import torch

        self._tensor[page] = torch.from_numpy(data).to(self._tensor.device)
        torch.cuda.synchronize(self._tensor.device)

    def spoil(self) -> None:
        import torch

        self._tensor.fill_(SPOILT)
        torch.cuda.synchronize(self._tensor.device)

    def read(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        data: NDArray[np.uint8] = self._tensor[list(pages)].cpu().numpy()
        return data


def _check(result: Any) -> Any:
    assert int(result[0]) == 0, result
    return result[1] if len(result) > 1 else None


def _fake_tensors(kinds: Sequence[Kind], num_pages: int, device: int, plan: dict[str, Any]) -> list[_FakeTensor]:
    from tests.native.fake_cuda.fake import fake_cuda

    fake_cuda().plan_devices(**plan)
    from cuda.bindings import driver

    from flexkv._core.device.cuda_driver import load_driver

    load_driver()
    _check(driver.cuCtxPushCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))
    sizes = [num_pages * kind.page_bytes for kind in kinds]
    pool = int(_check(driver.cuMemAlloc(sum(sizes[:-1]) + 4096)))         # the last one has an allocation of its own
    ptrs = [pool + 4096 + sum(sizes[:number]) for number in range(len(kinds) - 1)]
    ptrs.append(int(_check(driver.cuMemAlloc(sizes[-1]))))
    return [_FakeTensor(ptr, (num_pages, kind.page_bytes), device) for ptr, kind in zip(ptrs, kinds, strict=True)]


class _Rank:
    def __init__(
        self, port: str, number: int, kinds: Sequence[Kind], num_pages: int, plan: dict[str, Any] | None,
        transfer: dict[str, Any], device: int,
    ) -> None:
        self.number, self.kinds = number, kinds
        self.tensors: Sequence[_FakeTensor | _TorchTensor]
        if plan is None:
            self.tensors = [_TorchTensor((num_pages, kind.page_bytes), device) for kind in kinds]
        else:
            self.tensors = _fake_tensors(kinds, num_pages, device, plan)
        self.client = RankClient(port, intra_client_id=number, transfer_config=TransferConfig(**transfer))
        self.client.register_tensors(
            [tensor.spec for tensor in self.tensors], 60.0, self.tensors, copies=[kind.copy for kind in kinds]
        )

    def fill(self, pages: Sequence[int], seed: int) -> None:
        for index, (kind, tensor) in enumerate(zip(self.kinds, self.tensors, strict=True)):
            for position, page in enumerate(pages):
                tensor.write(page, computed(kind, index, self.number, seed, position))

    def spoil(self) -> None:
        for tensor in self.tensors:
            tensor.spoil()

    def read(self, pages: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [tensor.read(pages) for tensor in self.tensors]

    def fake(self, name: str, *args: Any) -> None:
        from tests.native.fake_cuda.fake import fake_cuda

        getattr(fake_cuda(), name)(*args)

    def maps_peers(self) -> bool:
        agent = self.client._agent
        assert agent is not None
        return agent.has_peers

    def error(self) -> str | None:
        agent = self.client._agent
        return None if agent is None or agent.device_error is None else str(agent.device_error)

    def advance(self, fence: int) -> None:
        self.client.advance_fence(fence, fence)

    def results(self) -> list[tuple[int, list[int], list[int]]]:
        """Task, pages and failed pages of each result."""
        return [(result.task_id, result.pages.tolist(), result.failed_pages.tolist())
                for result in self.client.poll_results()]


def _serve(pipe: Connection, *arguments: Any) -> None:
    rank = _Rank(*arguments)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            break
        pipe.send(getattr(rank, name)(*args))
    rank.client.close()


class GpuRank:
    """A rank in a process of its own, driven by commands.

    Parameters
    ----------
    plan : dict or None
        ``FakeCuda.plan_devices`` of the process; None: real GPUs, with torch.
    device : int, optional
        Ordinal of the GPU; default: the number of the rank.
    """

    def __init__(
        self, path: Path, number: int, kinds: Sequence[Kind], num_pages: int, plan: dict[str, Any] | None = None,
        device: int | None = None, **transfer: Any,
    ) -> None:
        self.number, self.kinds = number, kinds
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        ordinal = number if device is None else device
        arguments = (theirs, str(path), number, kinds, num_pages, plan, transfer, ordinal)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        assert self._pipe.poll(60), "the rank does not answer"
        return self._pipe.recv()

    def check(self, pages: Sequence[int], seed: int, positions: Sequence[int] | None = None) -> None:
        """Compare pages with the KV that computing writes for these positions (default: 0, 1, ...)."""
        positions = range(len(pages)) if positions is None else positions
        for index, (kind, got) in enumerate(zip(self.kinds, self("read", pages), strict=True)):
            expected = [computed(kind, index, self.number, seed, position) for position in positions]
            np.testing.assert_array_equal(got, np.stack(expected))

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self._pipe.close()


@contextmanager
def gpu_ranks(
    path: Path, kinds: Sequence[Sequence[Kind]], num_pages: int, num_slots: int, plan: dict[str, Any] | None = None,
    devices: Sequence[int] | None = None, **transfer: Any,
) -> Iterator[tuple[KVManager, list[GpuRank]]]:
    """A manager, and a rank on a GPU for each element of ``kinds``."""
    manager = make_manager(path, num_slots, len(kinds), **transfer)
    ranks = [
        GpuRank(path, number, mine, num_pages, plan, None if devices is None else devices[number], **transfer)
        for number, mine in enumerate(kinds)
    ]
    try:
        wait_ready(manager, num_slots)
        yield manager, ranks
    finally:
        manager.shutdown()
        for rank in ranks:
            rank.kill()
