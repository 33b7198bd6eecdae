"""The slot table: records are read as they were written, and broken records are ignored."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv._core.io import slot_records
from flexkv.storage.ssd.slot_table import HEADER_BYTES, RECORD, Header, SlotTable
from tests.support.faulty_files import FaultyFiles
from tests.support.ssd_store import keys_of

NUM = 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, SlotTable.num_bytes(NUM))
    yield descriptor
    os.close(descriptor)


def records_of(numbers: list[int], sequence: int = 1, domain: int = 5) -> np.ndarray:
    records = np.zeros(len(numbers), dtype=RECORD)
    records["key"], records["parent"] = keys_of(numbers), keys_of([n - 1 for n in numbers])
    records["checksum"], records["sequence"] = np.arange(len(numbers)), sequence + np.arange(len(numbers))
    records["domain"], records["length"] = domain, 4096
    return records


def filled(fd: int, files: FaultyFiles | None = None) -> SlotTable:
    table = SlotTable(fd, files or FaultyFiles())
    table.store(Header(4096, NUM))
    return table


def test_the_record_has_the_layout_of_the_native_code() -> None:
    assert RECORD.itemsize == 64
    assert RECORD.fields is not None
    assert RECORD.fields["check"][1] == 60


def test_write_erase_scan(fd: int) -> None:
    table = filled(fd)
    slots = np.array([7, 3, 4, 99, 0], dtype=np.int32)
    table.write(slots, records_of([10, 11, 12, 13, 14]))
    table.erase(np.array([4, 50], dtype=np.int32))
    scan = table.scan(5)
    assert scan.slots.tolist() == [0, 3, 7, 99]
    assert scan.records["key"].tolist() == keys_of([14, 11, 10, 13]).tolist()
    assert {state: n for state, n in scan.states.items() if n} == {"empty": NUM - 4, "mine": 4}
    assert scan.used.tolist() == [0, 3, 7, 99]
    assert scan.domains == {5: 4}


def test_adjacent_slots_are_one_write(fd: int) -> None:
    files = FaultyFiles()
    table = filled(fd, files)
    calls: list[tuple[int, int]] = []

    def note(name: str, _: int, offset: int, length: int) -> int:
        calls.append((offset, length))
        return 0

    files.fault = note
    table.write(np.array([5, 4, 6, 20], dtype=np.int32), records_of([1, 2, 3, 4]))
    assert calls == [(HEADER_BYTES + 4 * 64, 3 * 64), (HEADER_BYTES + 20 * 64, 64)]


def test_domains_floor_and_length(fd: int) -> None:
    table = filled(fd)
    table.write(np.arange(4, dtype=np.int32), records_of([1, 2, 3, 4], sequence=10))
    table.write(np.arange(4, 6, dtype=np.int32), records_of([5, 6], sequence=20, domain=6))
    longer = records_of([7])
    longer["length"], longer["sequence"] = 8192, 50
    table.write(np.array([6], dtype=np.int32), longer)
    table.update(floor=11)
    scan = table.scan(5)
    assert scan.slots.tolist() == [2, 3]
    assert {state: n for state, n in scan.states.items() if n} == {
        "empty": NUM - 7, "mine": 2, "other_domain": 2, "void": 3,
    }
    assert table.scan(5, floor=12).slots.tolist() == [3]
    assert scan.domains == {5: 2, 6: 2}


def test_every_bit_of_a_record_counts(fd: int) -> None:
    table = filled(fd)
    table.write(np.array([3], dtype=np.int32), records_of([1]))
    offset = HEADER_BYTES + 3 * 64
    good = os.pread(fd, 64, offset)
    for bit in range(64 * 8):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        os.pwrite(fd, raw, offset)
        assert table.scan(5).states["broken"] == 1, bit
    os.pwrite(fd, good, offset)
    os.pwrite(fd, good, offset + 64)                 # in another place it is not good
    assert table.scan(5).slots.tolist() == [3]
    assert table.scan(5).states["broken"] == 1


def test_a_record_without_key_is_broken(fd: int) -> None:
    table = filled(fd)
    table.write(np.array([3], dtype=np.int32), records_of([-1]))
    assert table.scan(5).states["broken"] == 1


@pytest.mark.parametrize("sequence", [1 << 62, (1 << 63) - 1, (1 << 64) - 1])
def test_an_impossible_time_is_broken(fd: int, sequence: int) -> None:
    """Else the next sequence would not fit: every later write failed."""
    table = filled(fd)
    records = records_of([3])
    records["sequence"] = np.uint64(sequence)
    table.write(np.array([3], dtype=np.int32), records)
    scan = table.scan(5)
    assert (scan.states["broken"], scan.last_sequence) == (1, 0)
    assert Header.unpack(Header(4096, NUM, sequence).pack()) is None


def test_every_bit_of_a_header_counts() -> None:
    page = Header(4096, 7, 12345, True).pack()
    assert len(page) == HEADER_BYTES
    assert Header.unpack(page) == Header(4096, 7, 12345, True)
    for bit in range(48 * 8):
        raw = bytearray(page)
        raw[bit // 8] ^= 1 << bit % 8
        assert Header.unpack(bytes(raw)) is None
    assert Header.unpack(b"") is None
    assert Header.unpack(bytes(HEADER_BYTES)) is None


def test_a_table_that_ends_early_holds_less(fd: int) -> None:
    table = filled(fd)
    table.write(np.arange(NUM, dtype=np.int32), records_of(list(range(NUM))))
    os.ftruncate(fd, HEADER_BYTES + 10 * 64 + 5)
    scan = table.scan(5)
    assert scan.slots.tolist() == list(range(10))
    assert scan.states["unreadable"] == NUM - 10


def test_a_table_that_cannot_be_read_holds_nothing(fd: int) -> None:
    files = FaultyFiles()
    table = filled(fd, files)
    table.write(np.arange(4, dtype=np.int32), records_of([1, 2, 3, 4]))
    files.fault = lambda name, *_: 5 if name == "read" else 0
    scan = table.scan(5)
    assert {state: n for state, n in scan.states.items() if n} == {"unreadable": NUM}
    assert scan.used.tolist() == list(range(NUM))               # for all one knows


def test_short_reads_and_writes_go_on(fd: int) -> None:
    files = FaultyFiles(seed=1)
    table = filled(fd, files)
    files.short_share = 0.9
    table.write(np.arange(NUM, dtype=np.int32), records_of(list(range(NUM))))
    assert table.scan(5).slots.tolist() == list(range(NUM))
    assert table.load() == Header(4096, NUM)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="bytes"):
        slot_records.scan(np.zeros((2, 63), np.uint8), 0, 1, 1, 0)
    with pytest.raises(ValueError, match="slots"):
        slot_records.seal(np.zeros((2, 64), np.uint8), np.zeros(3, np.int32))
