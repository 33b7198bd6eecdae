"""Loads that signal each layer to a rank, through eventfds that the rank sends by SGLang's protocol."""

import array
import functools
import itertools
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.config import TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.protocol.layer_signals import build_layerwise_eventfd_socket_path
from flexkv.protocol.ring import OpKind
from flexkv.rank.tp_client import KVTPClient
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.support.harness import (
    TOKENS,
    check_drained,
    controller_of,
    make_manager,
    mapping,
    tokens_of,
    until,
    wait_ready,
)
from tests.support.segment_ranks import Kind, SlotModel, begin, move, segmented

LAYERS, PAGES, COUNTERS = 12, 24, 3
LAYOUT = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, PAGES, TOKENS, 2, 64)


class OnFakeGpu(torch.Tensor):
    """A tensor in this process's memory that says it is on a GPU: the fake driver's device memory."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


class Counters:
    """The rank's half of the protocol, as ``FlexKVLayerDoneCounter`` and ``_send_eventfds_to_worker`` in SGLang."""

    def __init__(self, num_layers: int = LAYERS) -> None:
        self.fds = [
            [os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK) for _ in range(num_layers)] for _ in range(COUNTERS)
        ]

    def send(self, path: str, claimed_layers: int = LAYERS) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(path)
            try:
                self.give(connection, claimed_layers)
                return connection.recv(1)
            except (ConnectionResetError, BrokenPipeError):
                return b""

    def give(self, connection: socket.socket, claimed_layers: int) -> None:
        connection.sendall(struct.pack("iiii", 0, 1, claimed_layers, COUNTERS))
        for counter, row in enumerate(self.fds):
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", row))]
            connection.sendmsg([struct.pack("i", counter)], ancillary)

    def wait(self, counter: int, layer: int, timeout_s: float = 10.0) -> bool:
        fd = self.fds[counter][layer]
        return bool(select.select([fd], [], [], timeout_s)[0]) and bool(os.read(fd, 8))

    def told(self) -> list[tuple[int, int]]:
        """Which are readable now."""
        readable = select.select([fd for row in self.fds for fd in row], [], [], 0)[0]
        return [(counter, row.index(fd)) for counter, row in enumerate(self.fds) for fd in row if fd in readable]

    def close(self) -> None:
        for fd in [fd for row in self.fds for fd in row]:
            os.close(fd)


class Rank:
    """K list and V list, token-major, as SGLang has them."""

    def __init__(self, tmp_path: Path, fake: bool) -> None:
        self.manager: KVManager = make_manager(tmp_path / "s")
        self.tensors = self.make(fake)
        self.client = KVTPClient(
            str(tmp_path / "s"), transfer_config=TransferConfig(enable_layerwise_transfer=True, gpu_window_mb=1)
        )
        self.client.register_to_server(self.tensors, LAYOUT)
        wait_ready(self.manager)
        self.counters = Counters()
        self.path = build_layerwise_eventfd_socket_path(dp_client_id=0, pp_rank=0, model_config=None)

    def make(self, fake: bool) -> list[torch.Tensor]:
        shape = (PAGES * TOKENS, 2, 64)
        plain = [torch.randint(-999, 999, shape, dtype=torch.int16) for _ in range(2 * LAYERS)]
        return [tensor.as_subclass(OnFakeGpu) for tensor in plain] if fake else plain

    def layer(self, layer: int, first: int, count: int) -> list[torch.Tensor]:
        tokens = slice(first * TOKENS, (first + count) * TOKENS)
        return [self.tensors[i][tokens].as_subclass(torch.Tensor).clone() for i in (layer, LAYERS + layer)]

    def save(self, count: int) -> list[list[torch.Tensor]]:
        task = self.manager.put_async(tokens_of(count), mapping(range(count)))
        assert self.manager.wait(task)[task].status is Status.SUCCESS
        return [self.layer(layer, 0, count) for layer in range(LAYERS)]

    def load(self, count: int, counter: int, first: int = 12) -> int:
        task, mask = self.manager.get_match(tokens_of(count))
        assert mask.all()
        self.manager.launch([task], [mapping(range(first, first + count))], as_batch=True, layerwise_transfer=True,
                            counter_id=counter)
        return task

    def close(self) -> None:
        check_drained(self.manager)
        self.client.close()
        self.manager.shutdown()
        self.counters.close()


@pytest.fixture(params=["cpu", "fake gpu"])
def rank(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rank]:
    cuda: FakeCuda | None = fake_cuda() if request.param == "fake gpu" else None
    if cuda is not None:
        cuda.reset()
    rank = Rank(tmp_path, cuda is not None)
    try:
        yield rank
        rank.close()
    finally:
        if cuda is not None:
            cuda.reset()


def open_eventfds() -> int:
    return sum("eventfd" in os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_layer_is_there_when_it_is_told_of(rank: Rank) -> None:
    before = rank.save(8)
    assert rank.counters.send(rank.path) == b"\x01"
    for turn in range(2 * COUNTERS):
        for tensor in rank.tensors:
            tensor[12 * TOKENS :] = 0
        task = rank.load(8, turn % COUNTERS)
        for layer in range(LAYERS):
            assert rank.counters.wait(turn % COUNTERS, layer)
            assert same(rank.layer(layer, 12, 8), before[layer])
        assert rank.manager.wait(task)[task].status is Status.SUCCESS
        assert rank.counters.told() == []                      # each was told of once, and no other counter's


def test_eventfds_outlive_sleep_and_come_again(rank: Rank) -> None:
    """A rank connects again if it likes; one whose tensors were unmapped does not."""
    before = rank.save(4)
    first, rank.counters = rank.counters, Counters()
    assert first.send(rank.path) == b"\x01"
    assert rank.counters.send(rank.path) == b"\x01"
    rank.client.suspend_gpu_mappings()
    until(lambda: not rank.manager.is_ready())
    rank.client.register_to_server(rank.tensors, LAYOUT, resume=True)
    until(rank.manager.is_ready)
    task = rank.load(4, 1)
    assert all(rank.counters.wait(1, layer) for layer in range(LAYERS))
    assert all(same(rank.layer(layer, 12, 4), before[layer]) for layer in range(LAYERS))
    assert rank.manager.wait(task)[task].status is Status.SUCCESS
    assert first.told() == []
    first.close()


def test_a_rank_that_lost_its_answer_connects_again(rank: Rank) -> None:
    rank.save(4)
    lost = Counters()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(rank.path)
        lost.give(connection, LAYERS)                          # and is gone before it is answered
    lost.close()
    assert rank.counters.send(rank.path) == b"\x01"
    for counter in range(COUNTERS):
        task = rank.load(4, counter)
        assert all(rank.counters.wait(counter, layer) for layer in range(LAYERS))
        assert rank.manager.wait(task)[task].status is Status.SUCCESS


def test_after_a_load_with_a_block_that_fails_nothing_is_told_of(rank: Rank) -> None:
    """Nor of later loads: a step over both requests waits for the last one alone. A new handshake starts again."""
    rank.save(8)
    assert rank.counters.send(rank.path) == b"\x01"
    task = rank.load(8, 0, first=PAGES - 4)                    # the last four pages do not exist
    assert rank.manager.wait(task)[task].status is Status.FAILED
    task = rank.load(8, 1)
    assert rank.manager.wait(task)[task].status is Status.FAILED
    assert rank.counters.told() == []
    assert rank.counters.send(rank.path) == b"\x01"
    task = rank.load(8, 2)
    assert all(rank.counters.wait(2, layer) for layer in range(LAYERS))
    assert rank.manager.wait(task)[task].status is Status.SUCCESS


def test_a_load_that_is_cancelled_once_it_may_start_is_finished(tmp_path: Path) -> None:
    """Its layers, and those of later loads, are signalled when they have arrived."""
    cuda = fake_cuda()
    cuda.reset()
    rank = Rank(tmp_path, fake=True)
    try:
        before = rank.save(8)
        assert rank.counters.send(rank.path) == b"\x01"
        cuda.delay(2_000)                                      # microseconds a copy: the cancel comes meanwhile
        cancelled = rank.load(8, 0)
        rank.manager.cancel(cancelled)
        task = rank.load(8, 1)
        for counter in (0, 1):
            for layer in range(LAYERS):
                assert rank.counters.wait(counter, layer)
                assert same(rank.layer(layer, 12, 8), before[layer])
        assert rank.manager.wait(cancelled, completely=True)[cancelled].status is Status.CANCELLED
        assert rank.manager.wait(task)[task].status is Status.SUCCESS
        assert rank.counters.told() == []
    finally:
        cuda.delay(0)
        rank.close()
        cuda.reset()


def test_a_cancelled_load_is_not_told_of(rank: Rank) -> None:
    rank.save(8)
    assert rank.counters.send(rank.path) == b"\x01"
    task, mask = rank.manager.get_match(tokens_of(8))
    assert mask.all()
    rank.manager.launch([task], [mapping(range(12, 20))], layerwise_transfer=True, counter_id=0, fence=1)
    rank.manager.cancel(task)
    assert rank.manager.wait(task, completely=True)[task].status is Status.CANCELLED
    rank.client.advance_fence(load=1)
    task = rank.load(8, 1)
    assert rank.manager.wait(task)[task].status is Status.FAILED
    assert rank.counters.told() == []


def test_a_counter_that_nobody_gave_is_a_failed_load(rank: Rank) -> None:
    rank.save(4)
    task = rank.load(4, 0)                                     # before the handshake
    assert rank.manager.wait(task)[task].status is Status.FAILED
    assert rank.counters.send(rank.path) == b"\x01"
    task = rank.load(4, COUNTERS)
    assert rank.manager.wait(task)[task].status is Status.FAILED
    task, _ = rank.manager.get_match(tokens_of(4))
    for wrong in (-3, 64):
        with pytest.raises(ValueError, match="0 to 63"):
            rank.manager.launch([task], [mapping(range(12, 16))], layerwise_transfer=True, counter_id=wrong)
    rank.manager.cancel(task)
    assert rank.counters.told() == []
    task = rank.manager.get_async(tokens_of(4), mapping(range(12, 16)))
    assert rank.manager.wait(task)[task].status is Status.SUCCESS


def test_a_copy_that_fails_is_not_told_of(tmp_path: Path) -> None:
    cuda = fake_cuda()
    cuda.reset()
    rank = Rank(tmp_path, fake=True)
    try:
        rank.save(8)
        assert rank.counters.send(rank.path) == b"\x01"
        cuda.fail("cuEventQuery")
        task = rank.load(8, 0)
        assert rank.manager.wait(task)[task].status is Status.FAILED
        assert rank.counters.told() == []
    finally:
        cuda.reset()
        rank.close()


@pytest.mark.parametrize(("layers", "claimed"), [(LAYERS, LAYERS - 1), (LAYERS - 1, LAYERS), (LAYERS, 1 << 30)])
def test_eventfds_that_do_not_fit_are_refused(rank: Rank, layers: int, claimed: int) -> None:
    """Refused eventfds are closed; valid ones are accepted afterwards."""
    rank.save(4)
    before = open_eventfds()
    wrong = Counters(layers)
    assert wrong.send(rank.path, claimed) != b"\x01"
    wrong.close()
    assert rank.counters.send(rank.path) == b"\x01"
    assert open_eventfds() == before + COUNTERS * LAYERS
    task = rank.load(4, 2)
    assert all(rank.counters.wait(2, layer) for layer in range(LAYERS))
    assert rank.manager.wait(task)[task].status is Status.SUCCESS


def test_one_counter_is_for_one_task(rank: Rank) -> None:
    rank.save(4)
    tasks = [rank.manager.get_match(tokens_of(4))[0] for _ in range(2)]
    with pytest.raises(ValueError, match="one task at a time"):
        rank.manager.launch(tasks, [mapping(range(12, 16)), mapping(range(16, 20))], layerwise_transfer=True)
    rank.manager.cancel(tasks)


# ---- several layer groups ----------------------------------------------------------------------------------------

GROUPS = [Kind(4096), Kind(4096, 1), Kind(512), Kind(512, 1)]
"""One tensor a layer; layers 1 and 3 are in a group of their own."""


@pytest.mark.parametrize("ring_bytes", [1 << 16, 4096], ids=["one record", "several records"])
@pytest.mark.parametrize("device", [None, 0], ids=["cpu", "fake gpu"])
def test_layers_of_each_group_are_told_of(tmp_path: Path, device: int | None, ring_bytes: int) -> None:
    """A layer is signalled once, when all its blocks are there, also if blocks have no page in its group."""
    n, none = 300, -1
    patterns = [list(range(n)), [none] * 7 + list(range(n - 7)), [*range(n - 7), *[none] * 7],
                [page if page % 3 else none for page in range(n)], [none] * n]
    counters = Counters(len(GROUPS))
    with fake_cuda().checked() as cuda, segmented(
        tmp_path / "s", [GROUPS], [n, n], n, device, ring_bytes=ring_bytes, gpu_window_mb=1
    ) as (manager, [rank]):
        rank.fill(1)
        model, slots = SlotModel([rank], n), list(range(n))
        assert move(manager, OpKind.D2H, slots, [slots, slots]).all()
        model.move(OpKind.D2H, slots, [slots, slots])
        rank.client.signal_layers(counters.fds)
        cuda.delay(2_000)
        for turn, pages in enumerate(itertools.product(patterns, repeat=2)):
            if (np.array(pages).max(axis=0) < 0).any():        # a block without any page fails
                continue
            for tensor, expected in zip(rank.tensors, model.pages[0], strict=True):
                tensor[:] = expected[:] = turn
            model.move(OpKind.H2D, slots, pages)
            graph, done = begin(manager, OpKind.H2D, slots, pages, layerwise=True, counter=1 + turn % COUNTERS)
            for layer in range(len(GROUPS)):
                assert counters.wait(turn % COUNTERS, layer)
                np.testing.assert_array_equal(rank.tensors[layer], model.pages[0][layer])
            assert controller_of(manager)._cache.transfer.wait(functools.partial(bool, done), 5.0)
            assert graph.ops[0].ok.all()
            assert counters.told() == []
    counters.close()
