"""Each failure stays where it happened: of an event, a connection, an op, a rank, a part that is closed."""

import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.registry import Registry
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.rank.tp_client import KVTPClient
from flexkv.storage.host_pool import HostPool
from flexkv.transfer.graph import OpStatus, TransferGraph, TransferOp
from tests.support.harness import (
    LAYERS,
    TOKENS,
    RankProcess,
    Tensors,
    controller_of,
    hello_of,
    local,
    make_manager,
    mapping,
    rank_of,
    remote,
    tokens_of,
    until,
    wait_ready,
)

IDS = np.arange(3, dtype=np.int32)


def talk(path: Path, message: bytes, timeout_s: float = 5.0) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        connection.send(message)
        return connection.recv(4096)


def is_alive(manager: KVManager) -> bool:
    thread = controller_of(manager)._cache.transfer._thread
    return thread is not None and thread.is_alive()


def save(manager: KVManager, seed: int, timeout: float = 5.0) -> Status:
    task = manager.put_async(tokens_of(2, seed), mapping([0, 1]))
    return manager.wait(task, timeout)[task].status


# ---- connections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["dp_client_id", "pp_rank", "rank", "num_pages", "segment_bytes"])
def test_a_hello_with_impossible_numbers_is_refused_and_others_go_on(tmp_path: Path, field: str) -> None:
    manager = make_manager(tmp_path / "s", ranks=2)
    clients = [KVTPClient(str(tmp_path / "s"), intra_client_id=rank) for rank in range(2)]
    tensors = Tensors()
    try:
        clients[0].register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        large = (1 << 63) if field in ("num_pages", "segment_bytes") else (1 << 31) - 1
        for wrong in (large, 0 if field in ("num_pages", "segment_bytes") else -1):
            hello = hello_of(**{"rank": 1, field: (wrong,) if field == "num_pages" else wrong})
            assert field.encode() in talk(tmp_path / "s", hello.pack())
        assert is_alive(manager)
        clients[1].register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        wait_ready(manager)
    finally:
        manager.shutdown()
        for client in clients:
            client.close()


def test_a_connection_that_cannot_be_handled_is_closed_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local(tmp_path) as (manager, _, tensors):
        monkeypatch.setattr(Registry, "_admit", lambda *args: 1 // 0)
        for _ in range(20):
            assert talk(tmp_path / "s", hello_of(1).pack()) == b""
        assert is_alive(manager)
        assert controller_of(manager)._cache.transfer.in_service
        tensors.fill([0, 1], 1)
        assert save(manager, 1) is Status.SUCCESS


def test_ranks_that_no_pool_fits_are_refused_at_once(tmp_path: Path) -> None:
    manager = KVManager(
        ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16", tp_size=2),
        CacheConfig(tokens_per_block=TOKENS, cpu_cache_gb=1e-6), gpu_register_port=str(tmp_path / "s"),
        transfer_config=TransferConfig(),
    )
    manager.start()
    tensors, clients = Tensors(), [KVTPClient(str(tmp_path / "s"), intra_client_id=rank) for rank in range(2)]
    try:
        start = time.monotonic()
        for client in clients:
            client.register_tensors(tensors.specs(), 60.0, keep_alive=tensors)
        for client in clients:
            with pytest.raises(RegistrationError, match="give the host tier more memory"):
                client.wait_connected(10.0)
        assert time.monotonic() - start < 5
    finally:
        manager.shutdown()
        for client in clients:
            client.close()


@pytest.mark.parametrize("error", [
    OSError(24, "Too many open files"), MemoryError("no memory"), OverflowError("too large"), RuntimeError("no thread"),
])
def test_a_pool_that_fails_in_any_way_is_made_for_the_next_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    manager, tensors = make_manager(tmp_path / "s"), Tensors()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(HostPool, "populate", fail)
            with rank_of(tmp_path, tensors) as client, pytest.raises(RegistrationError, match=str(error.args[-1])):
                client.wait_connected(10.0)
        assert not manager.is_ready()
        with rank_of(tmp_path, tensors):
            wait_ready(manager)
    finally:
        manager.shutdown()


def test_out_of_descriptors_the_listener_pauses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = make_manager(tmp_path / "s", num_slots=4)
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    until(lambda: is_alive(manager))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(5.0)
        caplog.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many"):
                held.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(10_000))
            client.connect(str(tmp_path / "s"))          # it stays in the backlog
            before = time.process_time()
            time.sleep(1.0)                              # what is measured: how busy the thread is meanwhile
            assert time.process_time() - before < 0.3
            assert sum("cannot connect" in record.message for record in caplog.records) == 1
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.send(b"\xff" * 40)
        assert b"no HELLO" in client.recv(4096)          # it is accepted once there is room
    manager.shutdown()


# ---- the thread -------------------------------------------------------------------------------------------------


def test_one_failure_of_the_thread_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local(tmp_path) as (manager, _, tensors):
        for step in ("_handle_events", "_take_results", "_resend", "_enforce_deadlines", "_grow"):
            failed = threading.Event()

            def fail(failed: threading.Event = failed) -> None:
                if not failed.is_set():
                    failed.set()
                    raise KeyError("a mistake of ours")

            with monkeypatch.context() as patched:
                patched.setattr(controller_of(manager)._cache.transfer, step, fail)
                controller_of(manager)._cache.transfer._watch.wake()
                assert failed.wait(5.0)
            # a whole turn has succeeded since
            until(lambda: controller_of(manager)._cache.transfer._thread._failures == 0)
            tensors.fill([0, 1], 1)
            assert save(manager, len(step)) is Status.SUCCESS
            assert is_alive(manager)
            assert controller_of(manager)._cache.transfer.in_service


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"), SystemExit(1), MemoryError()])
def test_a_thread_that_fails_again_and_again_goes_out_of_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """Waiters wake, the rank is cut off, matches are empty, puts do nothing; nothing raises, and it shuts down."""
    manager = make_manager(tmp_path / "s")
    rank = RankProcess(str(tmp_path / "s"))
    try:
        wait_ready(manager)
        assert save(manager, 1) is Status.SUCCESS
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(3, 2))
        held = manager.blocks.put_blocks(hasher.keys, 0, IDS, fence=9)
        assert held is not None

        def fail() -> None:
            raise error

        monkeypatch.setattr(controller_of(manager)._cache.transfer, "_enforce_deadlines", fail)
        start = time.monotonic()
        assert manager.wait(held, 15.0)[held].status is Status.FAILED
        assert time.monotonic() - start < 12
        assert not controller_of(manager)._cache.transfer.in_service
        assert not manager.is_ready()
        until(lambda: rank("client", "is_lost"))
        task, mask = manager.get_match(tokens_of(2, 1))
        assert not mask.any()
        manager.cancel(task)
        assert manager.blocks.put_blocks(hasher.keys, 0, IDS) is None or save(manager, 5) is not Status.SUCCESS
        assert sum("out of service" in record.message for record in caplog.records if record.levelno >= 50) == 1
        assert is_alive(manager)
        until(lambda: not controller_of(manager).tasks.unsettled(), 10.0)
    finally:
        manager.shutdown()
        rank.kill()


# ---- ops and messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("fence", -1), ("fence", 1 << 64), ("fence", None), ("fence", np.zeros(2)), ("counter", -1),
    ("counter", 1 << 32), ("task_id", -1), ("kind", None),
])
def test_a_part_that_cannot_be_sent_fails_its_op_alone(tmp_path: Path, name: str, value: object) -> None:
    """Past the checks at the door, as a mistake of ours would."""
    with local(tmp_path) as (manager, _, tensors):
        tensors.fill([0, 1], 1)
        engine, done = controller_of(manager)._cache.transfer, threading.Event()
        op = TransferOp(OpKind.H2D, IDS, IDS)
        graph = TransferGraph(next(engine.task_ids), [op])
        if name == "kind":
            engine._executors[value, 0] = engine._device  # type: ignore[index]
        setattr(op, name, value) if name != "task_id" else None
        if name == "task_id":
            value = 1 << 64
            graph.task_id = op.task_id = value  # type: ignore[assignment]
        engine.submit(graph, lambda graph: done.set())
        assert done.wait(5.0)
        assert graph.status is OpStatus.FAILED
        assert not op.ok.any()
        assert save(manager, 1) is Status.SUCCESS
        assert is_alive(manager)


@pytest.mark.parametrize("arguments", [
    {"fence": -1}, {"fence": None}, {"fence": 1 << 64}, {"fence": 1.5}, {"counter": -1}, {"dp_client_id": -1},
    {"src": np.array([0, 1 << 40, 2])}, {"dst": np.array([0.0, 1.0, 2.0])}, {"src": np.zeros((3, 1), np.int64)},
])
def test_ops_check_their_numbers(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TransferOp(OpKind.H2D, **{"src": IDS, "dst": IDS, **arguments})  # type: ignore[arg-type]


def test_cancels_that_find_the_ring_full_are_sent_all_the_same(tmp_path: Path) -> None:
    """With nothing but fences to wait for, no result comes that would flush them."""
    manager = make_manager(tmp_path / "s", 200, ring_bytes=4096, op_timeout_s=60.0)
    rank = RankProcess(str(tmp_path / "s"), 0, 400)
    try:
        wait_ready(manager, 200)
        count = 64
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(count + 1))
        rank("tensors", "fill", range(count + 1), 1)
        put = manager.blocks.put_blocks(hasher.keys, 0, np.arange(count + 1, dtype=np.int32))
        assert put is not None
        assert manager.wait(put, 10, completely=True)[put].status is Status.SUCCESS
        rank("tensors", "zero")
        rank.signal(signal.SIGSTOP)
        loads = [
            manager.blocks.get_blocks(hasher.keys, i, np.array([100 + i], dtype=np.int32), fence=7)
            for i in range(count)
        ]
        [link] = controller_of(manager)._cache.transfer._device.links
        assert link.backlog                              # the ring is full
        manager.cancel(loads)
        assert not link._cancels                         # each has room
        rank.signal(signal.SIGCONT)
        until(lambda: not controller_of(manager).tasks.unsettled())
        assert {response.status for response in manager.wait(loads).values()} == {Status.CANCELLED}
        rank("client", "advance_fence", 7)
        assert not any(rank("tensors", "read", range(100, 100 + count)))
    finally:
        manager.shutdown()
        rank.kill()


def test_ops_that_find_the_ring_full_are_sent_when_there_is_room(tmp_path: Path) -> None:
    with remote(tmp_path, num_slots=200, ring_bytes=4096) as (manager, rank):
        rank.signal(signal.SIGSTOP)
        [link] = controller_of(manager)._cache.transfer._device.links
        tasks = []
        while not link.backlog:
            hasher = manager.blocks.hasher()
            hasher.extend(tokens_of(1, len(tasks)))
            # behind fences: no results
            tasks.append(manager.blocks.put_blocks(hasher.keys, 0, IDS[:1], fence=len(tasks)))
        rank.signal(signal.SIGCONT)
        until(lambda: not link.backlog)
        rank("client", "advance_fence", None, len(tasks))
        assert {response.status for response in manager.wait(tasks).values()} == {Status.SUCCESS}
