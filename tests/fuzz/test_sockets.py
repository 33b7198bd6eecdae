"""The controller's socket and the rank's end of it, against random messages: nothing crashes, hangs or leaks."""

import array
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import FlexKVError, PinError
from flexkv.protocol.exchange import Allocation, Exchange, ExportedCopy, Exports, Peer, Share
from flexkv.protocol.registration import Placement, SegmentClaim, SegmentKind, Welcome, pack_refusal
from flexkv.protocol.requests import ask
from flexkv.rank.handshake import join_controller
from tests.fuzz.rounds import Leaks, mutated, rounds
from tests.support.harness import controller_of, hello_of, local, make_manager, mapping, tokens_of, until

HELLO = hello_of(1).pack()
EXPORTS = Exports(b"p" * 16, b"g" * 16, (Allocation(bytes(64), 1 << 20, 1 << 16),),
                  (ExportedCopy(b"x" * 16, b"l" * 16, ((0, 0), (0, 4096))),))
SHARED = hello_of(1, num_pages=(10, 20), segments=(
    SegmentClaim(SegmentKind.SHARD, 1024, bytes(16)), SegmentClaim(SegmentKind.REPLICA, 64, bytes(16), b"x" * 16),
), exports=EXPORTS).pack()
REQUESTS = [
    {"command": "pins"}, {"command": "unpin", "name": "p"}, {"command": "pins", "after": "p"},
    {"command": "pin", "name": "p", "namespace": ["salt", "x"], "num_tokens": 8},
]


def some_fds(rng: random.Random) -> list[int]:
    """Descriptors that do not fit, or tokens that are not sealed."""
    fds = []
    for _ in range(rng.choice([0, 0, 1, 1, 2, 7])):
        fds.append(os.memfd_create("fuzz") if rng.random() < 0.5 else os.open("/dev/null", os.O_RDONLY))
        with suppress(OSError):
            os.ftruncate(fds[-1], rng.choice([0, 32, 33, 1 << 20]))
    return fds


_HANG_S = 20.0
"""Longer than a thread without a free processor waits for its turn; the controller drops a silent rank after 0.5 s."""


@contextmanager
def closing_fds(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def say(path: Path, rng: random.Random, message: bytes) -> None:
    """Send a message with descriptors, perhaps more, perhaps read the answer, perhaps hang up in between."""
    fds = some_fds(rng) if rng.random() < 0.5 else []
    with closing_fds(fds), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, suppress(OSError):
        connection.settimeout(2 * _HANG_S)
        connection.connect(str(path))
        if rng.random() < 0.1:
            return
        connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
        if rng.random() < 0.2:
            connection.send(rng.randbytes(rng.randrange(3000)))
        if rng.random() < 0.7:
            start = time.monotonic()
            connection.recv(1 << 17)
            assert time.monotonic() - start < _HANG_S


def random_message(rng: random.Random) -> bytes:
    match rng.randrange(4):
        case 0:
            return rng.randbytes(rng.randrange(2100))
        case 1:
            return mutated(rng, rng.choice([HELLO, SHARED]))
        case 2:
            request = dict(rng.choice(REQUESTS))
            wrong = [None, -1, 1 << 70, "x" * 500, [1], {}, "\ud800", [["a"]]]
            request[rng.choice([*request, "other"])] = rng.choice(wrong)
            return b"FLEXKVC1" + json.dumps(request).encode()
        case _:
            return mutated(rng, b"FLEXKVC1" + json.dumps(rng.choice(REQUESTS)).encode())


def test_the_controllers_socket(tmp_path: Path) -> None:
    leaks = Leaks()
    with local(tmp_path, handshake_timeout_s=0.5) as (manager, _, tensors):
        tensors.fill([0, 1], 1)
        before = Leaks()
        for rng in rounds():
            for _ in range(20):
                say(tmp_path / "s", rng, random_message(rng))
            assert controller_of(manager)._cache.transfer.in_service
            task = manager.put_async(tokens_of(2, rng.randrange(1 << 30)), mapping([0, 1]))
            assert manager.wait(task)[task].status is Status.SUCCESS
            assert ask(str(tmp_path / "s"), {"command": "pins"}) == []
        before.check(until)
    leaks.check(until)


class Controller:
    """Answers each rank that connects with a message of its own."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen()

    def answer(self, rng: random.Random, message: bytes) -> None:
        connection, _ = self.listener.accept()
        with connection, suppress(OSError):
            connection.settimeout(5.0)
            connection.recv(2048)
            fds = some_fds(rng)
            with closing_fds(fds):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                connection.sendmsg([message], rights)


def test_the_ranks_end_of_the_handshake(tmp_path: Path) -> None:
    leaks = Leaks()
    controller = Controller(tmp_path / "s")
    hello = hello_of(pid=os.getpid())
    places = (Placement(0, 1024, 0, 1024),)
    exchange = Exchange((Share(0, 0, 512),), (Peer(2, (Share(0, 512, 1024),), EXPORTS),))
    welcome = Welcome(1 << 20, 4096, 256 + 4096, places).pack()
    shared = Welcome(1 << 20, 4096, 256 + 4096, places, 0, exchange).pack()
    for rng in rounds():
        for _ in range(20):
            message = rng.choice([rng.randbytes(rng.randrange(2100)), mutated(rng, welcome), welcome,
                                  shared, mutated(rng, shared),
                                  mutated(rng, pack_refusal("no \N{SNOWMAN}"))])
            thread = threading.Thread(target=controller.answer, args=(rng, message))
            thread.start()
            with pytest.raises(FlexKVError):
                join_controller(tmp_path / "s", hello, time.monotonic() + 2.0, threading.Event())
            thread.join()
    controller.listener.close()
    leaks.check(until)


def test_the_users_end_of_the_control_socket(tmp_path: Path) -> None:
    leaks = Leaks()
    controller = Controller(tmp_path / "s")
    good = json.dumps({"pins": [["p", 3]], "more": False}).encode()
    for rng in rounds():
        for _ in range(20):
            message = rng.choice([
                rng.randbytes(rng.randrange(1, 2100)), mutated(rng, good) or b"{", b'{"pins": 3}', b"[]",
                b'{"pins": [["p", "x"]]}', b'{"error": ["x"]}',
            ])
            thread = threading.Thread(target=controller.answer, args=(rng, message))
            thread.start()
            with suppress(PinError):
                ask(str(tmp_path / "s"), {"command": "unpin", "name": "p"}, np.arange(4, dtype=np.uint32))
            thread.join()
    controller.listener.close()
    leaks.check(until)


def test_a_controller_without_ranks(tmp_path: Path) -> None:
    """Also messages that make it fix a layout."""
    leaks = Leaks()
    for rng in rounds():
        path = tmp_path / f"s{rng.getrandbits(32)}"
        manager = make_manager(path, 8, handshake_timeout_s=0.5)
        for _ in range(10):
            hello = rng.choice([hello_of(), hello_of(1)]).pack() if rng.random() < 0.5 else SHARED
            say(path, rng, mutated(rng, hello) if rng.random() < 0.8 else hello)
        assert controller_of(manager)._cache.transfer.in_service
        manager.shutdown()
    leaks.check(until)
