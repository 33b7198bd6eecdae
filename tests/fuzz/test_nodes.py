"""Controller and storage host of two nodes, each against random bytes and random frames of the other: nothing crashes,
hangs or leaks."""

import random
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from flexkv.protocol.node_frames import PROOF_BYTES, REPLY_BYTES, Greeting
from flexkv.protocol.nodes import (
    FrameKind,
    Join,
    NodeOp,
    Terms,
    pack_json,
    pack_number,
    pack_result,
)
from flexkv.protocol.ring import OpKind
from tests.fuzz.rounds import Leaks, mutated, rounds
from tests.support.hand_controller import controller, host_with_rank, joined, move
from tests.support.hand_host import HandHost
from tests.support.harness import until
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
            frames = controller(server)
            joined(frames)
            for _ in range(rng.randrange(1, 8)):
                frames.push(*random_frame(rng, None))
            time.sleep(rng.choice([0.0, 0.02]))
            frames.close()
            frames = controller(server)
            assert joined(frames).ranks == ((0, 1),)
            tensors.fill([1, 2], seed)
            expected = tensors.read([1, 2])
            assert move(frames, OpKind.D2H, [4, 5], [1, 2]) == [True, True]
            tensors.zero()
            assert move(frames, OpKind.H2D, [4, 5], [8, 9]) == [True, True]
            assert tensors.read([8, 9]) == expected
            frames.close()
