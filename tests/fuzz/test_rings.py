"""The rings against another side that writes at random: garbage is reported, never followed, and slots come back."""

import os
import random
import socket
import time
from pathlib import Path

import numpy as np

from flexkv._core.device.agent import DeviceAgent
from flexkv._core.device.ring import FAREWELL, ControllerRings
from flexkv._core.ring_pair import HEADER_BYTES
from flexkv._core.sealed_memory import sealed_memfd
from flexkv.errors import TransferError
from flexkv.protocol.exchange import Share
from flexkv.protocol.registration import Placement
from flexkv.rank.memory import PeerShare, RankMemory
from flexkv.rank.tp_client import KVTPClient
from tests.fuzz.rounds import Leaks, mutated, rounds
from tests.support.harness import (
    Tensors,
    check_drained,
    controller_of,
    make_manager,
    tokens_of,
    until,
    wait_ready,
)

SLOT, SLOTS, DATA, GROUPS = 8192, 16, 4096, 2
TAIL_AT = 128
"""Offset of the producer's position in a ring."""


def records(rng: random.Random) -> bytes:
    """Records of ops and cancels with numbers of which many are wrong, some of them mutated."""
    made = b""
    for _ in range(rng.randint(1, 20)):
        count = rng.choice([0, 1, 1, 2, 5, 30, 1 << 31])
        length = min(count, 40)
        wild = [-(1 << 31), -2, -1, SLOTS, 1 << 20, (1 << 31) - 1]
        groups = rng.choice([GROUPS, GROUPS, GROUPS, 0, 1, 3, 1 << 31])
        many = length * (1 + min(groups, 3))
        numbers = [rng.choice(wild) if rng.random() < 0.2 else rng.randrange(SLOTS) for _ in range(many)]
        op = np.array([rng.randrange(8), rng.randrange(4), rng.choice([0, 0, 0, 1, 1 << 63])], np.uint64).tobytes()
        op += np.array([rng.choice([1, 2, 2, 3, 3, 0, 7]), count, rng.choice([count, 0, 1 << 31]), rng.randrange(16),
                        rng.choice([0, 0, 1, 1 << 31]), groups], dtype=np.uint32).tobytes()
        op += np.array(numbers, dtype=np.int32).tobytes()
        kind, payload = rng.choice([(1, op), (1, op), (1, op), (2, op[:8]), (rng.getrandbits(32), op)])
        if rng.random() < 0.1:
            payload = mutated(rng, payload)
        size = len(payload) if rng.random() < 0.95 else rng.choice([0, 7, 1 << 16, (1 << 32) - 1])
        made += np.array([size, kind], dtype=np.uint32).tobytes() + payload.ljust(-(-len(payload) // 8) * 8, b"\0")
    return made[:DATA]


def give(rings: ControllerRings, ring: int, data: bytes, tail: int) -> None:
    with open(f"/proc/self/fd/{rings.fd}", "r+b", buffering=0) as memory:
        memory.seek(ring * rings.ring_bytes + HEADER_BYTES)
        memory.write(data)
        memory.seek(ring * rings.ring_bytes + TAIL_AT)
        memory.write(tail.to_bytes(8, "little"))


def play_agent(rng: random.Random, tensors: Tensors) -> None:
    rings, (ours, theirs) = ControllerRings(DATA), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = RankMemory(tensors.specs(), groups=[0, 1, 0])
    size, twin, peers = memory.segments[0].segment_bytes, Tensors(), None
    if rng.random() < 0.7:
        order = RankMemory(twin.specs(), groups=[0, 1, 0]).tensors_of[0]
        peers = [PeerShare(Share(0, 640, size), [spec.ptr for spec in order])]
    table = memory.copy_table([Placement(0, size, 0, rng.choice([0, 64, 6144]))], [Share(0, 0, 640)], peers)
    agent = DeviceAgent(
        regions=table.regions, num_pages=memory.num_pages, spans=table.spans, saves=table.saves, loads=table.loads,
        layers=table.layers, shares=table.shares, peers=table.peers,
        pool_fd=sealed_memfd("pool", SLOT * SLOTS), pool_bytes=SLOT * SLOTS,
        slot_bytes=SLOT, ring_fd=os.dup(rings.fd), ring_bytes=rings.ring_bytes,
        submission_event_fd=os.dup(rings.sending_event_fd), completion_event_fd=os.dup(rings.receiving_event_fd),
        socket_fd=theirs.detach(),
    )
    data = records(rng)
    tail = len(data) if rng.random() < 0.8 else rng.choice([8, 16, len(data) + 8, 4097, 1 << 40, (1 << 64) - 8])
    give(rings, 0, data, tail)
    os.eventfd_write(rings.sending_event_fd, 1)
    agent.advance(rng.choice([0, 1]), 0)
    if rng.random() < 0.3:
        give(rings, 1, rng.randbytes(DATA), rng.getrandbits(64))      # the ring that is the agent's
    agent.wait(0.002)
    while agent.take() is not None:
        pass
    start = time.monotonic()
    assert agent.close()
    assert time.monotonic() - start < 2
    ours.settimeout(2.0)
    assert ours.recv(10) == FAREWELL
    ours.close()
    rings.close()


def test_an_agent_against_a_wild_controller() -> None:
    leaks, tensors = Leaks(), Tensors()
    guard = [layer.copy() for layer in tensors.layers]
    for rng in rounds():
        for _ in range(10):
            play_agent(rng, tensors)
        assert all(layer.shape == kept.shape for layer, kept in zip(tensors.layers, guard, strict=True))
    leaks.check(until)


def results(rng: random.Random, part_ids: list[int]) -> bytes:
    made = b""
    for _ in range(rng.randint(1, 12)):
        count = rng.choice([0, 1, 2, 4, 40])
        result = np.array([rng.choice([*part_ids, 0, 1 << 40])], dtype=np.uint64).tobytes()
        result += np.array([rng.choice([0, 0, 1, 4, 1 << 31]), count, rng.choice([0, 1, 1, 2]), 0], np.uint32).tobytes()
        payload = result + rng.randbytes(count)
        if rng.random() < 0.2:
            payload = mutated(rng, payload)
        made += np.array([len(payload), rng.choice([3, 3, 3, 1, 9])], np.uint32).tobytes()
        made += payload.ljust(-(-len(payload) // 8) * 8, b"\0")
    return made[:DATA]


def play_controller(path: Path, rng: random.Random) -> None:
    manager = make_manager(path, 24, ring_bytes=DATA, op_timeout_s=5.0)
    tensors = Tensors()
    client = KVTPClient(str(path))
    client.register_tensors(tensors.specs(), 10.0, keep_alive=tensors)
    try:
        wait_ready(manager, 24)
        [link] = controller_of(manager)._cache.transfer._device.links
        hasher = manager.blocks.hasher()
        hasher.extend(tokens_of(4, rng.getrandbits(20)))
        held = manager.blocks.put_blocks(hasher.keys, 0, np.arange(4, dtype=np.int32), fence=1)
        assert held is not None
        data = results(rng, list(link._outstanding))
        give(link.rings, 1, data, len(data) if rng.random() < 0.8 else rng.getrandbits(64))
        os.eventfd_write(link.rings.receiving_event_fd, 1)
        tasks = controller_of(manager).tasks
        until(lambda: not link.healthy or not tasks.unsettled() or tasks.is_settled(held) or
              not link.rings.set_waiting(True))
        assert controller_of(manager)._cache.transfer.in_service
        client.close()                                                # at rest, or in spite of what was said
        until(lambda: not tasks.unsettled())
        check_drained(manager)
    finally:
        manager.shutdown()
        client.close()


def test_a_controller_against_a_wild_agent(tmp_path: Path) -> None:
    leaks = Leaks()
    for number, rng in enumerate(rounds()):
        play_controller(tmp_path / f"s{number}", rng)
    leaks.check(until)


def test_garbage_in_the_ring_of_results_is_an_error_and_nothing_else() -> None:
    for rng in rounds():
        rings = ControllerRings(DATA)
        give(rings, 1, results(rng, [1, 2]), rng.choice([rng.randrange(DATA), rng.getrandbits(64)]))
        try:
            for _ in range(600):
                if rings.pop_result() is None:
                    break
        except TransferError:
            pass
        rings.close()
