"""The slot table: beside the data, what each slot holds, so that the cache is warm after a restart."""

import logging
import os
import struct
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io import slot_records
from flexkv._core.io.checksum import xxh3_64
from flexkv.storage.ssd.file_layer import FileLayer, read_into, write_all

logger = logging.getLogger("flexkv.storage")

HEADER_BYTES = 4096
RECORD = np.dtype([
    ("key", "<u8", (2,)), ("parent", "<u8", (2,)), ("checksum", "<u8"), ("sequence", "<u8"), ("domain", "<u8"),
    ("length", "<u4"), ("check", "<u4"),
])
"""One slot. ``check`` covers the rest and the slot's number (see ``_core.slot_records``); all zero: empty."""

_SCAN_RECORDS = 1 << 16
"""Records read at a time (4 MiB): large enough for a disk, small enough for a cache."""


@dataclass(frozen=True)
class Header:
    """First page of a table.

    Attributes
    ----------
    slot_bytes, num_slots : int
    floor : int
        Records count only if their sequence is higher: this is how everything is forgotten at once.
    clean : bool
        The table was closed, after everything had been synced.
    """

    slot_bytes: int
    num_slots: int
    floor: int = 0
    clean: bool = False

    VERSION: ClassVar[int] = 1
    _MAGIC: ClassVar[bytes] = b"FlexKVst"
    _FORMAT: ClassVar[struct.Struct] = struct.Struct("<8sIIQQQ")

    def pack(self) -> bytes:
        """A page."""
        fields = self._FORMAT.pack(
            self._MAGIC, self.VERSION, self.clean, self.slot_bytes, self.num_slots, self.floor
        )
        return (fields + xxh3_64(fields).to_bytes(8, "little")).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> "Header | None":
        """None if these are not the bytes of a header of this version."""
        size = cls._FORMAT.size
        if len(page) < size + 8 or xxh3_64(page[:size]).to_bytes(8, "little") != page[size : size + 8]:
            return None
        magic, version, clean, slot_bytes, num_slots, floor = cls._FORMAT.unpack(page[:size])
        if magic != cls._MAGIC or version != cls.VERSION:
            return None
        if not 1 <= slot_bytes < 1 << 32 or not 1 <= num_slots < 1 << 31:         # slots are int32
            return None
        return cls(slot_bytes, num_slots, floor, bool(clean))


@dataclass(frozen=True)
class Scan:
    """What a table holds.

    Attributes
    ----------
    slots : (n,) int32
        Slots with a record of the domain that was asked for.
    records : (n,) RECORD
        Those records.
    states : dict
        How many slots are ``empty``, ``mine``, of an ``other_domain``, ``void``, ``broken``, or have an ``unreadable``
        record.
    used : (m,) int32
        Slots whose record is not empty, or could not be read.
    domains : dict
        Records that count, by domain.
    last_sequence : int
        The highest of those; 0: there are none.
    """

    slots: NDArray[np.int32]
    records: NDArray[np.void]
    states: dict[str, int]
    used: NDArray[np.int32]
    domains: dict[int, int]
    last_sequence: int


def choose(records: NDArray[np.void], indices: NDArray[np.intp]) -> NDArray[np.void]:
    """``records[indices]``, which numpy does field by field, several times as fast."""
    words = records.view(np.uint64).reshape(len(records), RECORD.itemsize // 8)
    return words.take(indices, axis=0).view(RECORD).reshape(len(indices))


_STATES = {
    "empty": slot_records.EMPTY, "mine": slot_records.MINE, "other_domain": slot_records.OTHER_DOMAIN,
    "void": slot_records.VOID, "broken": slot_records.BROKEN,
}


class SlotTable:
    """A header and a record for each slot, in a file that is read and written but never mapped: a file that somebody
    truncates is then an error, and not a SIGBUS.

    A write goes to the page cache, in one call for each run of adjacent slots. Who kills the process loses nothing;
    who cuts the power may lose any of the writes since the last ``sync``, and a record that then stands beside other
    data is found out by its checksum. Only one thread at a time writes.

    Parameters
    ----------
    fd : int
        Owned by the caller.
    files : FileLayer
    """

    def __init__(self, fd: int, files: FileLayer) -> None:
        self._fd = fd
        self._files = files
        self.header = Header(0, 0)

    @staticmethod
    def num_bytes(num_slots: int) -> int:
        """Size of the table of so many slots: whole pages."""
        return HEADER_BYTES + -(-num_slots * RECORD.itemsize // HEADER_BYTES) * HEADER_BYTES

    def load(self) -> Header | None:
        """Read the header; None if there is none that can be used."""
        page = bytearray(HEADER_BYTES)
        read_into(self._files, self._fd, memoryview(page), 0)
        header = Header.unpack(bytes(page))
        if header is not None:
            self.header = header
        return header

    def store(self, header: Header) -> None:
        """Write the header, and wait until it is on the disk. If that fails, the next ``update`` tries it again."""
        self.header = header
        write_all(self._files, self._fd, memoryview(header.pack()), 0)
        self.sync()

    def update(self, **changes: Any) -> None:
        """Change fields of the header. With ``floor``, records with a sequence up to it are void from now on, also
        after a loss of power."""
        self.store(replace(self.header, **changes))

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        self._files.fdatasync(self._fd)

    def erase(self, slots: NDArray[np.int32]) -> None:
        """Make slots ((n,) int32) empty."""
        self._write_runs(np.sort(slots), np.zeros((len(slots), RECORD.itemsize), dtype=np.uint8))

    def write(self, slots: NDArray[np.int32], records: NDArray[np.void]) -> None:
        """Write the records ((n,) RECORD, their check is filled in here) of slots ((n,) int32)."""
        order = np.argsort(slots)
        slots = slots[order]
        raw = records[order].view(np.uint8).reshape(len(slots), RECORD.itemsize)
        slot_records.seal(raw, slots)
        self._write_runs(slots, raw)

    def _write_runs(self, slots: NDArray[np.int32], raw: NDArray[np.uint8]) -> None:
        starts = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
        for start, stop in zip(starts, [*starts[1:], len(slots)], strict=True):
            offset = HEADER_BYTES + int(slots[start]) * RECORD.itemsize
            write_all(self._files, self._fd, raw[start:stop].reshape(-1).data, offset)

    def scan(self, domain: int, floor: int = 0) -> Scan:
        """Read all records; those with a sequence up to ``floor``, or the header's, are void.

        A table that cannot be read, or that ends early, holds so much less.
        """
        floor = max(floor, self.header.floor)
        slots, records, used = [np.empty(0, np.int32)], [np.empty(0, RECORD)], [np.empty(0, np.int32)]
        counts = np.zeros(len(_STATES), dtype=np.int64)
        domains: dict[int, int] = {}
        last_sequence = 0
        # beyond the end of the file nothing is read: a damaged header may name billions of slots
        in_file = max(0, os.fstat(self._fd).st_size - HEADER_BYTES) // RECORD.itemsize
        present = min(self.header.num_slots, in_file)
        used.append(np.arange(present, self.header.num_slots, dtype=np.int32))
        for first in range(0, present, _SCAN_RECORDS):
            want = min(_SCAN_RECORDS, present - first)
            raw = self._read(first, want)
            states = slot_records.scan(raw, first, domain, self.header.slot_bytes, floor)
            chunk = raw.view(RECORD).reshape(-1)
            mine = np.flatnonzero(states == slot_records.MINE)
            counts_too = (states == slot_records.MINE) | (states == slot_records.OTHER_DOMAIN)
            last_sequence = max(last_sequence, int(chunk["sequence"].max(initial=0, where=counts_too)))
            slots.append((mine + first).astype(np.int32))
            records.append(choose(chunk, mine))
            unknown = np.arange(first + len(states), first + want, dtype=np.int32)
            used += [(np.flatnonzero(states != slot_records.EMPTY) + first).astype(np.int32), unknown]
            counts += np.bincount(states, minlength=len(_STATES))
            for digest, count in zip(*np.unique(chunk["domain"][counts_too], return_counts=True), strict=True):
                domains[int(digest)] = domains.get(int(digest), 0) + int(count)
        by_name = {name: int(counts[state]) for name, state in _STATES.items()}
        by_name["unreadable"] = self.header.num_slots - int(counts.sum())
        return Scan(
            np.concatenate(slots), np.concatenate(records), by_name, np.concatenate(used), domains, last_sequence
        )

    def _read(self, first: int, count: int) -> NDArray[np.uint8]:
        """(n, 64) uint8; n is less than ``count`` where the file ends or cannot be read."""
        raw = np.empty((count, RECORD.itemsize), dtype=np.uint8)
        try:
            got = read_into(self._files, self._fd, raw.reshape(-1).data, HEADER_BYTES + first * RECORD.itemsize)
        except OSError as error:
            logger.error("records of slots %d to %d cannot be read: %s", first, first + count - 1, error.strerror)
            got = 0
        return raw[: got // RECORD.itemsize]
