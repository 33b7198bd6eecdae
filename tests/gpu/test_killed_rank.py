"""On a real GPU: when the slots of a rank that was killed come back, no copy of its GPU writes them any more."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from tests.support.harness import controller_of, make_manager, mapping, tokens_of, until, wait_ready

pytestmark = pytest.mark.gpu

PAGES = 128
SLOTS = 128
KILLS = 5

RANK = """
import sys
import torch
from flexkv.rank.tp_client import KVTPClient
from flexkv.rank.tensors import tensor_spec
from tests.gpu.test_killed_rank import PAGES
from tests.support.harness import LAYERS, TOKENS
tensors = [torch.full((PAGES, 2, TOKENS, 8, 32768), -1, dtype=torch.int16, device="cuda") for _ in range(LAYERS)]
torch.cuda.synchronize()
client = KVTPClient(sys.argv[1])
client.register_tensors([tensor_spec(tensor) for tensor in tensors], 60.0, keep_alive=tensors)
client.wait_connected(60.0)
print("connected", flush=True)
sys.stdin.read()
"""
"""4 MiB a layer and page, 12 MiB a block: 1.5 GiB of copies, 60 ms on PCIe 4."""


def test_no_copy_writes_slots_that_came_back(tmp_path: Path) -> None:
    manager = make_manager(tmp_path / "s", SLOTS)
    try:
        for kill in range(KILLS):
            with subprocess.Popen(
                [sys.executable, "-c", RANK, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, cwd=Path(__file__).parents[2],
            ) as rank:
                assert rank.stdout is not None
                assert rank.stdout.readline() == "connected\n"
                until(manager.is_ready, 120.0)
                wait_ready(manager, SLOTS)
                task = manager.put_async(tokens_of(PAGES, kill), mapping(range(PAGES)))
                time.sleep(0.01 * kill)                            # the copies are at another place each time
                rank.send_signal(signal.SIGKILL)
                status = manager.wait(task, 10.0)[task].status
                assert status in (Status.FAILED, Status.SUCCESS)   # it may have been quick
            manager.wait(task, 20.0, completely=True)
            until(lambda: not controller_of(manager).tasks.unsettled(), 20.0)
            manager.reset()
            assert manager.stats()["free_slots"] == SLOTS
            memory = np.frombuffer(controller_of(manager)._cache.listener.host_pool.memory, dtype=np.uint8)[:: 1 << 16]
            memory[:] = 0xEE
            until_s = time.monotonic() + 1.0
            while time.monotonic() < until_s:
                assert (memory == 0xEE).all()
            del memory
    finally:
        manager.shutdown()
