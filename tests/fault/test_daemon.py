"""The daemon and its engines: any of them is killed, stopped, or talks nonsense, and the others go on."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from flexkv._core.record_rings import RecordRings
from flexkv.config import process_environment
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError
from flexkv.protocol import session as protocol
from flexkv.protocol.session import BlocksRequest, Hello, Request, Welcome
from flexkv.server.daemon import Daemon
from tests.support.daemon import engine, make_engine, running, sessions_of
from tests.support.harness import RankProcess, Tensors, mapping, tokens_of, until

KILLS = int(os.environ.get("DAEMON_KILLS", "6"))
"""Engines that are killed; 1,000 in the nightly run."""

TWO_POOLS = {"server_max_pools": 2}


class DaemonProcess:
    """``flexkv serve`` in a process of its own."""

    def __init__(self, path: Path, num_slots: int = 48, **settings: str) -> None:
        variables = {f"FLEXKV_{name.upper()}": value for name, value in settings.items()}
        self.path = path
        self._environment = process_environment(FLEXKV_NUM_CPU_BLOCKS=str(num_slots), **variables)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "flexkv.cli", "serve", "--socket", str(self.path)]
        self.process = subprocess.Popen(command, env=self._environment)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def serving(path: Path, num_slots: int = 48, **settings: str) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(path, num_slots, **settings)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.stop(signal.SIGKILL)


def expected(pages: list[int], seed: int) -> bytes:
    """What computing writes."""
    tensors = Tensors()
    tensors.fill(pages, seed)
    return tensors.read(pages)


def drained(daemon: Daemon, num_sessions: int = 0) -> bool:
    """Whether ``num_sessions`` sessions are left, no task runs, and no slot is held."""
    caches = [domain.cache for domain in daemon._pools.values()]
    for cache in caches:
        cache.space.index.check_integrity()
    return len(sessions_of(daemon)) == num_sessions and all(
        cache.num_engines == num_sessions and cache.stats()["tasks"] == 0
        and cache.stats()["free_slots"] + cache.stats()["indexed_blocks"] == cache.stats()["num_slots"]
        and cache.stats()["limbo_slots"] == 0 for cache in caches
    )


# ---- engines -----------------------------------------------------------------------------------------------------


def test_the_second_engine_loads_the_blocks_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with running(path) as daemon, engine(path, tmp_path / "r0") as (one, _, first), engine(path, tmp_path / "r1") as (
        two, _, second
    ):
        first.fill([0, 1, 2], 7)
        task = one.put_async(tokens_of(3), mapping([0, 1, 2]))
        assert one.wait(task)[task].status is Status.SUCCESS
        task, mask = two.get_match(tokens_of(3))
        assert mask.all()
        two.launch([task], [mapping([4, 5, 6])])
        assert two.wait(task)[task].status is Status.SUCCESS
        assert second.read([4, 5, 6]) == expected([0, 1, 2], 7)
        assert one.stats()["indexed_blocks"] == 3                      # stored once
        assert len({session.cache for session in sessions_of(daemon)}) == 1
        one.shutdown()
        until(lambda: len(sessions_of(daemon)) == 1)
        assert two.get_match(tokens_of(3))[1].all()                    # the blocks stay


def test_new_weights_of_one_engine_leave_the_cache_of_others(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with running(path), engine(path, tmp_path / "r0") as (one, _, first), engine(path, tmp_path / "r1") as (two, _, _):
        first.fill([0, 1], 7)
        task = one.put_async(tokens_of(2), mapping([0, 1]))
        assert one.wait(task)[task].status is Status.SUCCESS
        one.reset(new_weights=True)
        assert not one.get_match(tokens_of(2))[1].any()
        assert two.get_match(tokens_of(2))[1].all()
        two.reset()
        assert not two.get_match(tokens_of(2))[1].any()


def _killed_engine(pipe: Connection, path: str, port: str, seed: int) -> None:
    """Puts and gets until it is killed; some tasks are matched and not launched, some wait for a fence."""
    rng = random.Random(seed)
    with engine(Path(path), Path(port)) as (manager, client, tensors):
        tensors.fill(list(range(8)), 1)
        pipe.send("ready")
        for turn in range(1_000_000):
            tokens, pages = tokens_of(4, rng.randrange(6)), mapping(rng.sample(range(8), 4))
            kind = rng.randrange(5)
            if kind == 0:
                manager.get_match(tokens)
            elif kind == 1:
                manager.put_match(tokens)
            elif kind == 2:
                keys = manager.blocks.keys(tokens)
                manager.blocks.put_blocks(keys, 0, np.arange(4, dtype=np.int32), turn + 2, provisional=True)
            else:
                manager.wait((manager.put_async if kind == 3 else manager.get_async)(tokens, pages))
            client.advance_fence(save=turn)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_killed_engines_leave_no_hold_and_no_slot(tmp_path: Path, kind: signal.Signals) -> None:
    path, context = tmp_path / "server", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fault.test_daemon"])
    with running(path) as daemon, engine(path, tmp_path / "bystander") as (manager, _, tensors):
        for number in range(KILLS):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_killed_engine, args=(theirs, str(path), str(tmp_path / f"r{number}"), number), daemon=True
            )
            process.start()
            theirs.close()
            assert ours.poll(30.0)
            time.sleep(random.Random(number).random() * 0.05)
            assert process.pid is not None
            os.kill(process.pid, kind)
            process.join(20)
            tensors.fill([0, 1], number + 2)
            task = manager.put_async(tokens_of(2, 1000 + number), mapping([0, 1]))
            assert manager.wait(task, 5.0)[task].status is Status.SUCCESS
            task = manager.get_async(tokens_of(2, 1000 + number), mapping([2, 3]))
            assert manager.wait(task, 5.0)[task].status is Status.SUCCESS
            assert tensors.read([2, 3]) == expected([0, 1], number + 2)
        until(lambda: drained(daemon, 1), 10.0)
        manager.reset()
        assert manager.stats()["free_slots"] == manager.stats()["num_slots"]


# ---- the daemon --------------------------------------------------------------------------------------------------


def test_a_daemon_is_killed_and_restarted(tmp_path: Path) -> None:
    """Engines run on without KV, and share again when it is back."""
    path = tmp_path / "server"
    with serving(path) as daemon, engine(path, tmp_path / "r0") as (one, _, first), engine(path, tmp_path / "r1") as (
        two, _, second
    ):
        for turn in range(3):
            tokens, pages = tokens_of(3, turn), [0, 1, 2]
            first.fill(pages, turn)
            task = one.put_async(tokens, mapping(pages))
            assert one.wait(task)[task].status is Status.SUCCESS
            second.zero()
            task = two.get_async(tokens, mapping([3, 4, 5]))
            assert two.wait(task)[task].status is Status.SUCCESS
            assert second.read([3, 4, 5]) == expected(pages, turn)
            held, _ = two.get_match(tokens)
            waiting = one.get_match(tokens)[0]
            one.launch([waiting], [mapping(pages)], fence=1_000_000)    # runs, until the daemon ends
            daemon.stop(signal.SIGKILL if turn % 2 == 0 else signal.SIGTERM)
            began = time.monotonic()
            assert one.wait(waiting, 5.0)[waiting].status is not Status.SUCCESS
            assert not two.get_match(tokens)[1].any()
            task = two.put_async(tokens, mapping(pages))
            assert two.wait(task, 5.0)[task].status is not Status.TIMEOUT
            two.launch([held], [mapping(pages)]) if held in two.blocks._tasks._matched else None  # type: ignore[attr-defined]
            assert time.monotonic() - began < 5.0
            daemon.start()
            one.wait_ready(20.0)
            two.wait_ready(20.0)
            assert not two.get_match(tokens)[1].any()                  # a new daemon has nothing


def test_engines_find_a_daemon_that_starts_later(tmp_path: Path) -> None:
    path = tmp_path / "server"
    manager, tensors = make_engine(path, tmp_path / "r"), Tensors()
    rank = RankProcess(str(tmp_path / "r"))
    try:
        assert not manager.is_ready()
        assert not manager.get_match(tokens_of(2))[1].any()
        task = manager.get_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.UNREADY
        assert manager.stats() == {}
        with serving(path):
            manager.wait_ready(20.0)
            rank("tensors", "fill", [0, 1], 7)
            task = manager.put_async(tokens_of(2), mapping([0, 1]))
            assert manager.wait(task)[task].status is Status.SUCCESS
            rank("tensors", "zero")
            task = manager.get_async(tokens_of(2), mapping([2, 3]))
            assert manager.wait(task)[task].status is Status.SUCCESS
            tensors.fill([0, 1], 7)
            assert rank("tensors", "read", [2, 3]) == tensors.read([0, 1])
    finally:
        manager.shutdown()
        rank.kill()


def test_a_stopped_daemon_costs_a_miss(tmp_path: Path) -> None:
    """No call of a scheduler waits longer than 0.1 s, and after three none waits at all."""
    path = tmp_path / "server"
    with serving(path) as daemon, engine(path, tmp_path / "r") as (manager, _, tensors):
        tensors.fill([0, 1], 7)
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        times = []
        for _ in range(10):
            began = time.monotonic()
            assert not manager.get_match(tokens_of(2))[1].any()
            times.append(time.monotonic() - began)
        assert max(times) < 0.5
        assert sum(times[4:]) < 0.1
        daemon.process.send_signal(signal.SIGCONT)
        manager.wait_ready(5.0)
        until(lambda: bool(manager.get_match(tokens_of(2))[1].all()))
        until(lambda: manager.stats().get("tasks", 99) <= 1)           # the matches that came too late were cancelled
        task = manager.get_async(tokens_of(2), mapping([2, 3]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert tensors.read([2, 3]) == expected([0, 1], 7)


def test_a_reset_while_the_daemon_is_away_is_made_up_for(tmp_path: Path) -> None:
    path = tmp_path / "server"
    settings = {"ssd_cache_gb": "0.01", "ssd_cache_dir": str(tmp_path / "ssd"), "ssd_admission": "all"}
    with serving(path, **settings) as daemon, engine(path, tmp_path / "r") as (manager, _, tensors):
        tensors.fill([0, 1], 7)
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        daemon.stop()                                                  # writes the blocks to SSD
        daemon.start()
        manager.wait_ready(20.0)
        until(lambda: bool(manager.get_match(tokens_of(2))[1].all()))  # from SSD
        daemon.stop()
        manager.reset()
        daemon.start()
        manager.wait_ready(20.0)
        until(lambda: manager.stats().get("ssd_store_is_ready", 1) == 1)
        time.sleep(0.2)
        assert not manager.get_match(tokens_of(2))[1].any()


# ---- nonsense ----------------------------------------------------------------------------------------------------


def connected(path: Path, message: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(5.0)
    connection.connect(str(path))
    connection.send(message)
    return connection


def hello(port: Path, **changes: object) -> bytes:
    fields = {"domain": "d", "tokens_per_block": 4, "ranks": 1, "dp_client_id": 0, "register_port": str(port),
              "name": "n", "model": "m", "first_task": 0, **changes}
    return b"FLEXKVS1" + json.dumps(fields).encode()


@pytest.mark.parametrize("message", [
    b"", b"x", b"FLEXKVS1", b"FLEXKVS1[]", b"FLEXKVS1{}", b"FLEXKVS2{}", b"FLEXKVS1" + b"[" * 10_000,
    hello(Path("/r"), ranks=0), hello(Path("/r"), ranks="1"), hello(Path("/r"), tokens_per_block=True),
    hello(Path("/r"), domain="x" * 20_000), hello(Path("/r"), first_task=1 << 70), hello(Path("/r"), extra=1),
    hello(Path("/proc/nothing/r")), hello(Path("relative")),
])
def test_a_bad_hello_is_refused(tmp_path: Path, message: bytes) -> None:
    path = tmp_path / "server"
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r") as (manager, _, _):
        with connected(path, message[:16_000]) as connection:
            if message:
                answer = connection.recv(20_000)
                assert answer == b"" or b"error" in answer
        assert manager.is_ready()
        assert manager.stats()["tasks"] == 0
        until(lambda: len(sessions_of(daemon)) == 1)


def session_of(path: Path, port: Path) -> tuple[socket.socket, RecordRings, int]:
    """A session of a process that makes its own records."""
    connection = connected(path, Hello("d", 4, 1, 0, str(port), "n", "m", 0).pack())
    message, fds, _, _ = socket.recv_fds(connection, 20_000, 3)
    try:
        welcome = Welcome.unpack(message)
    except RegistrationError:
        connection.close()
        raise
    return connection, RecordRings(welcome.ring_bytes, fds), welcome.first_task


@pytest.mark.parametrize("seed", range(6))
def test_bad_records_end_their_session_alone(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "server", random.Random(seed)
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r") as (manager, _, tensors):
        connection, rings, first = session_of(path, tmp_path / "bad")
        good = b"".join(bytes(part) for part in BlocksRequest(first, np.zeros((2, 2), np.uint64)).parts())
        kind, content = [
            (99, b""), (Request.LOOKUP, b""), (Request.LOOKUP, good[:-1]), (Request.MATCH_GET, good + b"x"),
            (Request.LAUNCH, protocol.LAUNCH.pack(first, 0, 0, 0, 1, 0)),
            (Request.CALL, protocol.CALL.pack(first, 3, 0) + b"[1]"),
        ][seed]
        assert rings.push(kind, content)
        assert connection.recv(100) == b""                             # it hangs up
        connection.close()
        until(lambda: len(sessions_of(daemon)) == 1)
        tensors.fill([0], rng.randrange(9))
        task = manager.put_async(tokens_of(1), mapping([0]))
        assert manager.wait(task)[task].status is Status.SUCCESS


def test_an_engine_that_reads_nothing_is_dropped_and_others_are_served(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r") as (manager, _, _):
        connection, rings, number = session_of(path, tmp_path / "deaf")
        keys, deadline = np.zeros((1, 2), np.uint64), time.monotonic() + 30.0
        while len(sessions_of(daemon)) == 2 and time.monotonic() < deadline:
            number += 1
            if not rings.push(Request.LOOKUP, *BlocksRequest(number, keys).parts()):
                began = time.monotonic()
                assert manager.blocks.lookup(manager.blocks.keys(tokens_of(1))).num_ready == 0
                assert time.monotonic() - began < 0.5
        assert len(sessions_of(daemon)) == 1
        connection.close()
