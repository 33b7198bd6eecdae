"""The storage host, with a controller that the test plays."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.config import load_config
from flexkv.errors import TransferError
from flexkv.protocol.nodes import FrameKind, NodeOp, pack_number
from flexkv.protocol.ring import OpKind
from flexkv.server.storage_host import StorageHost
from tests.support.hand_controller import controller, host_with_rank, joined, move, next_frame
from tests.support.harness import RankProcess, until
from tests.support.node_cluster import SECRET, free_port

ONE = np.array([1], dtype=np.int32)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10.0)
        yield server


def test_its_pool_holds_the_content_of_one_controller(tmp_path: Path, server: socket.socket) -> None:
    """Another one may use all slots in between."""
    with host_with_rank(tmp_path, server.getsockname()[1]):
        incarnations = []
        for name in ("a", "a", "b", "a"):
            frames = controller(server, name)
            incarnations.append(joined(frames).incarnation)
            frames.close()
        assert incarnations[0] == incarnations[1]
        assert len(set(incarnations[1:])) == 3


def test_a_rank_that_leaves_ends_the_connection(tmp_path: Path, server: socket.socket) -> None:
    with host_with_rank(tmp_path, server.getsockname()[1]):
        rank = RankProcess(str(tmp_path / "n"), 2)
        frames = controller(server, ranks=2)
        assert joined(frames).ranks == ((0, 1), (0, 2))
        rank.kill()
        until(lambda: bool(frames.receive()) or frames.has_ended())
        until(frames.has_ended)
        frames.close()


def test_a_cancelled_part_is_answered(tmp_path: Path, server: socket.socket) -> None:
    with host_with_rank(tmp_path, server.getsockname()[1]) as tensors:
        frames = controller(server)
        joined(frames)
        tensors.fill([1], 1)
        assert move(frames, OpKind.D2H, [0], [1]) == [True]
        waits = NodeOp(7, 7, 99, OpKind.D2H, 0, 0, 1, ONE, ONE.reshape(1, 1))     # for a fence that does not come
        frames.push(FrameKind.OP, waits.pack())
        frames.push(FrameKind.CANCEL, pack_number(7))
        _, payload = next_frame(frames, FrameKind.RESULT)
        assert (int.from_bytes(payload[:8], "little"), payload[16:]) == (7, b"\0")
        frames.close()


def test_a_controller_that_says_little_does_not_hold_up_the_end(server: socket.socket) -> None:
    port = server.getsockname()[1]
    config = load_config(num_cpu_blocks=4, master_host="127.0.0.1", master_ports=str(port), node_secret=SECRET)
    host = StorageHost(config, "/tmp/unused")
    thread = threading.Thread(target=host.run)
    thread.start()
    connection, _ = server.accept()
    with connection:
        connection.send(b"F")
        host.stop()
        start = time.monotonic()
        thread.join(5.0)
    assert time.monotonic() - start < 2


def test_it_ends_if_a_copy_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped rank may still write: another connection must not give its slots to others."""
    port = free_port()
    host = StorageHost(
        load_config(num_cpu_blocks=48, handshake_timeout_s=0.5, master_host="127.0.0.1", master_ports=str(port),
                    node_secret=SECRET), str(tmp_path / "n"),
    )
    raised: list[TransferError] = []

    def run() -> None:
        try:
            host.run()
        except TransferError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(10.0)
        thread.start()
        monkeypatch.setenv("FLEXKV_NODE_SECRET", SECRET)
        rank = RankProcess(str(tmp_path / "n"), 1)
        frames = controller(server)
        joined(frames)
        rank.signal(signal.SIGSTOP)
        frames.push(FrameKind.OP, NodeOp(7, 7, 0, OpKind.D2H, 0, 0, 1, ONE, ONE.reshape(1, 1)).pack())
        time.sleep(0.1)
        frames.close()
        thread.join(10.0)
        assert "does not end" in str(raised[0])
        rank.kill()
    assert not thread.is_alive()
