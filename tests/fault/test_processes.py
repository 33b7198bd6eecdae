"""Processes that die, hang, lie or say nothing: noticed in seconds, nothing leaks, nothing wrong is read."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError
from flexkv.rank.tp_client import KVTPClient
from flexkv.transfer.executors.agent_link import Flight
from tests.support.harness import (
    PAGES,
    RankProcess,
    Tensors,
    check_drained,
    controller_of,
    local,
    make_manager,
    mapping,
    remote,
    result_of,
    tokens_of,
    until,
    wait_ready,
)

BIG_PAGES, BIG_SHAPE = 40, (2, 4, 2, 65536)       # 2 MiB a layer and page, 6 MiB a block: transfers take a while


def fd_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_rank_killed_in_a_transfer(tmp_path: Path) -> None:
    """Its blocks are not visible, its slots come back; a new process takes its place and reads what was whole."""
    manager = make_manager(tmp_path / "s", 30)
    rank = RankProcess(str(tmp_path / "s"), 0, BIG_PAGES, BIG_SHAPE)
    try:
        wait_ready(manager, 30)
        rank("tensors", "fill", [0, 1], 1)
        before = rank("tensors", "read", [0, 1])
        assert manager.wait(task := manager.put_async(tokens_of(2), mapping([0, 1])))[task].status is Status.SUCCESS
        task = manager.put_async(tokens_of(20, 1), mapping(range(20)))
        rank.signal(signal.SIGKILL)
        start = time.monotonic()
        response = manager.wait(task, timeout=10)[task]
        assert time.monotonic() - start < 3
        assert response.status in (Status.FAILED, Status.SUCCESS)          # it may have been quick
        manager.wait(task, timeout=10, completely=True)
        until(lambda: not manager.is_ready())
        failed = manager.put_async(tokens_of(2, 2), mapping([0, 1]))
        assert manager.wait(failed)[failed].status is Status.FAILED
        rank.kill()
        rank = RankProcess(str(tmp_path / "s"), 0, BIG_PAGES, BIG_SHAPE)
        wait_ready(manager, 30)
        task = manager.get_async(tokens_of(2), mapping([5, 6]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert rank("tensors", "read", [5, 6]) == before
        task, mask = manager.get_match(tokens_of(20, 1))
        assert mask.sum() == (80 if response.status is Status.SUCCESS else 0)      # a put of a lost rank leaves nothing
        manager.cancel(task)
        check_drained(manager)
    finally:
        manager.shutdown()
        rank.kill()


CONTROLLER = """
import sys
from tests.support.harness import *
manager = make_manager(Path(sys.argv[1]))
wait_ready(manager)
hasher = manager.blocks.hasher()
hasher.extend(tokens_of(3))
task = manager.blocks.put_blocks(hasher.keys, 0, np.arange(3, dtype=np.int32), fence=5)
print("under way", flush=True)
sys.stdin.read()
"""


def start_controller(port: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )


def test_controller_killed(tmp_path: Path) -> None:
    """The rank learns of it in seconds, with a result for what it was given; a new controller takes the socket over."""
    before, memory = fd_count(), shared_memory()
    with start_controller(tmp_path / "s") as controller:
        tensors = Tensors()
        client = KVTPClient(str(tmp_path / "s"))
        client.register_tensors(tensors.specs(), 20.0)
        client.wait_connected(20.0)
        assert controller.stdout is not None
        assert controller.stdout.readline() == "under way\n"
        assert client.poll_results() == []
        controller.kill()
        start = time.monotonic()
        until(lambda: client.is_lost, 3.0)
        assert time.monotonic() - start < 3
        [result] = client.poll_results()
        assert result.failed_pages.tolist() == [0, 1, 2]
        assert not client.is_connected
        client.advance_fence(save=5)
        client.close()
    with local(tmp_path):
        pass
    assert shared_memory() == memory
    assert fd_count() == before


def test_both_killed(tmp_path: Path) -> None:
    memory = shared_memory()
    with start_controller(tmp_path / "s") as controller:
        rank = RankProcess(str(tmp_path / "s"))
        assert controller.stdout is not None
        assert controller.stdout.readline() == "under way\n"
        controller.kill()
        rank.signal(signal.SIGKILL)
        rank.kill()
    assert shared_memory() == memory
    with local(tmp_path) as (manager, _, tensors):
        tensors.fill([1], 1)
        task = manager.put_async(tokens_of(1), mapping([1]))
        assert manager.wait(task)[task].status is Status.SUCCESS


def test_a_stopped_rank_is_late_and_its_slots_stay_reserved(tmp_path: Path) -> None:
    with remote(tmp_path, op_timeout_s=0.5) as (manager, rank):
        rank("client", "wait_connected", 10)
        rank.signal(signal.SIGSTOP)
        task = manager.put_async(tokens_of(4), mapping(range(4)))
        start = time.monotonic()
        assert manager.wait(task, timeout=10)[task].status is Status.TIMEOUT
        assert time.monotonic() - start < 3
        assert manager.stats()["free_slots"] == 44                         # it might wake up and write
        assert manager.wait(task, timeout=0.2, completely=True)[task].status is Status.TIMEOUT
        assert manager.stats()["free_slots"] == 44
        rank.signal(signal.SIGCONT)
        until(lambda: manager.stats()["free_slots"] == 48)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(4))
        assert manager.blocks.lookup(hasher.keys).num_ready == 0
        rank.signal(signal.SIGSTOP)
        task = manager.put_async(tokens_of(4, 1), mapping(range(4)))
        assert manager.wait(task, timeout=10)[task].status is Status.TIMEOUT
        rank.signal(signal.SIGKILL)
        until(lambda: manager.stats()["free_slots"] == 48)


def test_silent_and_babbling_connections_harm_nobody(tmp_path: Path) -> None:
    before = fd_count()
    with local(tmp_path, handshake_timeout_s=0.3) as (manager, _, tensors):
        path = str(tmp_path / "s")
        assert os.stat(path).st_mode & 0o777 == 0o600
        silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        silent.connect(path)
        babbling = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        babbling.connect(path)
        babbling.send(b"\xff" * 40)
        gone = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gone.connect(path)
        gone.close()
        tensors.fill([0], 1)
        task = manager.put_async(tokens_of(1), mapping([0]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        babbling.settimeout(3)
        assert b"no HELLO of this version" in babbling.recv(4096)
        silent.settimeout(3)
        assert silent.recv(10) == b""                                      # hung up on, in time
        silent.close()
        babbling.close()
    assert fd_count() == before


def test_ranks_and_controllers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, _tensors):
        second = KVTPClient(str(tmp_path / "s"))
        second.register_tensors(Tensors().specs(), 5.0)
        with pytest.raises(RegistrationError, match="registered already"):
            second.wait_connected(5.0)
        second.close()
        stranger = KVTPClient(str(tmp_path / "s"), dp_client_id=3)
        stranger.register_tensors(Tensors().specs(), 5.0)
        with pytest.raises(RegistrationError, match="not served here"):
            stranger.wait_connected(5.0)
        stranger.close()
        with pytest.raises(RegistrationError, match="another controller"):
            make_manager(tmp_path / "s")
        assert manager.is_ready()
    nobody = KVTPClient(str(tmp_path / "nobody"))
    nobody.register_tensors(Tensors().specs(), 0.1)
    with pytest.raises(RegistrationError, match="no controller listens"):
        nobody.wait_connected(5.0)
    assert nobody.is_lost
    nobody.close()


@pytest.mark.parametrize("kind", ["result", "position"])
def test_a_corrupt_ring_costs_the_rank_its_connection(tmp_path: Path, kind: str) -> None:
    with remote(tmp_path, op_timeout_s=2.0) as (manager, rank):
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        [link] = controller_of(manager)._cache.transfer._device.links
        rings = link.rings
        rank.signal(signal.SIGSTOP)
        with open(f"/proc/self/fd/{rings.fd}", "r+b", buffering=0) as memory:
            # the ring of results: garbage where the next record will be read, and a position that says it is there
            if kind == "result":
                memory.seek(rings.ring_bytes + 256)
                memory.write(np.full(4096, 0xA5, dtype=np.uint8).tobytes())
            memory.seek(rings.ring_bytes + 128)
            memory.write((1 << 40 if kind == "position" else 4096).to_bytes(8, "little"))
        os.eventfd_write(rings.receiving_event_fd, 1)
        until(lambda: not link.healthy)
        task = manager.put_async(tokens_of(2, 1), mapping([2, 3]))
        assert manager.wait(task, timeout=1)[task].status is Status.FAILED  # at once: it is sent to no agent
        rank.signal(signal.SIGCONT)                                        # it sees that it was cut off, and ends
        until(lambda: not manager.is_ready())
        assert rank("client", "is_lost")


def test_results_that_cannot_be_taken_in_cost_the_rank_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote(tmp_path, op_timeout_s=2.0) as (manager, rank):
        answer = Flight.answer

        def fail_once(*_args: object) -> None:
            monkeypatch.setattr(Flight, "answer", answer)
            raise ValueError("a mistake of ours")

        [link] = controller_of(manager)._cache.transfer._device.links
        monkeypatch.setattr(Flight, "answer", fail_once)
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        until(lambda: not link.healthy)
        until(lambda: not manager.is_ready())                              # the rank sees that it was cut off, and ends
        assert manager.wait(task, timeout=10, completely=True)[task].status in (Status.FAILED, Status.TIMEOUT)
        assert rank("client", "is_lost")


@pytest.mark.parametrize("put", [True, False])
def test_cancel_at_each_stage(tmp_path: Path, put: bool) -> None:
    with local(tmp_path) as (manager, client, tensors):
        tokens, pages = tokens_of(8), range(8)
        tensors.fill(pages, 1)
        if not put:
            manager.wait(manager.put_async(tokens, mapping(pages)))
        blocks = manager.blocks
        match, launch = (manager.put_match, blocks.put_blocks) if put else (manager.get_match, blocks.get_blocks)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens)
        task, mask = match(tokens)                                         # matched
        assert mask.all()
        manager.cancel(task)
        held = launch(hasher.keys, 0, np.arange(8, dtype=np.int32), fence=9)
        assert held is not None
        manager.cancel(held)                                               # behind a fence
        assert manager.wait(held)[held].status is Status.CANCELLED
        assert not result_of(client, held).ok.any()                        # the rank is told
        for _ in range(50):                                                # while it runs, or just after
            running = launch(hasher.keys, 0, np.arange(8, dtype=np.int32))
            if running is None:
                break
            manager.cancel(running)
            response = manager.wait(running, completely=True)[running]
            assert response.status in (Status.CANCELLED, Status.SUCCESS)
        manager.cancel([held, 12345])                                      # ended, unknown
        found = manager.blocks.lookup(hasher.keys).num_ready
        assert found in ((0, 8) if put else (8,))


def test_a_ring_that_is_full_only_delays(tmp_path: Path) -> None:
    with local(tmp_path, num_slots=600, ring_bytes=4096) as (manager, _, tensors):
        pages = np.random.default_rng(0).permutation(PAGES)
        tensors.fill(pages, 1)
        before = tensors.read(pages)
        tasks = [manager.put_async(tokens_of(PAGES, seed), mapping(pages)) for seed in range(8)]
        assert {response.status for response in manager.wait(tasks).values()} == {Status.SUCCESS}
        for seed in range(8):
            tensors.zero()
            task = manager.get_async(tokens_of(PAGES, seed), mapping(pages))
            assert manager.wait(task)[task].status is Status.SUCCESS
            assert tensors.read(pages) == before


def test_one_of_two_ranks_dies(tmp_path: Path) -> None:
    """The other rank gets the report that the block failed, although it could have moved its part."""
    with remote(tmp_path, ranks=2) as (manager, first, second):
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        second.signal(signal.SIGKILL)
        until(lambda: not manager.is_ready())
        first("failed", "pages")
        task = manager.get_async(tokens_of(2), mapping([2, 3]))
        assert manager.wait(task)[task].status is Status.FAILED
        until(lambda: [2, 3] in first("failed", "pages"))
