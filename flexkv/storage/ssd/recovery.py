"""Reads the slot tables of all directories at the start."""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.storage.recovered import newest
from flexkv.storage.ssd.directory import SsdDirectory
from flexkv.storage.ssd.slot_table import choose

logger = logging.getLogger("flexkv.storage")


def newest_records(
    directories: Sequence[SsdDirectory], domain: int, floor: int
) -> tuple[NDArray[np.int32], NDArray[np.void], NDArray[np.int32], int]:
    """Read the tables of all directories.

    Returns
    -------
    slots : (n,) int32
        Slots of the newest record of each key of the domain, the oldest first.
    records : (n,) RECORD
        Records of these slots.
    used : (m,) int32
        Slots whose record may not be empty, of any domain and state.
    last_sequence : int
        Highest sequence of a valid record of any domain.
    """
    slots, records, used, last_sequence = [], [], [], 0
    for directory in directories:
        scan = directory.table.scan(domain, floor)
        logger.info("%s: %s", directory.path, ", ".join(f"{n} {state}" for state, n in scan.states.items() if n))
        slots.append(scan.slots + np.int32(directory.first_slot))
        records.append(scan.records)
        used.append(scan.used + np.int32(directory.first_slot))
        last_sequence = max(last_sequence, scan.last_sequence)
    every_slot, every_record = np.concatenate(slots), np.concatenate(records)
    sequences = np.ascontiguousarray(every_record["sequence"])
    keep = np.flatnonzero(newest(np.ascontiguousarray(every_record["key"]), sequences))
    keep = keep[np.argsort(sequences[keep], kind="stable")]
    return every_slot[keep], choose(every_record, keep), np.concatenate(used), last_sequence
