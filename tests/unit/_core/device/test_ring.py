"""The shared-memory rings: everything arrives in order, and garbage is reported, never followed."""

import os
import random
import resource

import numpy as np
import pytest

from flexkv._core.device.ring import ControllerRings
from flexkv._core.ring_pair import HEADER_BYTES
from flexkv._core.sealed_memory import check_sealed
from flexkv.errors import RingCorruptedError

IDS = np.arange(8, dtype=np.int32)


@pytest.fixture
def rings():
    rings = ControllerRings(4096)
    yield rings
    rings.close()
    rings.close()


def test_a_full_ring_says_so(rings: ControllerRings) -> None:
    assert rings.pop_result() is None
    pushed = 0
    while rings.push_op(pushed + 1, 1, 1, 0, IDS, IDS, 8):
        pushed += 1
    assert 4096 // 120 - 2 <= pushed <= 4096 // 112
    assert os.eventfd_read(rings.sending_event_fd) == 1          # written once: the reader has not asked again


def test_what_never_fits_is_refused(rings: ControllerRings) -> None:
    large = np.zeros(rings.max_blocks + 1, dtype=np.int32)
    with pytest.raises(ValueError, match="split it"):
        rings.push_op(1, 1, 1, 0, large, large, len(large))
    assert rings.push_op(1, 1, 1, 0, large[1:], large[1:], len(large) - 1)
    with pytest.raises(ValueError, match="slots"):
        rings.push_op(1, 1, 1, 0, IDS, IDS[1:], 8)


def test_each_block_has_a_page_in_each_layer_group() -> None:
    rings = ControllerRings(4096, 3)
    assert rings.max_blocks == (2040 // 4 - 48) // 16
    assert rings.push_op(1, 1, 1, 0, IDS, np.tile(IDS, 3), 8)
    for groups in (1, 2, 4):
        with pytest.raises(ValueError, match="pages for 3 layer groups"):
            rings.push_op(1, 1, 1, 0, IDS, np.tile(IDS, groups), 8)
    with open(f"/proc/self/fd/{rings.fd}", "rb", buffering=0) as memory:
        memory.seek(HEADER_BYTES + 8 + 44)
        assert np.frombuffer(memory.read(4 + 4 * 32), dtype=np.int32).tolist() == [3, *[*range(8)] * 4]
    rings.close()


@pytest.mark.parametrize("size", [0, 100, 4097, 5000])
def test_sizes_must_be_powers_of_two(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        ControllerRings(size)


def test_rings_that_cannot_be_made_leave_no_descriptor() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    free = os.open("/dev/null", os.O_RDONLY)                       # the lowest number that is free
    os.close(free)
    for room in range(3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                ControllerRings(4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir("/proc/self/fd") == before


def test_nobody_can_resize_the_rings(rings: ControllerRings) -> None:
    check_sealed(rings.fd, 2 * rings.ring_bytes, "the rings")
    with pytest.raises(PermissionError):
        os.ftruncate(rings.fd, 0)


def test_garbage_is_reported_and_never_followed() -> None:
    rng = random.Random(0)
    reported = 0
    for _ in range(300):
        rings = ControllerRings(4096)
        with open(f"/proc/self/fd/{rings.fd}", "r+b", buffering=0) as memory:
            memory.seek(rings.ring_bytes + HEADER_BYTES)
            memory.write(rng.randbytes(4096) if rng.random() < 0.7 else bytes(4096))
            memory.seek(rings.ring_bytes + 128)
            tail = rng.choice([8, 16, 64, 4096, 4097, 1 << 63, rng.getrandbits(64)])
            memory.write(tail.to_bytes(8, "little"))
        try:
            for _ in range(600):
                if rings.pop_result() is None:
                    break
        except RingCorruptedError:
            reported += 1
        rings.close()
    assert reported > 250


def test_an_impossible_position_of_the_reader_is_reported(rings: ControllerRings) -> None:
    with open(f"/proc/self/fd/{rings.fd}", "r+b", buffering=0) as memory:
        memory.seek(64)
        memory.write((1 << 40).to_bytes(8, "little"))
    with pytest.raises(RingCorruptedError):
        rings.push_op(1, 1, 1, 0, IDS, IDS, 8)
