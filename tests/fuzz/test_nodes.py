"""Controller and storage host of two nodes, each against random bytes and random frames of the other: nothing crashes,
hangs or leaks."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from flexkv.config import TransferConfig, load_config
from flexkv.errors import NodeLinkError
from flexkv.protocol.node_frames import PROOF_BYTES, REPLY_BYTES, Frames, Greeting
from flexkv.protocol.nodes import (
    FrameKind,
    Join,
    NodeOp,
    Terms,
    pack_json,
    pack_number,
    pack_result,
    parse_join,
)
from flexkv.protocol.ring import OpKind
from flexkv.rank.rank import RankClient
from flexkv.server.storage_host import StorageHost
from tests.fuzz.rounds import Leaks, mutated, rounds
from tests.support.hand_host import HandHost
from tests.support.harness import Tensors, until
from tests.support.node_cluster import SECRET, free_port
from tests.unit.controller.test_nodes import Setup


def random_frame(rng: random.Random, op: NodeOp | None) -> tuple[FrameKind, bytes]:
    """A frame that could be valid, and perhaps is changed."""
    part = op.part_id if op is not None else rng.randrange(5)
    count = len(op.slots) if op is not None else rng.randrange(4)
    slots, pages = (np.array([rng.randrange(-2, 60) for _ in range(3)], np.int32) for _ in range(2))
    node_op = NodeOp(
        rng.randrange(1 << 20), rng.randrange(9), rng.choice([0, 0, 5]), rng.choice([OpKind.D2H, OpKind.H2D]),
        rng.randrange(8), 0, rng.choice([3, 3, 9, 0]), slots, pages.reshape(1, 3),
    )
    kind, payload = rng.choice([
        (FrameKind.RESULT, pack_result(part, np.array([rng.random() < 0.8 for _ in range(count)], np.bool_))),
        (FrameKind.USABLE, pack_number(rng.choice([0, 5, 48, 1 << 40]))),
        (FrameKind.PONG, b""), (FrameKind.PING, b""), (FrameKind.CANCEL, pack_number(node_op.part_id)),
        (FrameKind.JOIN, pack_json(Join("x", ((0, rng.randrange(3)),), (rng.choice([1, 64]),), 48))),
        (FrameKind.TERMS, pack_json(Terms(rng.randrange(1, 3), 0, "c", 0))), (FrameKind.OP, node_op.pack()),
        (FrameKind.OP, node_op.pack()),
    ])
    return kind, mutated(rng, payload) if rng.random() < 0.3 else payload


def test_the_controller(tmp_path: Path) -> None:
    """Strangers, and a storage host that knows the secret; a good one is served afterwards."""
    with ExitStack() as stack:
        setup = Setup(tmp_path, stack)
        setup.joined().close()
        until(lambda: not setup.manager.is_ready())
        leaks = Leaks()
        for seed, rng in enumerate(rounds()):
            with suppress(OSError), socket.create_connection(("127.0.0.1", setup.port), 1.0) as stranger:
                stranger.settimeout(0.05)
                greeting = Greeting(rng.choice([SECRET, "no"]))
                reply = greeting.reply_to(stranger.recv(1000))
                stranger.sendall(mutated(rng, reply) if rng.random() < 0.7 else rng.randbytes(REPLY_BYTES))
                stranger.recv(1000)
            bad = HandHost(setup.port, SECRET)
            op, task = None, -1
            if rng.random() < 0.7:
                bad.join()
                with suppress(AssertionError):
                    until(setup.manager.is_ready, 1.0)
                task, _ = setup.manager.put_match(np.arange(8) + 8 * seed)
                with suppress(Exception):
                    setup.manager.launch(task, np.arange(8))
                with suppress(Exception):
                    op = bad.next_op()
            for _ in range(rng.randrange(1, 6)):
                bad.frames.push(*random_frame(rng, op))
            if rng.random() < 0.3:
                with suppress(OSError):
                    bad.connection.send(rng.randbytes(50))
            time.sleep(rng.choice([0.0, 0.01]))
            bad.close()
            until(lambda: not setup.manager.is_ready())
            good = HandHost(setup.port, SECRET)
            good.join()
            until(setup.manager.is_ready, 10.0)
            if task >= 0:
                setup.manager.cancel(task)
                setup.manager.wait(task, timeout=1.0, completely=True)
            setup.manager.reset()
            until(lambda: setup.manager.stats()["free_slots"] == 48, 1.0)
            with suppress(TimeoutError):
                while True:
                    good.answer(good.next_op(0.02), ok=False)
            setup.put(good, 1_000_000 + seed)
            good.close()
            until(lambda: not setup.manager.is_ready())
        leaks.check(until)
        setup.manager.check_integrity()


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


def test_the_storage_host(tmp_path: Path) -> None:
    """A controller that sends random frames; afterwards one that saves and loads gets the bytes."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server, host_with_rank(tmp_path, port) as tensors:
        server.settimeout(10.0)
        for seed, rng in enumerate(rounds()):
            if rng.random() < 0.5:
                connection, _ = server.accept()
                with connection, suppress(OSError):
                    greeting = Greeting(SECRET)
                    connection.sendall(mutated(rng, greeting.challenge()))
                    connection.settimeout(0.05)
                    connection.recv(1000)
                    connection.sendall(rng.randbytes(PROOF_BYTES))
            frames = _controller(server)
            for _ in range(rng.randrange(1, 8)):
                frames.push(*random_frame(rng, None))
            time.sleep(rng.choice([0.0, 0.02]))
            frames.close()
            frames = _controller(server)
            tensors.fill([1, 2], seed)
            expected = tensors.read([1, 2])
            assert _move(frames, OpKind.D2H, [4, 5], [1, 2]) == [True, True]
            tensors.zero()
            assert _move(frames, OpKind.H2D, [4, 5], [8, 9]) == [True, True]
            assert tensors.read([8, 9]) == expected
            frames.close()


def _controller(server: socket.socket) -> Frames:
    """Accept a storage host, and wait until it has joined."""
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
        frames.push(FrameKind.TERMS, pack_json(Terms(1, 0, "c", 0)))
        kind, payload = _next(frames, FrameKind.JOIN)
        assert kind is FrameKind.JOIN
        assert parse_join(payload).ranks == ((0, 1),)
        return frames
    raise AssertionError("the storage host does not come")


def _next(frames: Frames, wanted: FrameKind) -> tuple[FrameKind, bytes]:
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


def _move(frames: Frames, kind: OpKind, slots: list[int], pages: list[int]) -> list[bool]:
    part = next(_PARTS)
    op = NodeOp(part, part, 0, kind, 0, 0, len(slots), np.array(slots, np.int32), np.array([pages], np.int32))
    frames.push(FrameKind.OP, op.pack())
    _, payload = _next(frames, FrameKind.RESULT)
    assert int.from_bytes(payload[:8], "little") == part
    return [byte == 1 for byte in payload[16:]]


_PARTS = iter(range(1 << 40, 1 << 50))
