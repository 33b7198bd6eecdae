"""The slot table: a file that records the block of each slot, so that the cache is warm after a restart."""

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
"""Record of one slot. ``check`` covers the other fields and the slot's number (``flexkv._core.io.slot_records``); all
zeros: empty."""

_SCAN_RECORDS = 1 << 16
"""Number of records read at a time (4 MiB): large enough for a fast read, small enough for the CPU's cache."""


@dataclass(frozen=True)
class Header:
    """First page of a table.

    Attributes
    ----------
    slot_bytes, num_slots : int
    floor : int
        Records are valid only if their sequence is higher. Raising the floor drops all blocks at once.
    clean : bool
        The table was closed after all data and records had been synced.
    """

    slot_bytes: int
    num_slots: int
    floor: int = 0
    clean: bool = False

    VERSION: ClassVar[int] = 1
    _MAGIC: ClassVar[bytes] = b"FlexKVst"
    _FORMAT: ClassVar[struct.Struct] = struct.Struct("<8sIIQQQ")

    def pack(self) -> bytes:
        """The header as a page of HEADER_BYTES bytes."""
        fields = self._FORMAT.pack(
            self._MAGIC, self.VERSION, self.clean, self.slot_bytes, self.num_slots, self.floor
        )
        return (fields + xxh3_64(fields).to_bytes(8, "little")).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> "Header | None":
        """Read a header from a page; None if the page holds no header of this version."""
        size = cls._FORMAT.size
        if len(page) < size + 8 or xxh3_64(page[:size]).to_bytes(8, "little") != page[size : size + 8]:
            return None
        magic, version, clean, slot_bytes, num_slots, floor = cls._FORMAT.unpack(page[:size])
        if magic != cls._MAGIC or version != cls.VERSION:
            return None
        if not 1 <= slot_bytes < 1 << 32 or not 1 <= num_slots < 1 << 31:         # slots are int32
            return None
        if floor >> 62:                                      # a time in nanoseconds: not before the year 2116
            return None
        return cls(slot_bytes, num_slots, floor, bool(clean))


@dataclass(frozen=True)
class Scan:
    """Contents of a table.

    Attributes
    ----------
    slots : (n,) int32
        Slots with a valid record of the domain given to ``scan``.
    records : (n,) RECORD
        Records of these slots.
    states : dict
        Number of slots whose record is ``empty``, ``mine``, of an ``other_domain``, ``void``, ``broken`` or
        ``unreadable``.
    used : (m,) int32
        Slots whose record is not empty, or could not be read.
    domains : dict
        Number of valid records, by domain.
    last_sequence : int
        Highest sequence of a valid record of any domain; 0: there are none.
    """

    slots: NDArray[np.int32]
    records: NDArray[np.void]
    states: dict[str, int]
    used: NDArray[np.int32]
    domains: dict[int, int]
    last_sequence: int


def choose(records: NDArray[np.void], indices: NDArray[np.intp]) -> NDArray[np.void]:
    """``records[indices]``. Several times as fast as numpy, which copies a structured array field by field."""
    words = records.view(np.uint64).reshape(len(records), RECORD.itemsize // 8)
    return words.take(indices, axis=0).view(RECORD).reshape(len(indices))


_STATES = {
    "empty": slot_records.EMPTY, "mine": slot_records.MINE, "other_domain": slot_records.OTHER_DOMAIN,
    "void": slot_records.VOID, "broken": slot_records.BROKEN,
}


class SlotTable:
    """A header and a record for each slot, in a file that is never mapped: if another process truncates it, the result
    is an error and not a SIGBUS.

    A write goes to the page cache, in one call for each run of adjacent slots. Killing the process loses no write. A
    loss of power may lose any write since the last ``sync``; a record that then describes other data than the slot
    holds is detected by its checksum. Only one thread at a time may write.

    Parameters
    ----------
    fd : int
        Descriptor of the file; owned by the caller.
    files : FileLayer
    """

    def __init__(self, fd: int, files: FileLayer) -> None:
        self._fd = fd
        self._files = files
        self.header = Header(0, 0)

    @staticmethod
    def num_bytes(num_slots: int) -> int:
        """Bytes of the table of ``num_slots`` slots, in whole pages."""
        return HEADER_BYTES + -(-num_slots * RECORD.itemsize // HEADER_BYTES) * HEADER_BYTES

    def load(self) -> Header | None:
        """Read the header; None if there is no valid header."""
        page = bytearray(HEADER_BYTES)
        read_into(self._files, self._fd, memoryview(page), 0)
        header = Header.unpack(bytes(page))
        if header is not None:
            self.header = header
        return header

    def store(self, header: Header) -> None:
        """Write the header, and wait until it is on the disk. If that fails, the next ``update`` writes it again."""
        self.header = header
        write_all(self._files, self._fd, memoryview(header.pack()), 0)
        self.sync()

    def update(self, **changes: Any) -> None:
        """Change fields of the header. A higher ``floor`` makes all records with a sequence up to it void, also after a
        loss of power."""
        self.store(replace(self.header, **changes))

    def sync(self) -> None:
        """Wait until all writes are on the disk."""
        self._files.fdatasync(self._fd)

    def erase(self, slots: NDArray[np.int32]) -> None:
        """Empty the records of slots ((n,) int32)."""
        self._write_runs(np.sort(slots), np.zeros((len(slots), RECORD.itemsize), dtype=np.uint8))

    def write(self, slots: NDArray[np.int32], records: NDArray[np.void]) -> None:
        """Write the records ((n,) RECORD) of slots ((n,) int32). Fills in their ``check``."""
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
        """Read all records. Records with a sequence up to ``floor``, or up to the header's floor, are void.

        Records that cannot be read, or that are behind the end of the file, count as ``unreadable``.
        """
        floor = max(floor, self.header.floor)
        slots, records, used = [np.empty(0, np.int32)], [np.empty(0, RECORD)], [np.empty(0, np.int32)]
        counts = np.zeros(len(_STATES), dtype=np.int64)
        domains: dict[int, int] = {}
        last_sequence = 0
        # records behind the end of the file are not read: a damaged header may name billions of slots
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
        """(n, 64) uint8: ``count`` records, or fewer if the file ends or cannot be read."""
        raw = np.empty((count, RECORD.itemsize), dtype=np.uint8)
        try:
            got = read_into(self._files, self._fd, raw.reshape(-1).data, HEADER_BYTES + first * RECORD.itemsize)
        except OSError as error:
            logger.error("records of slots %d to %d cannot be read: %s", first, first + count - 1, error.strerror)
            got = 0
        return raw[: got // RECORD.itemsize]
