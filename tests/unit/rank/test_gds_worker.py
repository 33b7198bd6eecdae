"""GPUDirect Storage with a fake driver and a fake cuFile: real files, bytes compared, faults of files and library."""

import ctypes
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._core.device.cuda_driver import load_driver
from flexkv._core.device.staging import DeviceStaging
from flexkv._core.io.checksum import xxh3_64
from flexkv.config import CacheConfig, ModelConfig
from flexkv.controller.response import KVResponseStatus as Status
from flexkv.errors import ConfigError, GdsUnavailableError
from flexkv.kvmanager import KVManager
from flexkv.rank import gds_worker as gds
from flexkv.rank.kernels import checksum_function, move_function
from flexkv.rank.regions import regions_from_tensors
from tests.native.fake_cuda.fake import FakeCuda, FakeCuFile, fake_cuda, fake_cufile
from tests.support.harness import Tensors, until
from tests.support.ssd_engine import MAX_BLOCKS, Engine, length_of

HOST_SLOTS = 8
SSD_BYTES = 512 * 4096
SEEDS = range(6)
LONG = 4
"""A sequence of 12 blocks, more than there are host slots."""


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda().checked() as fake:
        yield fake


@pytest.fixture
def cufile(cuda: FakeCuda) -> Iterator[FakeCuFile]:
    fake = fake_cufile()
    fake.plan()
    yield fake
    fake.plan()
    assert fake.num_registered == 0


def engine(place: Path, **settings: Any) -> Engine:
    """With a host tier that is full after most of the puts."""
    return Engine(place, SSD_BYTES, 12288, **{
        "host_slots": HOST_SLOTS, "device": 0, "enable_gds": True, "load_policy": "always",
        "evict_start_threshold": 1.0, **settings,
    })


def wait_ready(made: Engine) -> None:
    until(lambda: made.stat("ssd_store_device_is_ready") == 1)


@contextmanager
def with_long(place: Path) -> Iterator[Engine]:
    """An engine that has a long sequence, on SSD alone."""
    with engine(place) as made:
        wait_ready(made)
        put(made, LONG)
        yield made


def put(made: Engine, seed: int) -> None:
    made.put(seed)
    made.settle()


def start_get(made: Engine, **options: Any) -> tuple[int, NDArray[np.int32]]:
    """Load the long sequence: the task, and the pages."""
    keys = made.keys(LONG)
    pages = np.arange(MAX_BLOCKS, MAX_BLOCKS + len(keys), dtype=np.int32)
    return made.manager.blocks.get_blocks(keys, 0, pages, **options), pages


@pytest.mark.parametrize("staging", [64 << 20, 6 * 12288, 1])
def test_blocks_go_straight_between_ssd_and_gpu(
    tmp_path: Path, cufile: FakeCuFile, monkeypatch: pytest.MonkeyPatch, staging: int
) -> None:
    """Some sequences are longer than the host tier, and written directly; all are read back."""
    monkeypatch.setattr(gds, "_STAGING_BYTES", staging)     # all in one batch, by three, or each by itself
    with engine(tmp_path) as made:
        wait_ready(made)
        for seed in SEEDS:
            put(made, seed)
        assert cufile.num_moves > 0
        for seed in SEEDS:
            before = cufile.num_moves
            assert made.offered(seed) == length_of(seed)
            made.load(seed, length_of(seed))
            assert cufile.num_moves - before >= length_of(seed) - HOST_SLOTS
        assert made.stat("blocks_being_fetched") == 0
        made.manager.check_integrity()


def test_what_was_written_directly_is_there_after_a_restart(tmp_path: Path, cufile: FakeCuFile) -> None:
    with engine(tmp_path) as made:
        wait_ready(made)
        for seed in SEEDS:
            put(made, seed)
    with Engine(tmp_path, SSD_BYTES, 12288, 256, device=0) as made:                 # by way of host memory
        before = cufile.num_moves
        for seed in SEEDS:
            made.load(seed, length_of(seed))
        assert cufile.num_moves == before
    with engine(tmp_path) as made:
        wait_ready(made)
        for seed in SEEDS:
            made.load(seed, length_of(seed))
        assert cufile.num_moves > before


def test_a_host_tier_of_one_block(tmp_path: Path, cufile: FakeCuFile) -> None:
    with engine(tmp_path, host_slots=1) as made:
        wait_ready(made)
        for seed in SEEDS:
            put(made, seed)
            made.load(seed, length_of(seed))


def test_nothing_is_prefetched_into_host_memory(tmp_path: Path, cufile: FakeCuFile) -> None:
    with with_long(tmp_path) as made:
        for seed in (1, 8):                             # out of host memory
            put(made, seed)
        task = made.manager.blocks.prefetch_blocks(made.keys(LONG))
        assert made.manager.wait(task)[task].status is Status.SUCCESS
        assert made.stat("ssd_store_blocks_read") == 0
        made.load(LONG, length_of(LONG))


def test_flipped_bytes_are_a_miss(tmp_path: Path, cufile: FakeCuFile) -> None:
    with with_long(tmp_path) as made:
        for data in tmp_path.glob("?/*.data"):
            content = bytearray(data.read_bytes())
            for at in range(100, len(content), 4096):
                content[at] ^= 1
            data.write_bytes(content)
        assert not made.load(LONG, length_of(LONG), must=False)
        assert made.stat("ssd_store_checksum_mismatches") > 0
        assert made.offered(LONG) <= HOST_SLOTS
        put(made, LONG)
        made.load(LONG, length_of(LONG))


def test_reads_that_fail_are_misses(tmp_path: Path, cufile: FakeCuFile) -> None:
    with with_long(tmp_path) as made:
        cufile.plan(fail=2)
        assert not made.load(LONG, length_of(LONG), must=False)
        assert made.stat("ssd_store_read_errors") == 2
        assert made.offered(LONG) < length_of(LONG)
        put(made, LONG)
        made.load(LONG, length_of(LONG))


def test_writes_that_fail_are_not_offered(tmp_path: Path, cufile: FakeCuFile) -> None:
    with engine(tmp_path) as made:
        wait_ready(made)
        cufile.plan(fail=1)
        keys = made.keys(LONG)
        made.fill(keys)
        task = made.manager.blocks.put_blocks(keys, 0, np.arange(len(keys), dtype=np.int32))
        assert task is not None
        assert made.manager.wait(task, completely=True)[task].status is Status.FAILED
        assert made.stat("ssd_store_write_errors") == 1
        assert made.offered(LONG) < length_of(LONG)
        put(made, LONG)
        made.load(LONG, length_of(LONG))


def test_a_fence_holds_back_what_is_direct(tmp_path: Path, cufile: FakeCuFile) -> None:
    with with_long(tmp_path) as made:
        before = cufile.num_moves
        task, pages = start_get(made, fence=3)
        assert made.manager.wait(task, timeout=0.2)[task].status is Status.TIMEOUT
        assert cufile.num_moves == before
        made.client.advance_fence(load=3)
        assert made.manager.wait(task, completely=True)[task].status is Status.SUCCESS
        assert cufile.num_moves > before
        assert made.read(pages) == made.read(np.arange(len(pages), dtype=np.int32))


def test_a_cancelled_get_loses_nothing(tmp_path: Path, cufile: FakeCuFile) -> None:
    with with_long(tmp_path) as made:
        task, _ = start_get(made, fence=9)
        made.manager.cancel(task)
        assert made.manager.wait(task, completely=True)[task].status is Status.CANCELLED
        assert made.offered(LONG) == length_of(LONG)
        made.load(LONG, length_of(LONG))


def test_a_cancelled_put_leaves_nothing_on_ssd(tmp_path: Path, cufile: FakeCuFile) -> None:
    """Its pages may be another's when they are read: a restart must not offer the blocks written from them."""
    with engine(tmp_path) as made:
        wait_ready(made)
        cufile.plan(delay_us=20_000)
        keys, before = made.keys(LONG), cufile.num_moves
        task = made.manager.blocks.put_blocks(keys, 0, np.arange(len(keys), dtype=np.int32))
        assert task is not None
        until(lambda: cufile.num_moves > before)
        made.manager.cancel(task)
        assert made.manager.wait(task, completely=True)[task].status is Status.CANCELLED
        cufile.plan()
        assert made.offered(LONG) == 0
    with engine(tmp_path) as made:
        assert made.offered(LONG) == 0


@pytest.mark.parametrize("plan", [{"refuse": True}, {"broken": True}])
def test_where_cufile_does_not_work_host_memory_is_the_way(
    tmp_path: Path, cufile: FakeCuFile, caplog: pytest.LogCaptureFixture, plan: dict[str, bool]
) -> None:
    with with_long(tmp_path):
        pass
    cufile.plan(**plan)
    with caplog.at_level(logging.ERROR), engine(tmp_path, host_slots=64) as made:
        if "broken" in plan:
            wait_ready(made)
            assert not made.load(LONG, length_of(LONG), must=False)
            until(lambda: made.stat("ssd_store_device_is_ready") == 0)
        until(lambda: "GPUDirect Storage is not in service: cuFile" in caplog.text)
        assert made.offered(LONG) == length_of(LONG)
        made.load(LONG, length_of(LONG))


def test_without_a_gpu_host_memory_is_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), engine(tmp_path, host_slots=64, device=None) as made:
        until(lambda: "not on a GPU" in caplog.text)
        put(made, LONG)
        made.load(LONG, length_of(LONG))


def test_a_rank_that_goes_away_and_comes_back(tmp_path: Path, cufile: FakeCuFile) -> None:
    with with_long(tmp_path) as made:
        made.client.suspend()
        until(lambda: made.stat("ssd_store_device_is_ready") == 0 and not made.manager.is_ready())
        made.register()
        wait_ready(made)
        made.load(LONG, length_of(LONG))


def test_a_rank_is_closed_while_a_disk_hangs(
    tmp_path: Path, cufile: FakeCuFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the pages stay as they are when the disk comes back."""
    monkeypatch.setattr(gds, "_CLOSE_S", 0.1)
    with with_long(tmp_path) as made:
        cufile.plan(delay_us=1_000_000)
        before = cufile.num_moves
        task, pages = start_get(made)
        until(lambda: cufile.num_moves > before)
        started = time.monotonic()
        made.client.suspend()
        assert time.monotonic() - started < 1.0
        assert made.manager.wait(task, completely=True)[task].status is Status.FAILED
        content = made.read(pages[HOST_SLOTS:])
        cufile.plan()
        until(lambda: cufile.num_registered == 0, 20.0)
        assert made.read(pages[HOST_SLOTS:]) == content
        assert made.offered(LONG) == length_of(LONG)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an SSD tier"):
        CacheConfig(enable_gds=True)
    config = CacheConfig(enable_gds=True, num_cpu_blocks=8, ssd_cache_gb=1.0, ssd_cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="one rank"):
        KVManager(ModelConfig(num_layers=1, num_kv_heads=2, head_size=64, dtype="float16", tp_size=2), config)


def test_staging_gathers_and_scatters_and_takes_checksums(cuda: FakeCuda) -> None:
    tensors = Tensors(device=0)
    regions, num_pages, segment_bytes = regions_from_tensors(tensors.specs())
    device = load_driver().device(0)
    pages = np.random.default_rng(1).permutation(num_pages)[:16].astype(np.int32)
    tensors.fill(pages, 1)
    slot_bytes = -(-segment_bytes // 4096) * 4096
    functions = move_function(device), checksum_function(device)
    staging = DeviceStaging(device, regions, num_pages, slot_bytes, 16, *functions, 4)
    try:
        staging.gather(np.arange(16, dtype=np.int32), pages)
        sums = staging.checksums(0, 16)
        held = np.ctypeslib.as_array((ctypes.c_uint8 * (16 * slot_bytes)).from_address(staging.address))
        slots = held.reshape(16, slot_bytes)
        assert sums.tolist() == [xxh3_64(slot.tobytes()) for slot in slots]
        assert staging.checksums(5, 7).tolist() == sums[5:12].tolist()
        assert not slots[:, segment_bytes:].any()
        with pytest.raises(ValueError, match="page 64"):
            staging.scatter(np.array([0], np.int32), np.array([num_pages], np.int32))
        with pytest.raises(ValueError, match="for 17 pages"):
            staging.gather(np.zeros(17, dtype=np.int32), np.zeros(17, dtype=np.int32))
        with pytest.raises(ValueError, match="slots 5 to 17"):
            staging.checksums(5, 12)
        before = tensors.read(pages)
        tensors.zero()
        staging.scatter(np.arange(16, dtype=np.int32)[::-1].copy(), pages[::-1].copy())
        assert tensors.read(pages) == before
    finally:
        staging.close()


def test_a_machine_without_cufile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import cufile as bindings

    from flexkv.rank import cufile as module

    def missing() -> None:
        raise RuntimeError("Failure finding libcufile.so")

    monkeypatch.setattr(module, "_driver_is_open", False)
    monkeypatch.setattr(bindings, "driver_open", missing)
    with pytest.raises(GdsUnavailableError, match="pip install nvidia-cufile"):
        module.CuFile([0], 4096, 4096)
