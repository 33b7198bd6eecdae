"""Directories of the SSD tier, damaged in any way between two starts: no crash, no hang, no wrong block, no leak."""

import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from random import Random

from flexkv._core.io.checksum import xxh3_64
from flexkv.cli.inspect import describe
from flexkv.errors import FlexKVError, StorageError
from flexkv.storage.ssd.directory import DATA_NAME, TABLE_NAME
from flexkv.storage.ssd.slot_table import HEADER_BYTES, RECORD, Header
from tests.support.ssd_store import SLOT_BYTES, Tier

from .budget import case, mutated, seeds

BLOCKS = 12
SLOTS = 16


def make(directory: Path, closed: bool) -> None:
    tier = Tier([directory], SLOTS)
    assert tier.write(range(BLOCKS)).all()
    if closed:
        tier.close()
        return
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)                     # as it is on disk when the process is killed
    tier.close()
    shutil.rmtree(directory)
    copy.rename(directory)


def damage_table(rng: Random, path: Path) -> None:
    table = bytearray(path.read_bytes())
    records = [HEADER_BYTES + slot * RECORD.itemsize for slot in range(SLOTS)]
    match rng.randrange(6):
        case 0:
            table = bytearray(mutated(rng, bytes(table), 1 << 20))
        case 1:                                          # records in slots that are not theirs
            a, b = rng.sample(records, 2)
            size = RECORD.itemsize
            table[a : a + size], table[b : b + size] = table[b : b + size], table[a : a + size]
        case 2:
            a, b = rng.sample(records, 2)
            table[a : a + RECORD.itemsize] = table[b : b + RECORD.itemsize]
        case 3:                                          # a header that is sealed, and impossible
            odd = [0, 1, 15, 17, SLOT_BYTES, (1 << 31) + 5, 1 << 62, (1 << 64) - 1]
            fields = Header._FORMAT.pack(
                Header._MAGIC, rng.choice([1, 1, 0, 2]), rng.choice([0, 1, 7]), rng.choice([SLOT_BYTES, *odd]),
                rng.choice([SLOTS, *odd]), rng.choice([0, 0, *odd]),
            )
            table[: len(fields) + 8] = fields + struct.pack("<Q", xxh3_64(fields))
        case 4:
            del table[rng.choice([0, 1, HEADER_BYTES, *records]) :]
        case 5:
            at = rng.choice(records) + rng.randrange(RECORD.itemsize)
            table[at] ^= 1 << rng.randrange(8)
    path.write_bytes(table)


def damage_data(rng: Random, path: Path) -> None:
    size = path.stat().st_size
    match rng.randrange(5):
        case 0:
            os.truncate(path, rng.choice([0, 1, SLOT_BYTES, size // 2, size - 1, size + 12345]))
        case 1:
            with path.open("r+b") as file:
                file.seek(rng.randrange(size))
                file.write(rng.randbytes(rng.choice([1, 100, SLOT_BYTES])))
        case 2:                                          # a block in the slot of another
            with path.open("r+b") as file:
                file.seek(SLOT_BYTES * rng.randrange(BLOCKS))
                block = file.read(SLOT_BYTES)
                file.seek(SLOT_BYTES * rng.randrange(BLOCKS))
                file.write(block)
        case 3:
            path.unlink()
        case 4:
            path.unlink()
            rng.choice([path.mkdir, lambda: path.symlink_to("/dev/null"), lambda: path.symlink_to(path.name)])()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_damaged_directories(tmp_path: Path) -> None:
    originals = {closed: tmp_path / f"closed-{closed}" for closed in (True, False)}
    for closed, directory in originals.items():
        make(directory, closed)
    directory = tmp_path / "kv"
    opened = offered = 0
    before = descriptors()
    for seed in seeds():
        with case(seed) as rng:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(originals[rng.random() < 0.5], directory)
            if rng.random() < 0.8:
                damage_table(rng, directory / TABLE_NAME)
            if rng.random() < 0.5:
                damage_data(rng, directory / DATA_NAME)
            with suppress(StorageError):
                describe(directory)
            try:
                tier = Tier([directory], SLOTS)
            except FlexKVError:
                continue
            try:
                offered += check(tier)
            finally:
                tier.close()
            opened += 1
    assert descriptors() <= before
    assert opened
    assert offered


def check(tier: Tier) -> int:
    """Every block that is offered has the bytes of its key, or is found out; what is written now is read again."""
    found = tier.recover()
    assert set(found) <= set(range(BLOCKS)), "a block that nobody wrote"
    assert len(set(found.values())) == len(found)
    good = int(tier.read(list(found), list(found.values())).sum()) if found else 0        # compares bytes
    tier.store.slots.check_integrity()
    slots = tier.store.slots.allocate(2)
    if slots is not None:
        written = tier.write([100, 101], slots)
        assert tier.read([100, 101], slots)[written].all()
    return good
