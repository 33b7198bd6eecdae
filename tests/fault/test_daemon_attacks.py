"""Faults of the daemon, its engines and their threads that were found by attacking it."""

import os
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.config import TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.protocol import session as protocol
from flexkv.protocol.session import BlocksRequest, LaunchRequest, Request
from flexkv.rank.rank import RankClient
from tests.fault.test_daemon import DaemonProcess, connected, hello, serving, session_of
from tests.support.daemon import engine, make_engine, running, sessions_of
from tests.support.harness import Tensors, mapping, tokens_of, until

SEEDS = int(os.environ.get("DAEMON_FUZZ_SEEDS", "2"))

TWO_POOLS = {"server_max_pools": 2}


def stop(daemon: DaemonProcess) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)


# ---- numbers of requests -----------------------------------------------------------------------------------------


def test_threads_of_an_engine_share_its_session(tmp_path: Path) -> None:
    """They send requests in another order than that of the numbers."""
    path = tmp_path / "server"
    with running(path) as daemon, engine(path, tmp_path / "r") as (manager, _, _):
        before, until_s = sessions_of(daemon), time.monotonic() + 1.0

        def work(seed: int) -> None:
            while time.monotonic() < until_s:
                manager.cancel(manager.get_match(tokens_of(2, seed))[0])
                manager.cancel(manager.put_match(tokens_of(2, seed))[0])

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sessions_of(daemon) == before


@pytest.mark.parametrize("other", [1 << 40, -1, -(1 << 32)])
def test_the_number_of_another_session_is_refused(tmp_path: Path, other: int) -> None:
    path = tmp_path / "server"
    with running(path) as daemon:
        connection, rings, first = session_of(path, tmp_path / "bad")
        with connection:
            assert rings.push(Request.MATCH_GET, *BlocksRequest(first + other, np.zeros((1, 2), np.uint64)).parts())
            assert connection.recv(100) == b""
        rings.close()
        until(lambda: not sessions_of(daemon))


def test_an_engine_with_large_numbers_does_not_use_up_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with running(path, cache=TWO_POOLS):
        for first in ((1 << 62) - 1, (1 << 62) - (1 << 33)):
            with connected(path, hello(tmp_path / "large", first_task=first)) as connection:
                connection.recv(1000)
        with engine(path, tmp_path / "r") as (manager, _, _):
            assert manager.is_ready()


# ---- a daemon that is stopped, or ends ---------------------------------------------------------------------------


def test_a_put_that_saves_nothing_ends_also_if_its_reply_is_late(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with serving(path) as daemon, engine(path, tmp_path / "r") as (manager, _, tensors):
        tensors.fill([0, 1], 7)
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        keys = manager.blocks.keys(tokens_of(2))
        stop(daemon)
        late = manager.blocks.put_blocks(keys, 0, np.arange(2, dtype=np.int32))
        assert late is not None
        daemon.process.send_signal(signal.SIGCONT)
        assert manager.blocks.wait(late, 5.0)[late].status is Status.UNREADY


def test_an_engine_ends_while_a_stopped_daemon_does_not_welcome_it(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with serving(path) as daemon:
        with engine(path, tmp_path / "r0"):
            pass
        stop(daemon)
        manager = make_engine(path, tmp_path / "r1")
        time.sleep(0.3)
        began = time.monotonic()
        manager.shutdown()
        assert time.monotonic() - began < 2.0


def test_no_call_waits_for_a_daemon_that_is_known_to_stand_still(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with serving(path) as daemon, engine(path, tmp_path / "r") as (manager, _, _):
        stop(daemon)
        for _ in range(4):
            manager.get_match(tokens_of(2))
        began = time.monotonic()
        for _ in range(5):
            manager.prefetch_async(tokens_of(2))
        assert time.monotonic() - began < 0.1


def test_a_reset_ends_with_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with serving(path) as daemon, engine(path, tmp_path / "r") as (manager, _, _):
        stop(daemon)
        threading.Timer(0.2, daemon.process.kill).start()
        began = time.monotonic()
        manager.reset()
        assert time.monotonic() - began < 2.0


def test_a_daemon_that_ends_with_engines_reports_success(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with serving(path) as daemon, engine(path, tmp_path / "r"):
        assert daemon.stop() == 0


def test_a_sequence_that_is_too_long_for_a_record_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with running(path), engine(path, tmp_path / "r") as (manager, _, _):
        tokens = np.arange(4 * 140_000)
        assert not manager.get_match(tokens)[1].any()
        keys = manager.blocks.keys(tokens)
        assert manager.blocks.put_blocks(keys, 0, np.zeros(len(keys), dtype=np.int32)) is None
        task = manager.blocks.get_blocks(keys, 0, np.zeros(len(keys), dtype=np.int32))
        assert manager.wait(task)[task].status is Status.FAILED
        assert manager.is_ready()


def test_a_daemon_leaves_the_disk_cache_of_another_one(tmp_path: Path) -> None:
    settings = {"ssd_cache_gb": "0.01", "ssd_cache_dir": str(tmp_path / "ssd")}
    with serving(tmp_path / "s1", **settings), serving(tmp_path / "s2", **settings), engine(
        tmp_path / "s1", tmp_path / "r1"
    ) as (manager, _, _):
        assert manager.is_ready()
        until(lambda: any((tmp_path / "ssd").glob("*/flexkv.lock")))
        before = set((tmp_path / "ssd").iterdir())
        with engine(tmp_path / "s2", tmp_path / "r2", model={"model_id": "other"}):
            assert before <= set((tmp_path / "ssd").iterdir())


def test_an_engine_that_is_admitted_as_the_daemon_ends_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server"
    with running(path) as daemon:
        monkeypatch.setattr("flexkv.transfer.engine.TransferEngine.call_soon", lambda self, function: None)
        with connected(path, hello(tmp_path / "r")):
            until(lambda: len(sessions_of(daemon)) == 1)
            assert (tmp_path / "r").exists()
            daemon.stop()
            until(lambda: not (tmp_path / "r").exists())


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_a_rank_that_registers_again_knows_which_loads_it_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only once its agent, which may still write the pages, has ended."""
    path, tensors = tmp_path / "server", Tensors()
    with running(path), RankClient(str(tmp_path / "r"), transfer_config=TransferConfig(), reconnect=True) as rank:
        manager = make_engine(path, tmp_path / "r")
        rank.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        manager.wait_ready(10.0)
        task = manager.put_async(tokens_of(2), mapping([0, 1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        pages = np.array([2, 3], dtype=np.int32)
        task = manager.blocks.get_blocks(manager.blocks.keys(tokens_of(2)), 0, pages, fence=1000)
        known_at = rank.num_ended
        assert not rank.has_lost(task, known_at)
        reached, goes_on, keep = threading.Event(), threading.Event(), rank._keep_results

        def held(agent: Any) -> None:
            if threading.current_thread().name == "flexkv-register":
                reached.set()
                goes_on.wait(10.0)
            keep(agent)

        monkeypatch.setattr(rank, "_keep_results", held)
        rank.leave()
        assert reached.wait(10.0)
        assert not rank.has_lost(task, known_at)                       # its agent runs
        goes_on.set()
        until(lambda: rank.is_connected, 10.0)
        assert rank.has_lost(task, known_at)
        manager.shutdown()


# ---- nonsense ----------------------------------------------------------------------------------------------------


def test_a_hello_without_a_form_in_utf8_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "server"

    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    with running(path) as daemon:
        before = num_open()
        for _ in range(8):
            with connected(path, hello(tmp_path / "bad", domain="\ud800")) as connection:
                assert b"error" in connection.recv(1000)
        until(lambda: num_open() == before)
        assert not daemon._pools
        assert not (tmp_path / "bad").exists()


def random_record(rng: random.Random, first: int, number: int) -> tuple[Request, tuple[Any, ...]]:
    kind = rng.choice(list(Request))
    large = [0, 1, 2, 1 << 31, (1 << 32) - 1]
    keys = np.arange(2 * rng.randrange(4), dtype=np.uint64).reshape(-1, 2)
    if kind is Request.LAUNCH:
        pages = [np.array([1], dtype=np.int32)] * 2
        return kind, LaunchRequest(
            number, [first, number], pages, rng.choice([0, 1 << 63]), rng.choice(large), rng.randrange(32)
        ).parts()
    if kind is Request.CALL:
        return kind, protocol.pack_call(number, rng.choice([
            {"command": "pin", "name": "x" * 5000, "tenant": rng.choice([0, 1 << 70, -1])}, {"command": "pins"},
            {"command": "unpin", "name": "\ud800"}, {"command": "tenant", "namespace": rng.choice([[1], [[]]])},
            {"command": "set_prefill_rate", "tokens_per_s": rng.choice([1.0, float("nan"), float("inf"), -1.0])},
            {"command": "reset", "new_weights": rng.random() < 0.5}, {"command": "check_integrity"}, {},
        ]), keys)
    if kind is Request.ACCEPT:
        return kind, (protocol.ACCEPT.pack(rng.choice([number, (1 << 64) - 1]), rng.choice([-1, 0, 1 << 62])),)
    if kind is Request.CANCEL:
        return kind, (np.array([first, number], dtype=np.uint64).tobytes() + rng.choice([b"", b"x"]),)
    pages = np.array(rng.choices([0, -1, 5, (1 << 31) - 1], k=rng.randrange(4)), dtype=np.int32)
    return kind, BlocksRequest(
        number, keys, rng.choice(large), rng.choice([0, 0, *large]), rng.randrange(32),
        rng.choice([0, 4 * len(keys), 1 << 63]), pages, np.arange(rng.randrange(2), dtype=np.uint64),
    ).parts()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_records_and_scribbled_rings_disturb_no_other_engine(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "server", random.Random(seed)
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r") as (manager, _, tensors):
        for turn in range(30):
            connection, rings, number = session_of(path, tmp_path / "bad")
            first = number
            for _ in range(rng.randrange(1, 6)):
                number += rng.randrange(3)
                kind, parts = random_record(rng, first, number)
                rings.push(kind, *parts)
            for _ in range(rng.choice([0, 200])):
                os.pwrite(rings.fd, rng.randbytes(1), rng.choice([0, rings.ring_bytes]) + rng.randrange(4096))
            os.eventfd_write(rings.sending_event_fd, 1)
            time.sleep(0.005)
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
            rings.close()
            until(lambda: len(sessions_of(daemon)) == 1)
            if turn % 10 == 0:
                tensors.fill([0], turn)
                task, began = manager.put_async(tokens_of(1, turn), mapping([0])), time.monotonic()
                assert manager.wait(task, 5.0)[task].status is Status.SUCCESS
                assert time.monotonic() - began < 0.5
        until(lambda: all(len(domain.sessions) == domain.cache.num_engines for domain in daemon._pools.values()))
        manager.check_integrity()
        stats = manager.stats()
        assert stats["tasks"] == 0
        assert stats["free_slots"] + stats["indexed_blocks"] == stats["num_slots"]
