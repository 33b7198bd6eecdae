"""On a real GPU: tensors of another process, by CUDA IPC and by descriptor, registered and moved."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexkv._core.device.cuda_driver import load_driver
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import FlexKVError, RegistrationError
from flexkv.rank.shared_tensor import TensorSharedHandle
from flexkv.rank.tensors import tensor_spec
from flexkv.rank.tp_client import KVTPClient
from tests.gpu.exporter import Exporter, check, mapped_memory
from tests.support.harness import LAYERS, TOKENS, check_drained, make_manager, mapping, tokens_of, until

pytestmark = pytest.mark.gpu

PAGES = 256
SHAPE = (PAGES, 2, TOKENS, 8, 128)                     # 4 MiB: torch's allocator puts several into one segment


@pytest.mark.parametrize("kind", ["ipc", "vmm"])
def test_blocks_move_from_and_to_tensors_of_another_process(tmp_path: Path, kind: str) -> None:
    layout = KVCacheLayout(KVCacheLayoutType.LAYERFIRST, LAYERS, PAGES, TOKENS, 8, 128)
    with ExitStack() as stack:
        exporter = stack.enter_context(Exporter(tmp_path, kind, LAYERS, SHAPE))
        handles = [stack.enter_context(TensorSharedHandle.unpack(*message)) for message in exporter.messages]
        assert len(handles) == LAYERS
        assert any(handle.offset for handle in handles)
        assert all(isinstance(handle.memory, bytes) == (kind == "ipc") for handle in handles)
        manager = make_manager(tmp_path / "s", 4 * PAGES)
        stack.callback(manager.shutdown)
        client = KVTPClient(str(tmp_path / "s"))
        stack.callback(client.close)
        for resume in (False, True):                    # the second time after the mappings were given up
            client.register_to_server(handles, layout, resume=resume)
            until(lambda: manager.is_ready() and manager.stats()["num_slots"] == 4 * PAGES, 60.0)
            for seed in range(2):
                exporter("fill", seed)
                pages = np.random.default_rng(seed).permutation(PAGES)
                content = exporter("read", pages.tolist())
                tokens = tokens_of(PAGES, seed + 10 * resume)
                task = manager.put_async(tokens, mapping(pages))
                assert manager.wait(task)[task].status is Status.SUCCESS
                exporter("zero")
                pages = np.random.default_rng(seed + 50).permutation(PAGES)
                task = manager.get_async(tokens, mapping(pages))
                assert manager.wait(task)[task].status is Status.SUCCESS
                assert exporter("read", pages.tolist()) == content
            assert client.suspend_gpu_mappings() == LAYERS
        check_drained(manager)


@pytest.mark.parametrize("kind", ["ipc", "vmm"])
def test_the_bytes_of_another_process_are_at_the_address(tmp_path: Path, kind: str) -> None:
    from cuda.bindings import driver

    torch.zeros(1, device="cuda")                       # torch's context is current: the primary one
    with Exporter(tmp_path, kind, 3, SHAPE) as exporter, ExitStack() as stack:
        exporter("fill", 3)
        for message, content in zip(exporter.messages, exporter("read", list(range(PAGES))), strict=True):
            handle = stack.enter_context(TensorSharedHandle.unpack(*message))
            opened = [handle.open(), handle.open()]     # twice, for two tensors of one segment do just that
            for tensor in opened:
                spec = tensor.spec()
                assert (spec.shape, spec.device) == (SHAPE, 0)
                seen = bytearray(len(content))
                check(driver.cuMemcpyDtoH((np.frombuffer(seen, np.uint8)).ctypes.data, spec.ptr, len(content)))
                assert seen == content
                tensor.close()
                tensor.close()


def test_the_process_that_exported_uses_the_tensor_itself() -> None:
    tensor = torch.zeros(SHAPE, dtype=torch.int16, device="cuda")
    with TensorSharedHandle.export(tensor) as handle, handle.open() as opened:
        assert opened.spec() == tensor_spec(tensor)


def test_memory_of_a_descriptor_can_be_mapped_in_its_own_process_too() -> None:
    from cuda.bindings import driver

    torch.zeros(1, device="cuda")
    spec = tensor_spec(torch.zeros((4, 1000), dtype=torch.uint8, device="cuda"))
    spec = replace(spec, ptr=mapped_memory(1 << 21) + 512)
    check(driver.cuMemsetD8(spec.ptr, 7, 4000))
    with TensorSharedHandle.export_spec(spec) as handle:
        assert handle.offset == 512
        with replace(handle, process=bytes(16)).open() as opened:
            assert opened.spec().ptr != spec.ptr
            seen = np.zeros(4000, np.uint8)
            check(driver.cuMemcpyDtoH(seen.ctypes.data, opened.spec().ptr, 4000))
            assert (seen == 7).all()


def test_the_device_is_told_by_its_uuid() -> None:
    from cuda.bindings import driver

    device = load_driver().device(0)
    assert device.uuid == bytes(check(driver.cuDeviceGetUuid(0)).bytes)
    assert load_driver().find_device(device.uuid) is device
    with TensorSharedHandle.export(torch.zeros(100, device="cuda")) as handle:
        assert handle.device_uuid == device.uuid
        with pytest.raises(RegistrationError, match="CUDA_VISIBLE_DEVICES"):
            replace(handle, device_uuid=bytes(16)).open()


def test_memory_that_cannot_be_shared_is_refused() -> None:
    from cuda.bindings import driver

    spec = tensor_spec(torch.zeros(100, device="cuda"))
    for host in (torch.zeros(100), torch.zeros(100).pin_memory()):
        with pytest.raises(RegistrationError, match="on a GPU"):
            TensorSharedHandle.export_spec(replace(spec, ptr=host.data_ptr()))
    managed = int(check(driver.cuMemAllocManaged(4096, 1)))
    try:
        with pytest.raises(FlexKVError):
            TensorSharedHandle.export_spec(replace(spec, ptr=managed))
    finally:
        check(driver.cuMemFree(managed))


def test_a_tensor_of_several_allocations_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.zeros(1, device="cuda")                       # this process has read its settings
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "expandable_segments:True")
    with Exporter(tmp_path, "ipc", 1, (100 << 19,)) as exporter:
        [(message, _)] = exporter.messages
        assert b"without expandable_segments" in message
