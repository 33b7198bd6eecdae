"""Memory that a rank exports to its peers, and maps from them: only declared memory, checked before it is used."""

import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flexkv._core.device.cuda_driver import Device, load_driver
from flexkv.errors import RegistrationError
from flexkv.protocol.exchange import MAX_EXPORT_BYTES, Allocation, Exchange, Exports, Peer, Share
from flexkv.rank import peers
from flexkv.rank.memory import RankMemory
from flexkv.rank.peers import export_copies, open_peers
from flexkv.rank.tensors import tensor_spec
from tests.native.fake_cuda.fake import FakeCuda, fake_cuda
from tests.unit.rank.test_shared_tensor import Memory

ARRAYS = [np.zeros((8, 6000), dtype=np.uint8) for _ in range(3)]
COPIES = ["x", "x", None]


def memory_of(arrays: list[np.ndarray] = ARRAYS) -> RankMemory:
    return RankMemory([tensor_spec(array) for array in arrays], copies=COPIES)


def exchange_with(exports: Exports, **changes: Any) -> Exchange:
    """This rank reads the first 8192 bytes of the copy, rank 1 the others."""
    return Exchange((Share(0, 0, 8192),), (Peer(1, (Share(0, 8192, 12000),), replace(exports, **changes)),))


def opened(exchange: Exchange, memory: RankMemory, device: Device | None = None) -> Any:
    with ExitStack() as stack:
        return open_peers(exchange, memory, device, stack)


def test_addresses_of_a_rank_of_the_same_process() -> None:
    theirs = [array.copy() for array in ARRAYS]
    exports = export_copies(memory_of(theirs), None, True)
    assert exports is not None
    [share] = opened(exchange_with(exports), memory_of())
    assert list(share.addresses) == [array.ctypes.data for array in theirs[:2]]


def test_addresses_that_were_not_exported_are_not_used() -> None:
    exports = export_copies(memory_of([array.copy() for array in ARRAYS]), None, True)
    assert exports is not None
    for change in ({"address": 4096}, {"num_bytes": exports.allocations[0].num_bytes + 1}):
        wrong = (replace(exports.allocations[0], **change), *exports.allocations[1:])     # type: ignore[arg-type]
        with pytest.raises(RegistrationError, match="has not exported"):
            opened(exchange_with(exports, allocations=wrong), memory_of())


@pytest.mark.parametrize(("change", "reason"), [
    ({"copies": ()}, "does not export"), ({"tensors": ((0, 0),)}, "does not export"),
    ({"tensors": ((0, 1), (1, 0))}, "past its allocation"),
])
def test_exports_that_contradict_the_tensors_are_refused(change: dict[str, Any], reason: str) -> None:
    exports = export_copies(memory_of(), None, True)
    assert exports is not None
    copies = change.get("copies", (replace(exports.copies[0], tensors=change.get("tensors")),))
    with pytest.raises(RegistrationError, match=reason):
        opened(exchange_with(exports, copies=copies), memory_of())
    with pytest.raises(RegistrationError, match="does not export"):          # the segment is no copy
        opened(Exchange((), (Peer(1, (Share(1, 0, 6000),), exports),)), memory_of())


@pytest.mark.parametrize(("reason", "change"), [
    ("not that of a GPU", {"process": b"?" * 16}), ("another device", {"device": b"?" * 16}),
    ("another layout", {"layout": b"?" * 16}),
])
def test_memory_that_cannot_be_read(reason: str, change: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    exports = export_copies(memory_of(), None, True)
    assert exports is not None
    if "layout" in change:
        change = {"copies": (replace(exports.copies[0], **change),)}          # type: ignore[dict-item, arg-type]
    assert opened(exchange_with(exports, **change), memory_of()) is None
    assert reason in caplog.text


def test_memory_that_cannot_be_shared(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    assert export_copies(RankMemory([tensor_spec(ARRAYS[0])]), None, True) is None        # no copy: not worth a line
    assert not caplog.text
    assert export_copies(memory_of(), None, False) is None
    assert "those of another process" in caplog.text
    many = [np.zeros((2, 16), dtype=np.uint8) for _ in range(MAX_EXPORT_BYTES // 80)]
    memory = RankMemory([tensor_spec(array) for array in many], copies=["x"] * len(many))
    assert export_copies(memory, None, True) is None
    assert "too many tensors" in caplog.text


# ---- GPUs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda().checked() as fake:
        yield fake


def on_gpu(memory: Memory) -> RankMemory:
    return RankMemory([memory.spec((8, 3000), 8192 * (1 + 8 * index)) for index in range(2)], copies=["x", "x"])


@pytest.mark.parametrize(("call", "expected"), [
    (None, True), ("cuIpcOpenMemHandle", False), ("cuDeviceGetCount", True), ("cuMemGetAddressRange", True),
])
def test_memory_of_another_process_is_mapped(
    cuda: FakeCuda, call: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of the driver that fails is a reason to read all from host memory. (The fake driver opens handles of the
    same process, too.)"""
    device = load_driver().device(0)
    with Memory("ipc") as memory, ExitStack() as stack:
        mine = on_gpu(memory)
        exports = export_copies(mine, device, True)
        assert exports is not None
        assert exports.allocations == (Allocation(exports.allocations[0].handle, memory.ptr, len(memory.bytes)),)
        monkeypatch.setattr(peers, "_process", b"another process.")
        if call is not None:
            cuda.fail(call)
        shares = open_peers(exchange_with(exports), mine, device, stack)
        assert (shares is not None) == expected
        if shares is not None:
            assert list(shares[0].addresses) == [memory.ptr + 8192, memory.ptr + 9 * 8192]
        cuda.reset()


def test_memory_that_is_smaller_than_declared_is_not_read(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    device = load_driver().device(0)
    with Memory("ipc") as memory:
        exports = export_copies(on_gpu(memory), device, True)
        assert exports is not None
        monkeypatch.setattr(peers, "_process", b"another process.")
        larger = (replace(exports.allocations[0], num_bytes=2 * len(memory.bytes)),)
        assert opened(exchange_with(exports, allocations=larger), on_gpu(memory), device) is None
        assert "more memory than it has" in caplog.text


@pytest.mark.parametrize("shareable", [True, False])
def test_memory_of_cumemcreate_is_not_exported(
    cuda: FakeCuda, shareable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    with Memory("vmm", shareable=shareable) as memory:
        assert export_copies(on_gpu(memory), load_driver().device(0), True) is None
    assert "cuMemCreate" in caplog.text


def test_gpus_without_nvlink_are_not_read(cuda: FakeCuda) -> None:
    driver = load_driver()
    device = driver.device(0)
    other = bytes([device.uuid[0] + 1]) + device.uuid[1:]
    assert driver.no_peer_access(device, device.uuid) is None
    assert "not visible" in str(driver.no_peer_access(device, other))
    for access, nvlink, reason in ((True, True, None), (True, False, "NVLink"), (False, False, "cannot access")):
        cuda.plan_devices(2, access, nvlink)
        found = driver.no_peer_access(device, other)
        assert found is None if reason is None else reason in str(found)


def test_no_damaged_exchange_has_memory_mapped_that_was_not_declared(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a message that passes its own checks."""
    device, rng = load_driver().device(0), random.Random(5)
    with Memory("ipc") as memory:
        mine = on_gpu(memory)
        exports = export_copies(mine, device, True)
        assert exports is not None
        good = exchange_with(exports).pack()
        for _ in range(2000):
            message = bytearray(good)
            for _ in range(rng.choice([1, 1, 3])):
                message[rng.randrange(len(message))] = rng.choice([0, 1, 255, rng.randrange(256)])
            monkeypatch.setattr(peers, "_process", rng.choice([exports.process, b"another process."]))
            with ExitStack() as stack:
                try:
                    shares = open_peers(Exchange.unpack(bytes(message), [12000]), mine, device, stack)
                except RegistrationError:
                    continue
                for share in shares or ():
                    for address, spec in zip(share.addresses, mine.tensors_of[0], strict=True):
                        assert memory.ptr <= address <= memory.ptr + len(memory.bytes) - spec.num_bytes
