"""Arguments of a rank's hooks: a bad one fails its call alone."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import ArgumentError, RegistrationError
from flexkv.kvmanager import KVManager
from flexkv.protocol.ring import OpKind
from flexkv.rank.memory import RankMemory
from flexkv.rank.rank import RankClient
from flexkv.rank.tp_client import KVTPClient
from flexkv.transfer.executors.agent_link import AgentLink
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp
from flexkv.transfer.membership import Membership
from tests.support.harness import (
    LAYERS,
    Tensors,
    controller_of,
    local,
    make_manager,
    tokens_of,
    until,
    wait_ready,
)


@pytest.mark.parametrize("fence", [2**64, 2**63, -1, 1.5, "3", True])
@pytest.mark.parametrize("kind", ["load", "save"])
def test_a_bad_fence_is_an_error_and_later_ones_advance(tmp_path: Path, kind: str, fence: Any) -> None:
    with local(tmp_path) as (manager, client, _):
        with pytest.raises(ArgumentError, match="fence is"):
            client.advance_fence(**{"save": 7, "load": 7, kind: fence})
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(1))
        held = manager.blocks.put_blocks(hasher.keys, 0, [1], fence=1)
        assert held is not None
        assert manager.wait(held, 0.05)[held].status is Status.TIMEOUT        # nothing has changed
        client.advance_fence(**{kind: 1})
        client.advance_fence(save=1)
        assert manager.wait(held, 10)[held].status is Status.SUCCESS


@pytest.mark.parametrize("timeout_s", [1e7, 1e300, float("inf")])
def test_a_long_wait_waits(tmp_path: Path, timeout_s: float) -> None:
    with local(tmp_path) as (manager, client, _):
        ended: list[bool] = []
        waiter = threading.Thread(target=lambda: ended.append(client.wait_results(timeout_s)))
        waiter.start()
        waiter.join(0.05)
        assert not ended
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(1))
        manager.blocks.put_blocks(hasher.keys, 0, [1])
        waiter.join(10)
        assert ended == [True]


def test_a_rank_that_registers_again_is_not_lost_meanwhile(tmp_path: Path) -> None:
    tensors = Tensors()
    with KVTPClient(str(tmp_path / "s")) as client:
        manager = make_manager(tmp_path / "s")
        client.register_tensors(tensors.specs(), 20.0, keep_alive=tensors)
        wait_ready(manager)
        assert client.suspend() == LAYERS
        manager.shutdown()
        client.register_tensors(tensors.specs(), 20.0, keep_alive=tensors)       # no controller is there
        assert not client.is_lost
        assert not client.wait_results(0.05)
        manager = make_manager(tmp_path / "s")
        wait_ready(manager)
        assert client.is_connected
        manager.shutdown()
        assert client.wait_results(10)
        assert client.is_lost


def test_a_controller_is_not_ready_before_a_returning_rank_can_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for the moment between the rank's registration and the data plane's knowledge of it."""
    managers: list[KVManager] = []
    seen, add = [], Membership.add

    def watched(self: Membership, link: AgentLink) -> None:
        seen.extend(manager.is_ready() for manager in managers)
        add(self, link)

    monkeypatch.setattr(Membership, "add", watched)
    with local(tmp_path) as (manager, client, tensors):
        managers.append(manager)
        client.suspend_gpu_mappings()
        until(lambda: not manager.is_ready())
        client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        wait_ready(manager)
        assert seen == [False]


def test_a_rank_that_cannot_use_its_welcome_leaves_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the controller would count it as connected, and refuse it when it registers again."""
    manager, tensors = make_manager(tmp_path / "s"), Tensors()
    with KVTPClient(str(tmp_path / "s")) as broken, KVTPClient(str(tmp_path / "s")) as client:
        with monkeypatch.context() as patch:
            patch.setattr(RankMemory, "copy_table", lambda *_: 1 // 0)
            broken.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
            with pytest.raises(RegistrationError, match="division"):
                broken.wait_connected(10.0)
        until(lambda: "0 of 1" in controller_of(manager)._cache.listener.describe_ranks(0))
        client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
        wait_ready(manager)
        manager.shutdown()


def test_a_task_that_never_ends_gives_no_pages_to_one_of_the_next_controller(tmp_path: Path) -> None:
    """Controllers count their tasks from 1."""
    tensors, zero, two = Tensors(), np.zeros(1, dtype=np.int32), np.arange(2, dtype=np.int32)
    save, held = TransferOp(OpKind.D2H, zero, zero), TransferOp(OpKind.D2H, zero + 1, zero + 1, fence=9)
    needed = [Dependency(op, two[first : first + 1], zero) for first, op in enumerate((save, held))]
    load = TransferOp(OpKind.H2D, two, two + 2, depends_on=needed)
    with RankClient(str(tmp_path / "s")) as client:
        for ops in ([save, held, load], [TransferOp(OpKind.D2H, zero + 5, zero)]):
            manager = make_manager(tmp_path / "s")
            client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
            wait_ready(manager)
            controller_of(manager)._cache.transfer.submit(TransferGraph(1, ops), lambda _: None)
            until(lambda ops=ops: ops[-1].ok[0])                         # type: ignore[misc]
            results = client.poll_results()
            manager.shutdown()
            client.suspend()
        assert [result.pages.tolist() for result in results] == [[5]]
