"""The controller's side of an engine on two nodes, with a storage host that the test plays."""

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flexkv.config import CacheConfig, ModelConfig, TransferConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import ConfigError, NodeLinkError, RegistrationError
from flexkv.kvmanager import KVManager
from flexkv.protocol.nodes import FrameKind
from flexkv.protocol.ring import OpFlag, OpKind
from tests.support.hand_host import HandHost
from tests.support.harness import (
    LAYERS,
    TOKENS,
    Tensors,
    check_drained,
    mapping,
    rank_of,
    tokens_of,
    until,
)
from tests.support.node_cluster import SECRET, free_port


class Setup:
    """A controller with one rank of two, and storage hosts for the other."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.port, self._stack, self.tensors = free_port(), stack, Tensors()
        transfer = TransferConfig(
            master_host="127.0.0.1", master_ports=str(self.port), node_secret=SECRET, handshake_timeout_s=0.5,
            op_timeout_s=2.0,
        )
        self.manager = KVManager(
            ModelConfig(num_layers=LAYERS, num_kv_heads=2, head_size=64, dtype="float16", tp_size=2, nnodes=2),
            CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=48), gpu_register_port=str(path / "s"),
            transfer_config=transfer,
        )
        self.manager.start()
        stack.callback(self.manager.shutdown)
        stack.enter_context(rank_of(path, self.tensors))

    def host(self, secret: str = SECRET) -> HandHost:
        host = HandHost(self.port, secret)
        self._stack.callback(host.close)
        return host

    def joined(self, incarnation: str = "a") -> HandHost:
        host = self.host()
        host.join(incarnation=incarnation)
        until(lambda: self.manager.is_ready() and self.manager.stats()["num_slots"] == 48)
        return host

    def put(self, host: HandHost, seed: int) -> None:
        """Save two blocks."""
        task = self.manager.put_async(tokens_of(2, seed), mapping([1, 2]))
        host.answer(host.next_op())
        assert self.manager.wait(task)[task].status is Status.SUCCESS

    def found(self, seed: int) -> int:
        task, mask = self.manager.get_match(tokens_of(2, seed))
        self.manager.cancel(task)
        return int(mask.sum()) // TOKENS


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with ExitStack() as stack:
        yield Setup(tmp_path, stack)


def test_it_is_ready_with_the_other_node_alone(setup: Setup) -> None:
    until(lambda: "1 of 1 ranks" in setup.manager.blocks._cache.listener.describe_ranks(0))   # type: ignore[attr-defined]
    assert not setup.manager.is_ready()
    host = setup.joined()
    assert (host.terms.num_ranks, host.terms.dp_client_id) == (1, 0)
    assert "1 of 1 other nodes" in setup.manager.blocks._cache.listener.describe_ranks(0)     # type: ignore[attr-defined]
    host.close()
    until(lambda: not setup.manager.is_ready())


def test_ops_have_the_pages_and_slots_of_both_nodes(setup: Setup) -> None:
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(3), mapping([5, 6, 7]))
    op = host.next_op()
    assert (op.kind, op.task_id, op.op_blocks, op.flags, op.pages.tolist()) == (OpKind.D2H, task, 3, 0, [[5, 6, 7]])
    assert setup.manager.wait(task, timeout=0.05)[task].status is not Status.SUCCESS
    host.answer(op)
    assert setup.manager.wait(task)[task].status in (Status.SUCCESS, Status.NOTFOUND)
    assert setup.manager.get_match(tokens_of(3))[1].all()


def test_a_block_that_one_node_has_not_saved_is_not_cached(setup: Setup) -> None:
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(2), mapping([1, 2]))
    host.answer(host.next_op(), ok=False)
    assert setup.manager.wait(task)[task].status is Status.FAILED
    assert setup.found(0) == 0
    check_drained(setup.manager)


def test_a_late_op_is_cancelled_there(setup: Setup) -> None:
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(2), mapping([1, 2]))
    op = host.next_op()
    kind, payload = host.next()
    assert (kind, int.from_bytes(payload, "little")) == (FrameKind.CANCEL, op.part_id)
    assert setup.manager.wait(task)[task].status is Status.TIMEOUT
    assert setup.manager.stats()["free_slots"] == 46             # the node may write them yet
    host.answer(op)
    until(lambda: setup.manager.stats()["free_slots"] == 48)


def test_slots_of_a_lost_node_stay_reserved_until_it_is_back(setup: Setup) -> None:
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(2), mapping([1, 2]))
    host.next_op()
    host.close()
    assert setup.manager.wait(task, timeout=3)[task].status is Status.FAILED
    assert setup.manager.stats()["free_slots"] == 46
    assert setup.found(0) == 0
    setup.joined()
    until(lambda: setup.manager.stats()["free_slots"] == 48)


def test_blocks_stay_if_the_node_has_kept_its_memory(setup: Setup) -> None:
    host = setup.joined()
    setup.put(host, 1)
    host.close()
    until(lambda: not setup.manager.is_ready())
    assert setup.found(1) == 0
    setup.joined()
    assert setup.found(1) == 2


def test_blocks_are_dropped_if_it_has_not(setup: Setup) -> None:
    host = setup.joined()
    setup.put(host, 1)
    host.close()
    until(lambda: not setup.manager.is_ready())
    setup.joined(incarnation="b")
    assert setup.found(1) == 0
    check_drained(setup.manager)


def test_the_ranks_of_a_node_that_was_away_learn_what_they_missed(setup: Setup) -> None:
    """A worker waits for a result of each task. One that was matched before the loss, and launched after it, fails."""
    host = setup.joined()
    setup.put(host, 1)
    task, mask = setup.manager.get_match(tokens_of(2, 1))
    assert mask.all()
    host.close()
    until(lambda: not setup.manager.is_ready())
    setup.manager.launch(task, mapping([8, 9]))
    assert setup.manager.wait(task)[task].status is Status.FAILED
    host = setup.joined()
    op = host.next_op()
    assert (op.task_id, op.kind, op.op_blocks, op.pages.tolist()) == (task, OpKind.H2D, 2, [[8, 9]])
    assert op.flags & OpFlag.CANCELLED
    host.answer(op, ok=False)
    setup.put(host, 2)
    host.close()
    until(lambda: not setup.manager.is_ready())
    with pytest.raises(TimeoutError):                            # it is sent once
        setup.joined().next(0.5)


def test_ops_without_an_answer_are_told_again(setup: Setup) -> None:
    """As a whole, and as cancelled: the worker may have heard of the task only after its rank registered again."""
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(3), mapping([1, 2, 3]))
    op = host.next_op()
    host.close()
    assert setup.manager.wait(task, timeout=3)[task].status is Status.FAILED
    host = setup.joined()
    again = host.next_op()
    assert (again.task_id, again.kind, again.op_blocks, len(again.slots)) == (task, op.kind, 3, 3)
    assert again.flags & OpFlag.CANCELLED
    host.answer(again, ok=False)
    setup.put(host, 2)


def test_the_pool_has_the_slots_of_the_smallest_node(setup: Setup) -> None:
    host = setup.host()
    host.join(usable=40, num_slots=40)
    until(lambda: setup.manager.is_ready() and setup.manager.stats()["num_slots"] == 40)
    host.close()
    until(lambda: not setup.manager.is_ready())
    host = setup.host()
    host.join(usable=40, num_slots=40)
    until(setup.manager.is_ready)
    host.close()
    until(lambda: not setup.manager.is_ready())
    host = setup.host()
    host.join(usable=30, num_slots=30)                           # slots that are in use are missing
    assert host.has_been_dropped()


def test_bytes_that_are_no_frames_end_the_connection_at_once(setup: Setup) -> None:
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(2), mapping([1, 2]))
    host.next_op()
    host.connection.send(bytes(range(256)) * 8)                  # more than is read before it is not trusted
    assert setup.manager.wait(task, timeout=1)[task].status is Status.FAILED
    until(lambda: not setup.manager.is_ready(), 1.0)


def test_a_silent_node_is_lost(setup: Setup) -> None:
    setup.joined()                                               # and answers no PING
    until(lambda: not setup.manager.is_ready(), 5.0)


@pytest.mark.parametrize("ranks", [((0, 1), (0, 2)), ((0, 5), (0, 5)), ((0, 0),)])
def test_a_node_with_other_ranks_is_refused(setup: Setup, ranks: tuple[tuple[int, int], ...]) -> None:
    host = setup.host()
    host.join(ranks=ranks)
    assert host.has_been_dropped()


def test_a_second_host_of_a_node_is_refused(setup: Setup) -> None:
    first = setup.joined()
    second = setup.host()
    second.join()
    first.frames.push(FrameKind.PONG)
    assert second.has_been_dropped()
    first.frames.push(FrameKind.PONG)
    third = setup.host()
    third.join(ranks=((0, 7),))
    assert third.has_been_dropped()


def test_who_does_not_know_the_secret_is_not_connected(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flexkv.controller"), pytest.raises((ConnectionError, NodeLinkError)):
        setup.host("another")
    until(lambda: "node_secret" in caplog.text)


def test_who_says_nothing_is_dropped(setup: Setup) -> None:
    with socket.create_connection(("127.0.0.1", setup.port)) as connection:
        connection.settimeout(5.0)
        while connection.recv(1000):
            pass


def test_an_impossible_result_ends_the_connection(setup: Setup) -> None:
    host = setup.joined()
    task = setup.manager.put_async(tokens_of(2), mapping([1, 2]))
    op = host.next_op()
    host.frames.push(FrameKind.RESULT, (op.part_id + 5).to_bytes(8, "little") + (2).to_bytes(8, "little") + b"\1\1")
    with pytest.raises(ConnectionError):
        host.next()
    host.close()
    assert setup.manager.wait(task)[task].status is Status.FAILED
    assert setup.manager.stats()["free_slots"] == 46


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    def make(ranks: int, secret: str, host: str = "127.0.0.1") -> KVManager:
        return KVManager(
            ModelConfig(tp_size=ranks, nnodes=2), CacheConfig(num_cpu_blocks=4), gpu_register_port=str(tmp_path / "s"),
            transfer_config=TransferConfig(node_secret=secret, master_host=host, master_ports=str(free_port())),
        )

    with pytest.raises(ConfigError, match="node_secret"):
        make(2, "")
    with pytest.raises(ConfigError, match="nnodes"):
        make(3, SECRET)
    with pytest.raises(RegistrationError, match="master_host"):
        make(2, SECRET, "no.such.host.invalid").start()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        manager = KVManager(
            ModelConfig(tp_size=2, nnodes=2), CacheConfig(num_cpu_blocks=4), gpu_register_port=str(tmp_path / "s"),
            transfer_config=TransferConfig(
                node_secret=SECRET, master_host="127.0.0.1", master_ports=str(taken.getsockname()[1])
            ),
        )
        with pytest.raises(RegistrationError, match="master_ports"):
            manager.start()
