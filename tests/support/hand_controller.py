"""A controller that is played by hand, and a storage host in this process, for tests of the storage host."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flexkv.config import TransferConfig, load_config
from flexkv.errors import NodeLinkError
from flexkv.protocol.node_frames import REPLY_BYTES, Frames, Greeting
from flexkv.protocol.nodes import FrameKind, Join, NodeOp, Terms, pack_json, parse_join
from flexkv.protocol.ring import OpKind
from flexkv.rank.rank import RankClient
from flexkv.server.storage_host import StorageHost
from tests.support.harness import Tensors
from tests.support.node_cluster import SECRET


@contextmanager
def host_with_rank(path: Path, port: int) -> Iterator[Tensors]:
    """A storage host with one rank, both in this process."""
    transfer = {"master_host": "127.0.0.1", "master_ports": str(port), "node_secret": SECRET}
    host = StorageHost(load_config(num_cpu_blocks=48, handshake_timeout_s=1.0, **transfer), str(path / "n"))
    thread = threading.Thread(target=host.run)
    thread.start()
    tensors = Tensors()
    client = RankClient(str(path / "n"), intra_client_id=1, transfer_config=TransferConfig(), reconnect=True)
    client.register_tensors(tensors.specs(), keep_alive=tensors)
    try:
        yield tensors
    finally:
        host.stop()
        thread.join(20)
        client.close()
        assert not thread.is_alive()


def controller(server: socket.socket, name: str = "c", ranks: int = 1) -> Frames:
    """Accept a storage host, and send it its terms."""
    for _ in range(20):
        connection, _ = server.accept()
        connection.settimeout(5.0)
        greeting = Greeting(SECRET)
        try:
            connection.sendall(greeting.challenge())
            reply = b""
            while len(reply) < REPLY_BYTES and (data := connection.recv(REPLY_BYTES - len(reply))):
                reply += data
            connection.sendall(greeting.answer_to(reply))
        except (OSError, NodeLinkError):
            connection.close()
            continue
        connection.setblocking(False)
        frames = Frames(connection, *greeting.keys())
        frames.push(FrameKind.TERMS, pack_json(Terms(ranks, 0, name, 0)))
        return frames
    raise AssertionError("the storage host does not come")


def joined(frames: Frames) -> Join:
    """Wait for the JOIN of a storage host."""
    return parse_join(next_frame(frames, FrameKind.JOIN)[1])


def next_frame(frames: Frames, wanted: FrameKind) -> tuple[FrameKind, bytes]:
    deadline = time.monotonic() + 10.0
    pinged = 0.0
    while time.monotonic() < deadline:
        if time.monotonic() - pinged > 0.2:
            pinged = time.monotonic()
            frames.push(FrameKind.PING)
        if (frame := frames.receive()) is not None and frame[0] is wanted:
            return frame
        assert not frames.has_ended()
        time.sleep(0.001)
    raise AssertionError(f"no {wanted.name}")


def move(frames: Frames, kind: OpKind, slots: list[int], pages: list[int]) -> list[bool]:
    part = next(_PARTS)
    op = NodeOp(part, part, 0, kind, 0, 0, len(slots), np.array(slots, np.int32), np.array([pages], np.int32))
    frames.push(FrameKind.OP, op.pack())
    _, payload = next_frame(frames, FrameKind.RESULT)
    assert int.from_bytes(payload[:8], "little") == part
    return [byte == 1 for byte in payload[16:]]


_PARTS = iter(range(1 << 40, 1 << 50))
