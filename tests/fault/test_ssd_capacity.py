"""A week of puts in fast motion: the SSD tier never takes a byte more than it may, and loses no slot.

Small here; ``CAPACITY_TURNS`` says how many times its capacity is put (``pytest -s`` tells the figures).
"""

import errno
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.config import CacheConfig
from flexkv.storage.ssd.store import SsdStore
from tests.support.faulty_files import FaultyFiles, ThreadQueue
from tests.support.ssd_engine import Engine, length_of

TURNS = int(os.environ.get("CAPACITY_TURNS", "20"))
SIZES = (1_000_000, 1_500_000, 700_001, 1_200_000)
"""Of the tier, from one start to the next: it shrinks and grows."""


class Scale:
    """Weighs all files of directories."""

    def __init__(self, place: Path) -> None:
        self._places = (place / "a", place / "b")
        self.heaviest = 0
        self.samples = 0

    def weigh(self, limit: int) -> None:
        files = [path.stat() for place in self._places if place.exists() for path in place.iterdir()]
        size, taken = sum(file.st_size for file in files), sum(file.st_blocks * 512 for file in files)
        self.heaviest = max(self.heaviest, size, taken)
        self.samples += 1
        assert max(size, taken) <= limit, f"{size} bytes long, {taken} bytes taken, of {limit}"


def failing_store(
    stores: list[SsdStore], config: CacheConfig, slot_bytes: int, domain: bytes, memory: Any, *, share: float
) -> SsdStore:
    files = FaultyFiles(len(stores))
    make = partial(ThreadQueue, layer=files)
    stores.append(SsdStore(config.ssd_directories, config.ssd_bytes, slot_bytes, domain, memory, make_queue=make,
                           files=files, probe_s=0.01))
    rng = random.Random(len(stores))
    files.short_share = share
    files.fault = lambda name, *_: errno.EIO if rng.random() < share else 0
    return stores[-1]


def put_a_lot(engine: Engine, rng: random.Random, scale: Scale, limit: int, num_blocks: int) -> int:
    """Random puts, loads and now and then a reset, until so many blocks were put."""
    done = 0
    while done < num_blocks:
        seed = rng.randrange(1 << 30)
        engine.put(seed)
        done += length_of(seed)
        if rng.random() < 0.05:
            engine.load(seed, length_of(seed), must=False)
        if rng.random() < 0.0005:
            engine.manager.reset()
        if rng.random() < 0.3:
            scale.weigh(limit)
        if rng.random() < 0.02:
            engine.manager.check_integrity()
        if engine.stat("ssd_queued_blocks") > 100:
            engine.settle()
    return done


@pytest.mark.parametrize("share", [0.0, 0.012], ids=["sound", "failing"])
def test_no_byte_too_much_and_no_slot_lost(tmp_path: Path, share: float) -> None:
    rng, scale, stores = random.Random(0), Scale(tmp_path), list[SsdStore]()
    make = partial(failing_store, stores, share=share) if share else None
    put = written = retired = slots = 0
    for limit in SIZES:
        with Engine(tmp_path, limit, host_slots=128, make_store=make) as engine:
            scale.weigh(limit)
            slots = engine.stat("ssd_store_num_slots")
            put += put_a_lot(engine, rng, scale, limit, TURNS * slots // len(SIZES))
            engine.settle()
            engine.settle_reads()
            engine.manager.check_integrity()
            written += engine.stat("ssd_written_blocks")
            retired += engine.stat("ssd_store_slots_retired")
            engine.manager.reset()
            if not share:
                assert engine.stat("ssd_free_slots") == engine.stat("ssd_slots") == slots
            else:
                engine.wait_until_usable()      # free slots of an offline directory do not count
                assert stores[-1].slots.capacity + int(stores[-1].slots._retired.sum()) == slots
                assert not stores[-1].slots._in_use.any()
        scale.weigh(limit)
    assert written > put // 10
    assert (retired > 0) == (share > 0)
    print(f"\n{put} blocks put, {written} written, {slots} slots at the end, {retired} retired; "
          f"{scale.samples} samples, at most {scale.heaviest} bytes")


def test_fragments_of_a_file_count_too(tmp_path: Path) -> None:
    """Slots that are written here and there make a file system note where each is, in blocks that it counts."""
    limit, rng = 200 << 20, np.random.default_rng(0)
    scale = Scale(tmp_path)
    with Engine(tmp_path, limit) as engine:
        data = tmp_path / "a" / "flexkv.data"
        fd = os.open(data, os.O_WRONLY)
        try:
            for slot in rng.permutation(data.stat().st_size // 8192):
                os.pwrite(fd, b"x" * 4096, int(slot) * 8192)
                if slot % 1000 == 0:
                    os.fdatasync(fd)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        scale.weigh(limit)
        engine.put(1)
