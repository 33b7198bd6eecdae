"""Records of the slot table: sealed when written, checked when read back.

A record is 64 bytes, so it never crosses a sector: key 16, parent 16, checksum 8, sequence 8, domain 8, length 4,
check 4, little-endian. The check is the low half of the XXH3-64 of the bytes before it, seeded with the slot, so that a
record that was written to, or read from, another place does not pass. 64 zero bytes are an empty slot.
"""
import numpy as np

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from flexkv._core.xxhash cimport XXH3_64bits_withSeed

cdef enum:
    RECORD_BYTES = 64
    CHECKED_BYTES = 60

cdef struct Record:
    uint64_t key[2]
    uint64_t parent[2]
    uint64_t checksum
    uint64_t sequence
    uint64_t domain
    uint32_t length
    uint32_t check

# States of a record that scan returns.
EMPTY = 0
MINE = 1
OTHER_DOMAIN = 2
VOID = 3
BROKEN = 4


cdef int check_shape(const uint8_t[:, ::1] records) except -1:
    if records.shape[1] != RECORD_BYTES:
        raise ValueError(f"records of {records.shape[1]} bytes; they have {RECORD_BYTES}")
    return 0


def seal(uint8_t[:, ::1] records not None, const int32_t[::1] slots not None):
    """Fill in the check of each record ((n, 64) uint8), which is for the slot beside it ((n,) int32)."""
    cdef Py_ssize_t i, n = slots.shape[0]
    cdef uint32_t check
    check_shape(records)
    if records.shape[0] != n:
        raise ValueError(f"{records.shape[0]} records for {n} slots")
    with nogil:
        for i in range(n):
            check = <uint32_t>XXH3_64bits_withSeed(&records[i, 0], CHECKED_BYTES, slots[i])
            memcpy(&records[i, CHECKED_BYTES], &check, sizeof(check))


cdef inline uint8_t state_of(const uint8_t *data, uint64_t slot, uint64_t domain, uint32_t length,
                             uint64_t floor) noexcept nogil:
    cdef Record record
    memcpy(&record, data, RECORD_BYTES)
    if not (record.key[0] | record.key[1] | record.parent[0] | record.parent[1] | record.checksum | record.sequence
            | record.domain | record.length | record.check):
        return 0
    if record.check != <uint32_t>XXH3_64bits_withSeed(data, CHECKED_BYTES, slot) or not (record.key[0] | record.key[1]):
        return 4
    if record.sequence >> 62:                           # a time in nanoseconds: not before the year 2116
        return 4
    if record.sequence <= floor or record.length != length:
        return 3
    return 1 if record.domain == domain else 2


def scan(const uint8_t[:, ::1] records not None, Py_ssize_t first_slot, uint64_t domain, uint32_t length,
         uint64_t floor):
    """Classify records ((n, 64) uint8), the first being that of ``first_slot``.

    Returns
    -------
    (n,) uint8
        EMPTY; MINE: of this domain, this length, and a sequence above ``floor``; OTHER_DOMAIN; VOID: not above the
        floor, or of another length; BROKEN: its check is wrong.
    """
    check_shape(records)
    cdef Py_ssize_t i, n = records.shape[0]
    out_array = np.empty(n, dtype=np.uint8)
    cdef uint8_t[::1] out = out_array
    with nogil:
        for i in range(n):
            out[i] = state_of(&records[i, 0], first_slot + i, domain, length, floor)
    return out_array
