"""Ranks that leave, and shutdowns with parts that cannot be closed."""

import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from flexkv._core.device.agent import DeviceAgent
from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.host_memory import HostMemory
from flexkv.controller.listener import Listener
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import RegistrationError, TransferError
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.rank import agent_start
from flexkv.rank.tp_client import KVTPClient
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.executor import Executor, Progress
from flexkv.transfer.graph import TransferOp
from tests.native.fake_cuda.fake import fake_cuda
from tests.support.harness import (
    Tensors,
    controller_of,
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


def save(manager: KVManager, seed: int, timeout: float = 5.0) -> Status:
    task = manager.put_async(tokens_of(2, seed), mapping([0, 1]))
    return manager.wait(task, timeout)[task].status


# ---- ranks that leave -------------------------------------------------------------------------------------------


def test_slots_of_a_rank_that_hung_up_wait_for_its_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its GPU may still write. Waiters learn at once that their task has failed."""
    with remote(tmp_path) as (manager, rank):
        rank.signal(signal.SIGSTOP)
        task = manager.put_async(tokens_of(4), mapping(range(4)))
        [link] = controller_of(manager)._cache.transfer._device.links
        link.connection.shutdown(socket.SHUT_RDWR)       # as if it had hung up, and its process lives on
        start = time.monotonic()
        response = manager.wait(task, timeout=10)[task]
        assert response.status is Status.FAILED
        assert "rank ended" in response.reason
        assert time.monotonic() - start < 3
        assert not manager.is_ready()
        assert manager.stats()["free_slots"] == 44
        for seed in range(11):                           # what is free can be used, and nothing else
            manager.cancel(manager.put_match(tokens_of(4, 1 + seed))[0])
        assert manager.stats()["free_slots"] == 44
        assert "without a farewell" in caplog.text
        rank.signal(signal.SIGKILL)
        until(lambda: manager.stats()["free_slots"] == 48)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(4))
        assert manager.blocks.lookup(hasher.keys).num_ready == 0


HEIR = """
import os, sys, time
from tests.support.harness import *
tensors = Tensors()
client = KVTPClient(sys.argv[1])
client.register_tensors(tensors.specs(), 20.0, keep_alive=tensors)
client.wait_connected(20.0)
if os.fork() == 0:
    sys.stdin.read()                                     # it has inherited the socket
    os._exit(0)
print("connected", flush=True)
time.sleep(60)
"""


def test_the_death_of_a_rank_with_a_child_is_noticed(tmp_path: Path) -> None:
    """The child keeps the socket open, so that it does not hang up."""
    manager = make_manager(tmp_path / "s")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HEIR, str(tmp_path / "s")], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "connected\n"
        wait_ready(manager)
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(3))
        held = manager.blocks.put_blocks(hasher.keys, 0, np.arange(3, dtype=np.int32), fence=9)
        assert held is not None
        rank.kill()
        assert manager.wait(held, 5.0)[held].status is Status.FAILED
        until(lambda: manager.stats()["free_slots"] == 48)
    manager.shutdown()


def test_a_rank_that_leaves_reads_like_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    manager, tensors = make_manager(tmp_path / "s"), Tensors()
    with rank_of(tmp_path, tensors) as client:
        wait_ready(manager)
        assert save(manager, 1) is Status.SUCCESS
        client.close()
        until(lambda: re.search(r"rank 0 \(process \d+\) has left", caplog.text) is not None)
    with rank_of(tmp_path, tensors):
        wait_ready(manager)
        manager.shutdown()
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def agent_with(make: Callable[..., DeviceAgent], wrong: dict[str, int], **arguments: object) -> DeviceAgent:
    return make(**{**arguments, **wrong})


def test_a_rank_that_cannot_be_an_agent_says_farewell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its slots would wait for its process, which lives on."""
    before = len(os.listdir("/proc/self/fd"))
    with local(tmp_path) as (manager, first, tensors):
        first.close()
        until(lambda: not manager.is_ready())
        agent = agent_start.DeviceAgent
        for wrong in ({}, {"ring_bytes": 4096}, {"pool_bytes": 1 << 62}):
            with monkeypatch.context() as patched:
                if wrong:
                    patched.setattr(agent_start, "DeviceAgent", partial(agent_with, agent, wrong))
                else:
                    patched.setattr("flexkv.rank.handshake.check_sealed", lambda *args: 1 // 0)
                with rank_of(tmp_path, tensors) as client, pytest.raises(RegistrationError):
                    client.wait_connected(10.0)
            until(lambda: not list(controller_of(manager)._cache.transfer._device.links))
            assert controller_of(manager)._cache.transfer._membership is not None
            assert controller_of(manager)._cache.transfer._membership._dying == []
    assert len(os.listdir("/proc/self/fd")) == before


# ---- closing ----------------------------------------------------------------------------------------------------


class Stubborn(Executor):
    """Cannot be closed at the first try."""

    kinds = frozenset({OpKind.STORE2H})

    def __init__(self) -> None:
        self.tries = 0

    def submit(self, op: TransferOp, indices: np.ndarray, progress: Progress, failed: bool = False) -> None:
        progress(op, indices, np.zeros(len(indices), dtype=np.bool_))

    def cancel(self, op: TransferOp) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        self.tries += 1
        if self.tries == 1:
            raise OSError(5, "a disk hangs")


def test_a_store_that_cannot_be_closed_keeps_nothing_else_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    stubborn = Stubborn()
    with local(tmp_path, cache={"enable_metrics": True, "py_metrics_port": 0}) as (manager, _, _tensors):
        assert controller_of(manager)._cache.transfer.add_executor(stubborn)
        assert controller_of(manager).metrics is not None
        until(lambda: not controller_of(manager).tasks.unsettled())
        with pytest.raises(OSError, match="a disk hangs"):
            manager.shutdown()
        assert controller_of(manager).metrics.port is None
        assert not (tmp_path / "s").exists()
        assert controller_of(manager)._cache.listener.host_pool.fd == -1
        manager.shutdown()
        assert stubborn.tries == 2
        manager.shutdown()
        assert stubborn.tries == 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_thread_that_is_stuck_does_not_hold_up_a_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv.transfer.engine._END_S", 0.5)
    stuck, release = threading.Event(), threading.Event()

    def housekeeping() -> float:
        stuck.set()
        release.wait(20)
        return 1.0

    config = TransferConfig(gpu_register_port=str(tmp_path / "s"), handshake_timeout_s=0.2)
    engine = TransferEngine(config, on_capacity=lambda slots: None, housekeeping=housekeeping)
    Listener(config, engine, HostMemory(1 << 20)).start()
    assert stuck.wait(5.0)
    start = time.monotonic()
    with pytest.raises(TransferError, match="does not end"):
        engine.shutdown()
    assert time.monotonic() - start < 3
    release.set()
    until(lambda: engine._thread is not None and not engine._thread.is_alive())
    engine.shutdown()
    assert not (tmp_path / "s").exists()


def test_start_twice_is_an_error_of_its_own(tmp_path: Path) -> None:
    manager = make_manager(tmp_path / "s")
    with pytest.raises(TransferError, match="started already"):
        manager.start()
    manager.shutdown()
    with pytest.raises(TransferError, match="shut down already"):
        manager.start()


def test_a_start_that_fails_can_be_repeated(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first, second = make_manager(tmp_path / "s"), KVManager(
        ModelConfig(), CacheConfig(num_cpu_blocks=4), gpu_register_port=str(tmp_path / "s"),
        transfer_config=TransferConfig(),
    )
    with pytest.raises(RegistrationError, match="another controller"):
        second.start()
    first.shutdown()
    second.start()
    second.shutdown()
    assert len(os.listdir("/proc/self/fd")) == before


def test_close_does_not_wait_for_a_gpu_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that the GPU may still access stays allocated, and the controller keeps the slots."""
    cuda = fake_cuda()
    cuda.reset()
    monkeypatch.setattr(agent_start, "DeviceAgent", partial(agent_start.DeviceAgent, rest_timeout_s=0.2))
    manager, tensors = make_manager(tmp_path / "s"), Tensors(device=0)
    client = KVTPClient(str(tmp_path / "s"))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        wait_ready(manager)
        cuda.delay(3_000_000)
        task = manager.put_async(tokens_of(4), mapping(range(4)))
        [link] = controller_of(manager)._cache.transfer._device.links
        until(lambda: link.busy)
        time.sleep(0.2)                                  # the copy is given to the GPU: nothing reports that
        start = time.monotonic()
        client.close()
        assert time.monotonic() - start < 2.5
        assert "stays allocated" in caplog.text
        kept = weakref.ref(tensors)
        del tensors, client
        gc.collect()
        assert kept() is not None
        assert manager.wait(task, 5.0)[task].status is Status.FAILED
        assert manager.stats()["free_slots"] == 44
    finally:
        cuda.delay(0)
        manager.shutdown()
        time.sleep(3.2)                                  # the fake GPU is done: the next test may reset it
        cuda.reset()
