"""Pinning of the pool by ranks, against a fake driver that pins part by part as the test lets it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.kvmanager import KVManager
from flexkv.rank.agent_start import start_agent
from flexkv.rank.pool_pinning import PinningAgent
from flexkv.rank.rank import RankClient
from flexkv.rank.tp_client import KVTPClient
from flexkv.storage.host_pool import HostPool, OnExtent
from flexkv.transfer.executors.agent_link import AgentLink
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.support.harness import PAGES, Tensors, controller_of, make_manager, mapping, tokens_of, until

SHAPE = (2, 4, 2, 4096)
SLOT_BYTES = 3 * 2 * 4 * 2 * 4096 * 2
PART_SLOTS = (16 << 20) // SLOT_BYTES
NUM_SLOTS = 4 * PART_SLOTS + 7


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda().checked() as fake:
        yield fake


class Node:
    """A manager and ranks with a pool of four parts and a bit."""

    def __init__(self, path: Path, ranks: int = 1) -> None:
        self.port = str(path / "s")
        self.manager: KVManager = make_manager(path / "s", NUM_SLOTS, ranks)
        self.clients: list[KVTPClient] = []
        self.tensors: list[Tensors] = []

    def add_rank(self, rank: int = 0) -> KVTPClient:
        tensors, client = Tensors(PAGES, SHAPE, device=0), KVTPClient(self.port, intra_client_id=rank)
        client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        self.tensors.append(tensors)
        self.clients.append(client)
        return client

    def usable(self) -> int:
        return controller_of(self.manager)._cache.transfer._growth.usable

    def pinned(self) -> list[int]:
        agents = [client.rank._agent for client in self.clients]
        return [agent.pinned_slots if agent else 0 for agent in agents]

    def moves(self, num_blocks: int, seed: int = 0) -> bool:
        """Whether so many blocks can be saved, and come back as they were."""
        pages = range(num_blocks)
        for rank, tensors in enumerate(self.tensors):
            tensors.fill(pages, 100 * seed + rank)
        before = [tensors.read(pages) for tensors in self.tensors]
        put = self.manager.put_async(tokens_of(num_blocks, seed), mapping(pages))
        assert self.manager.wait(put)[put].status is Status.SUCCESS
        for tensors in self.tensors:
            tensors.zero()
        task, mask = self.manager.get_match(tokens_of(num_blocks, seed))
        self.manager.launch(task, mapping(range(int(mask.sum()) // 4)))
        assert self.manager.wait(task)[task].status is Status.SUCCESS
        return int(mask.sum()) == 4 * num_blocks and before == [tensors.read(pages) for tensors in self.tensors]

    def close(self) -> None:
        self.manager.shutdown()
        for client in self.clients:
            client.close()


@pytest.fixture
def node(tmp_path: Path, cuda: FakeCuda) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    cuda.allow_registering(-1)
    made.close()


def test_the_pool_is_pinned_in_small_parts_in_order(node: Node, cuda: FakeCuda) -> None:
    node.add_rank()
    until(lambda: node.usable() == NUM_SLOTS, 20)
    parts = cuda.parts
    assert [size for _, size in parts] == [PART_SLOTS * SLOT_BYTES] * 4 + [7 * SLOT_BYTES]
    starts = [start for start, _ in parts]
    assert starts == [starts[0] + i * PART_SLOTS * SLOT_BYTES for i in range(5)]
    assert starts[0] % (2 << 20) == 0                                           # huge pages can be mapped


def test_a_part_is_used_as_soon_as_it_is_pinned(node: Node, cuda: FakeCuda) -> None:
    cuda.allow_registering(0)
    node.add_rank()
    until(lambda: controller_of(node.manager)._cache.transfer._growth._populated == (NUM_SLOTS, True), 20)
    assert not node.manager.is_ready()
    cuda.allow_registering(1)
    until(node.manager.is_ready, 20)
    assert node.manager.stats()["num_slots"] == PART_SLOTS
    assert node.moves(10, 1)
    put, mask = node.manager.put_match(tokens_of(PAGES, 2))                     # more than is there: a shorter plan
    assert int(mask.sum()) <= 4 * PART_SLOTS
    node.manager.cancel(put)
    cuda.allow_registering(-1)
    until(lambda: node.manager.stats()["num_slots"] == NUM_SLOTS, 20)
    assert node.moves(PAGES, 3)


def test_only_populated_memory_is_pinned(node: Node, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning would allocate the rest, beyond the limit at which the controller has stopped."""
    reports: list[OnExtent] = []
    monkeypatch.setattr(HostPool, "populate", lambda self, on_extent, num_slots: reports.append(on_extent))
    node.add_rank()
    until(lambda: bool(reports), 20)
    reports[0](2 * PART_SLOTS + 5, False)
    until(lambda: node.usable() == 2 * PART_SLOTS)                              # whole parts, while there will be more
    assert len(cuda.parts) == 2
    reports[0](2 * PART_SLOTS + 9, True)                                        # memory has run out
    until(lambda: node.usable() == 2 * PART_SLOTS + 9)
    assert sum(size for _, size in cuda.parts) == (2 * PART_SLOTS + 9) * SLOT_BYTES
    assert node.moves(PAGES, 1)


def test_a_slot_is_used_when_all_ranks_have_pinned_it(tmp_path: Path, cuda: FakeCuda) -> None:
    node = Node(tmp_path, ranks=2)
    try:
        cuda.allow_registering(0)
        for rank in range(2):
            node.add_rank(rank)
        until(lambda: controller_of(node.manager)._cache.transfer._growth._populated == (NUM_SLOTS, True), 20)
        for number in range(1, 2 * -(-NUM_SLOTS // (PART_SLOTS // 2)) + 1):    # a slot is twice as large
            cuda.allow_registering(1)           # of either rank
            until(lambda number=number: len(cuda.parts) == number, 20)          # type: ignore[misc]
            until(lambda: node.usable() == min(node.pinned()), 20)
        assert node.usable() == NUM_SLOTS
        assert node.moves(PAGES, 2)
    finally:
        cuda.allow_registering(-1)
        node.close()


class PausedPinner:
    """Stands in for PoolPinner: pins as many parts as the test has released."""

    released = threading.Semaphore(0)

    def __init__(self, agent: PinningAgent, pause: Callable[[float], bool]) -> None:
        self._agent, self._pause = agent, pause

    def run(self) -> None:
        while self._agent.pinning and not self._pause(0.0):
            if self.released.acquire(timeout=0.01) and not self._agent.pin_next() and self._agent.pinning:
                self.released.release()         # the controller has not told it yet how much is populated


@pytest.mark.parametrize("pinned", [0, 1, 3])
def test_a_rank_that_was_restarted_is_used_while_it_pins(
    node: Node, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, pinned: int
) -> None:
    client = node.add_rank()
    until(lambda: node.usable() == NUM_SLOTS, 20)
    assert node.moves(PAGES, 1)
    client.close()
    until(lambda: not node.manager.is_ready())
    node.tensors.clear()
    monkeypatch.setattr("flexkv.rank.rank.PoolPinner", PausedPinner)
    again = node.add_rank()
    PausedPinner.released.release(pinned or 1)
    until(lambda: len(cuda.parts) == (pinned or 1), 20)
    until(node.manager.is_ready, 20)
    task, mask = node.manager.get_match(tokens_of(PAGES, 1))                    # what the rank before it has saved
    node.manager.launch(task, mapping(range(PAGES)))
    assert node.manager.wait(task)[task].status is Status.SUCCESS
    assert mask.all()
    loaded, computed = node.tensors[0].read(range(PAGES)), Tensors(PAGES, SHAPE)
    computed.fill(range(PAGES), 100)
    assert loaded == computed.read(range(PAGES))
    for seed in range(2, 8):                                                    # over pinned slots and others
        assert node.moves(PAGES, seed)
    assert len(cuda.parts) == (pinned or 1)
    PausedPinner.released.release(5)
    until(lambda: again.rank._agent is not None and not again.rank._agent.pinning, 20)
    assert node.moves(PAGES, 8)


def test_a_rank_that_is_slow_to_start_is_sent_nothing_before(
    tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker takes a task as lost while there is no agent, and the engine uses the pages again."""
    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return start_agent(*arguments)

    def links() -> Sequence[AgentLink]:
        return controller_of(manager)._cache.transfer._device.links_of(0)

    monkeypatch.setattr("flexkv.rank.rank.start_agent", slow)
    manager, tensors = make_manager(tmp_path / "s", NUM_SLOTS, 1), Tensors(PAGES, SHAPE, device=0)
    with RankClient(str(tmp_path / "s"), reconnect=True) as client:
        client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        until(manager.is_ready, 20)
        for _ in range(5):
            before = links()
            client.leave()
            until(lambda before=before: bool(links()) and links() != before and manager.is_ready(), 20)  # type: ignore[misc]
            assert client.is_connected
            assert not client.has_lost(client._first_task + 1, client.num_ended)
        manager.shutdown()


def test_parts_are_pinned_while_blocks_move(node: Node, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of memory that is being pinned wait until it is pinned."""
    client = node.add_rank()
    until(lambda: node.usable() == NUM_SLOTS, 20)
    client.close()
    for seed in range(6):
        until(lambda: not node.manager.is_ready())
        node.tensors.clear()
        cuda.delay_registering(3000)
        cuda.delay(200)
        client = node.add_rank()
        until(node.manager.is_ready, 20)
        for turn in range(8):
            assert node.moves(PAGES - 5 * turn, 10 * seed + turn)
        client.close()


@pytest.mark.parametrize("after", [0, 2])
def test_a_pool_that_cannot_be_pinned_is_used_whole(
    node: Node, cuda: FakeCuda, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.fail("cuMemHostRegister", after, 2)
    with caplog.at_level(logging.WARNING):
        node.add_rank()
        until(lambda: node.usable() == NUM_SLOTS, 20)
        until(lambda: "cannot be pinned" in caplog.text)
    assert len(cuda.parts) == after
    assert node.moves(PAGES, 1)
    assert node.moves(PAGES, 2)
    assert node.moves(PAGES, 3)                                                 # over all slots, pinned and not
    assert caplog.text.count("cannot be pinned") == 1


def test_closing_while_parts_are_pinned_is_prompt(tmp_path: Path, cuda: FakeCuda) -> None:
    cuda.allow_registering(0)
    node = Node(tmp_path)
    client = node.add_rank()
    client.wait_connected(10.0)
    node.manager.shutdown()                     # while the first part is being pinned
    cuda.allow_registering(1)
    client.close()                              # the next is not begun
    assert cuda.parts == []                                                     # all given back
    cuda.allow_registering(-1)
