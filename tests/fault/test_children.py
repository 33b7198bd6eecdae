"""Processes that are forked from a controller hold nothing of it up, while it lives and after its death."""

import os
import subprocess
import sys
from pathlib import Path

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.rank.tp_client import KVTPClient
from tests.support.harness import Tensors, controller_of, local, mapping, tokens_of, until

PARENT = """
import os, sys
from tests.support.harness import *
from pathlib import Path
manager = make_manager(Path(sys.argv[1]), cache={"enable_metrics": True, "py_metrics_port": 0})
wait_ready(manager)
if os.fork() == 0:
    sys.stdin.read()                                     # it has copies of all descriptors
    os._exit(0)
print(controller_of(manager).metrics.port, flush=True)
time.sleep(60)
"""


def test_a_controller_with_a_child_is_killed(tmp_path: Path) -> None:
    """The rank learns of it, and the next controller can listen at the same ports."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, str(tmp_path / "s")], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    ) as controller:
        tensors = Tensors()
        with KVTPClient(str(tmp_path / "s")) as client:
            client.register_tensors(tensors.specs(), 20.0, keep_alive=tensors)
            client.wait_connected(20.0)
            assert controller.stdout is not None
            port = int(controller.stdout.readline())
            controller.kill()
            controller.wait(5.0)
            until(lambda: client.is_lost, 3.0)
        with local(tmp_path, cache={"enable_metrics": True, "py_metrics_port": port}) as (manager, _, _tensors):
            assert controller_of(manager).metrics is not None
            assert controller_of(manager).metrics.port == port


def test_a_fork_changes_nothing_for_the_parent(tmp_path: Path) -> None:
    with local(tmp_path) as (manager, _, tensors):
        tensors.fill([1], 1)
        if (child := os.fork()) == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        task = manager.put_async(tokens_of(1), mapping([1]))
        assert manager.wait(task)[task].status is Status.SUCCESS
        assert manager.is_ready()
