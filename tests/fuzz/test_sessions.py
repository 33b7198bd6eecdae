"""Engine and daemon, each against random messages and records of the other: nothing crashes, hangs or leaks."""

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from flexkv._core.record_rings import RecordRings
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import FlexKVError, RegistrationError, RingCorruptedError
from flexkv.kvmanager import KVManager
from flexkv.protocol import session as protocol
from flexkv.protocol.session import Hello, Note, Reply, Welcome, pack_refusal
from tests.fault.test_daemon import TWO_POOLS, connected, hello, session_of
from tests.fault.test_daemon_attacks import random_record
from tests.fuzz.rounds import Leaks, mutated, rounds
from tests.support.daemon import engine, make_engine, running, sessions_of
from tests.support.harness import mapping, tokens_of, until


def is_served(manager: KVManager, turn: int) -> bool:
    """Save page 0 and load it into page 1. All threads are in this process: an answer may be late, which is a miss."""
    task = manager.put_async(tokens_of(1, turn), mapping([0]))
    manager.wait(task, 5.0)
    task = manager.get_async(tokens_of(1, turn), mapping([1]))
    response = manager.wait(task, 5.0)[task]
    return response.status is Status.SUCCESS and response.return_mask is not None and bool(response.return_mask.all())


def first_free_session(path: Path, port: Path) -> tuple[socket.socket, RecordRings, int]:
    """A session. The daemon may still have one of a HELLO before, with the same socket for its ranks."""
    until_s = time.monotonic() + 10.0
    while True:
        try:
            return session_of(path, port)
        except RegistrationError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.002)


def test_the_daemon(tmp_path: Path) -> None:
    """HELLOs and records that are changed at random; the engine beside them is served."""
    path = tmp_path / "server"
    with running(path, cache=TWO_POOLS) as daemon, engine(path, tmp_path / "r") as (manager, _, tensors):
        connection, rings, _ = session_of(path, tmp_path / "bad")      # a second domain, which stays
        connection.close()
        rings.close()
        until(lambda: len(sessions_of(daemon)) == 1, 20.0)
        leaks = Leaks()
        for turn, rng in enumerate(rounds()):
            for _ in range(4):
                message = mutated(rng, hello(tmp_path / "bad"))[:16_000]
                with suppress(OSError), connected(path, message) as connection:
                    connection.settimeout(rng.choice([0.001, 0.05]))
                    connection.recv(20_000)
            until(lambda: len(sessions_of(daemon)) == 1, 20.0)
            connection, rings, number = first_free_session(path, tmp_path / "bad")
            first = number
            with suppress(RingCorruptedError):
                for _ in range(rng.randrange(1, 8)):
                    number += rng.randrange(3)
                    kind, parts = random_record(rng, first, number)
                    content = b"".join(bytes(part) for part in parts)
                    rings.push(kind, mutated(rng, content) if rng.random() < 0.5 else content)
            for _ in range(rng.choice([0, 0, 100])):
                os.pwrite(rings.fd, rng.randbytes(1), rng.choice([0, rings.ring_bytes]) + rng.randrange(4096))
            os.eventfd_write(rings.sending_event_fd, 1)
            time.sleep(rng.choice([0.0, 0.003]))
            connection.close()
            rings.close()
            until(lambda: len(sessions_of(daemon)) == 1, 20.0)
            tensors.fill([0], turn)
            expected = tensors.read([0])
            until(partial(is_served, manager, turn), 10.0)
            assert tensors.read([1]) == expected
        until(lambda: all(len(pool.sessions) == pool.cache.num_engines for pool in daemon._pools.values()))
        manager.check_integrity()
        leaks.check(lambda condition: until(condition, 20.0))


def _answers(rng: random.Random, rings: RecordRings) -> None:
    """Answer the engine's requests at random, and say more than was asked."""
    rings.note(Note.READY, 1)
    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:
        rings.note(Note.PULSE, rng.getrandbits(64))
        record = rings.pop()
        number = int.from_bytes(record[1][:8], "little") if record is not None else rng.getrandbits(64)
        count = rng.choice([0, 0, 1, 2, 1 << 31])
        content = rng.choice([
            protocol.MATCHED.pack(number, rng.random(), rng.choice([0, 1, 2, 1 << 31]), 0, count,
                                  rng.randrange(256), rng.randrange(2), 0) + bytes(4 * rng.choice([count % 7, 1])),
            protocol.ANSWER.pack(number) + rng.choice([b"{}", b"null", b"3", b"[[1]]", b'{"kind": "PinError"}', b"["]),
            b"".join(protocol.pack_result(number, rng.randrange(9), rng.random() < 0.5, None, "x" * rng.randrange(9))),
            rng.randbytes(rng.randrange(64)),
        ])
        kind = rng.choice([*Reply, *Reply, 99])
        if record is not None or rng.random() < 0.2:
            rings.push(kind, mutated(rng, content) if rng.random() < 0.3 else content)
        time.sleep(0.001)


def _daemon(listener: socket.socket, rng: random.Random, closing: threading.Event) -> None:
    listener.settimeout(0.1)
    while not closing.is_set():
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection, suppress(OSError, FlexKVError):
                connection.settimeout(1.0)
                Hello.unpack(connection.recv(20_000))
                rings = RecordRings(4096 << rng.randrange(3))
                try:
                    size = rng.choice([rings.ring_bytes - 256, rings.ring_bytes - 256, 4096, 1 << 30])
                    message = rng.choice([Welcome(size, rng.choice([1, 7, 1 << 61])).pack(), pack_refusal("no")])
                    message = mutated(rng, message) if rng.random() < 0.3 else message
                    fds = rings.fds[: rng.choice([3, 3, 3, 2])]
                    socket.send_fds(connection, [message], fds)
                    _answers(rng, rings)
                finally:
                    rings.close()


def calls_of(manager: KVManager, rng: random.Random) -> list[Callable[[], object]]:
    """What a scheduler calls."""
    blocks, pages = manager.blocks, np.arange(2, dtype=np.int32)
    keys = blocks.keys(tokens_of(2))
    return [
        lambda: blocks.lookup(keys), lambda: blocks.match_get(keys, 0, 8), lambda: blocks.match_put(keys, 0, 8),
        lambda: blocks.get_blocks(keys, 0, pages), lambda: blocks.put_blocks(keys, 0, pages, provisional=True),
        lambda: blocks.prefetch_blocks(keys), manager.stats, manager.pins, lambda: blocks.tenant(["a"]),
        lambda: blocks.try_wait(range(rng.randrange(9))), lambda: blocks.accept_put(rng.randrange(99)),
        lambda: blocks.cancel([rng.randrange(99)]), lambda: manager.unpin("x"),
        lambda: blocks.set_prefill_rate(9.0),
    ]


def test_the_engine(tmp_path: Path) -> None:
    """A scheduler's calls return in time, with nothing or with an error of FlexKV."""
    leaks = Leaks()
    for turn, rng in enumerate(rounds()):
        path, closing = tmp_path / f"s{turn}", threading.Event()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=_daemon, args=(listener, random.Random(rng.random()), closing))
        thread.start()
        manager = make_engine(path, tmp_path / "r")
        calls = calls_of(manager, rng)
        for _ in range(20):
            began = time.monotonic()
            with suppress(FlexKVError):
                rng.choice(calls)()
            assert time.monotonic() - began < 2.0           # 0.1 s, on a machine that may be busy
        manager.shutdown()
        closing.set()
        thread.join()
        listener.close()
    leaks.check(lambda condition: until(condition, 20.0))
