"""What a store found when it started."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv._core.io.chains import LeafPaths, leaf_paths, newest
from flexkv.storage.ssd.directory import SsdDirectory
from flexkv.storage.ssd.slot_table import choose

logger = logging.getLogger("flexkv.storage")


@dataclass(frozen=True)
class Recovered:
    """Blocks on disk, the oldest first. Their slots are in use; who does not want a block frees its slot.

    Attributes
    ----------
    keys, parents : (n, 2) uint64
        A parent of zeros: the first block of a sequence.
    slots : (n,) int32
    """

    keys: NDArray[np.uint64]
    parents: NDArray[np.uint64]
    slots: NDArray[np.int32]
    _paths: LeafPaths = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_paths", leaf_paths(self.keys, self.parents))

    def __len__(self) -> int:
        return len(self.slots)

    def paths(self) -> Iterator[NDArray[np.intp]]:
        """Indices of the blocks of each sequence, from its first block to a last one, those that ended longest ago
        first. A block that several sequences share is in the paths of all of them."""
        return iter(self._paths)

    @property
    def cut_off(self) -> NDArray[np.intp]:
        """Indices of blocks that no path leads to, because one before them is gone: no prompt can reach them."""
        return self._paths.cut_off


def newest_records(
    directories: Sequence[SsdDirectory], domain: int, floor: int
) -> tuple[NDArray[np.int32], NDArray[np.void], NDArray[np.int32], int]:
    """Read the tables of all directories.

    Returns
    -------
    slots : (n,) int32
        Of the newest record of each key of the domain, the oldest first.
    records : (n,) RECORD
    used : (m,) int32
        Slots whose record may not be empty, whatever it is.
    last_sequence : int
        The highest of any record, of other domains too.
    """
    slots, records, used, last_sequence = [], [], [], 0
    for directory in directories:
        scan = directory.table.scan(domain, floor)
        logger.info("%s: %s", directory.path, ", ".join(f"{n} {what}" for what, n in scan.states.items() if n))
        slots.append(scan.slots + np.int32(directory.first_slot))
        records.append(scan.records)
        used.append(scan.used + np.int32(directory.first_slot))
        last_sequence = max(last_sequence, scan.last_sequence)
    every_slot, every_record = np.concatenate(slots), np.concatenate(records)
    sequences = np.ascontiguousarray(every_record["sequence"])
    keep = np.flatnonzero(newest(np.ascontiguousarray(every_record["key"]), sequences))
    keep = keep[np.argsort(sequences[keep], kind="stable")]
    return every_slot[keep], choose(every_record, keep), np.concatenate(used), last_sequence
