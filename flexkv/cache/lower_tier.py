"""A tier below host memory, as the index sees it."""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree
from flexkv._core.index.slots import SlotAllocator
from flexkv.cache.admission.cost_model import CostModel
from flexkv.cache.plan import Move
from flexkv.cache.quotas import Quotas
from flexkv.cache.tier import HOST, MakePolicy, Tier
from flexkv.errors import CapacityError
from flexkv.storage.store import Slots, differ

logger = logging.getLogger("flexkv.cache")


def _never() -> bool:
    return False


def _unknown(slots: NDArray[np.int32]) -> NDArray[np.uint64]:
    return np.zeros(len(slots), dtype=np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class TierService:
    """Functions and objects that a lower tier needs to be in service.

    Attributes
    ----------
    slots : Slots
    cost : CostModel
        Cost model of reads from the tier.
    usable : callable
        ``usable()``: whether blocks can be read and written now.
    usable_slots : callable
        ``usable_slots(slots)``: (n,) bool, whether each of these slots ((n,) int32) can be read and written now. Called
        only while ``usable()``.
    read_deadline_s : float
        Seconds after which a read is abandoned, if no block was read from the tier in that time. Infinite: never.
    loads_directly : callable
        ``loads_directly()``: whether gets read blocks that are on this tier alone straight into the engine's pages.
    checksums : callable
        ``checksums(slots)``: (n,) uint64, as ``Store.checksums``; 0: unknown. Must not wait.
    saves_directly : callable
        ``saves_directly()``: whether puts for which there are too few host slots write straight to this tier.
    """

    slots: Slots
    cost: CostModel
    usable: Callable[[], bool]
    usable_slots: Callable[[NDArray[np.int32]], NDArray[np.bool_]]
    read_deadline_s: float = math.inf
    loads_directly: Callable[[], bool] = _never
    saves_directly: Callable[[], bool] = _never
    checksums: Callable[[NDArray[np.int32]], NDArray[np.uint64]] = _unknown


class LowerTier(Tier):
    """A tier below host memory. It has no slots until its service is attached. The caller must hold the engine's lock.

    Parameters
    ----------
    number, capacity, make_policy, quotas, start_threshold, ratio
        As in ``Tier``.
    name : str
        Prefix of its statistics.
    """

    def __init__(
        self, number: int, name: str, capacity: int, make_policy: MakePolicy, quotas: Quotas, start_threshold: float,
        ratio: float,
    ) -> None:
        super().__init__(number, SlotAllocator(0), capacity, make_policy, quotas, start_threshold, ratio)
        self.name = name
        self.service: TierService | None = None
        self._reads: set[Move] = set()

    def attach(self, service: TierService) -> None:
        """Put the tier into service."""
        self.service, self.slots = service, service.slots

    def recover(
        self, tree: RadixTree, keys: NDArray[np.uint64], slots: NDArray[np.int32], now: float
    ) -> None:
        """Enter a sequence that the tier holds into the index: ``keys`` (n, 2) uint64, ``slots`` (n,) int32 (-1: the
        block was in an earlier sequence). The sequence is skipped, and its slots are freed, if blocks before it are
        absent or the index has no room for it."""
        fits = not (slots[tree.absent(keys)] < 0).any()
        if fits:
            with suppress(CapacityError):
                tree.insert(keys, slots, self.number, now)
            fits = tree.set_ready(keys, slots, self.number) > 0 or not (slots >= 0).any()
        there = slots[slots >= 0]
        if not fits:
            self.slots.free(there)
        elif self.service is not None:
            self.set_checksums(there, self.service.checksums(there))

    @property
    def is_usable(self) -> bool:
        """Whether blocks can be read and written now."""
        return self.service is not None and self.service.usable()

    @property
    def loads_directly(self) -> bool:
        """As in ``TierService``."""
        return self.service is not None and self.service.loads_directly()

    @property
    def saves_directly(self) -> bool:
        """As in ``TierService``."""
        return self.service is not None and self.service.saves_directly()

    def in_service(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether the block of each slot ((n,) int32; -1: no slot) can be read now."""
        there = slots >= 0
        if self.service is None or not there.any() or not self.service.usable():
            return np.zeros(len(slots), dtype=np.bool_)
        there[there] = self.service.usable_slots(slots[there])
        return there

    def has_whole(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether the block in each slot ((n,) int32; -1: no slot) can be read now, and the index has its
        checksum, which shows that it was written completely."""
        return np.asarray(self.in_service(slots) & (self.checksums[np.maximum(slots, 0)] != 0))

    def _checksums_of(self, move: Move) -> NDArray[np.uint64]:
        return self.service.checksums(move.dst) if self.service is not None else super()._checksums_of(move)

    def differing(self, move: Move) -> NDArray[np.bool_]:
        """(m,) bool: blocks of a write-back of which this tier's store has computed another checksum than the source
        had. False where a checksum is unknown or the slot was freed meanwhile."""
        differs = differ(self._checksums_of(move), move.checksums)
        if move.filled is None:                        # the move has ended
            return np.zeros_like(differs)
        freed = self.slots.changed(move.dst, move.filled)
        return differs if freed is None else differs & ~freed

    def altered(self, move: Move) -> NDArray[np.bool_]:
        """(m,) bool: blocks of a move from this tier of which the store has another checksum than the index. False
        where a checksum is unknown, and after ``end_read``."""
        if self.service is None or move.read is None:
            return np.zeros(len(move), dtype=np.bool_)
        return differ(self.service.checksums(move.src), move.checksums)

    def plan_read(self, move: Move) -> None:
        """Record that a move from this tier was planned. The slots of its blocks are not reused before ``end_read``,
        even if the blocks are dropped meanwhile."""
        move.read = self.slots.generations(move.src)
        move.checksums = self.checksums[move.src]
        self._reads.add(move)

    def begin_read(self, move: Move) -> None:
        """Record that the reads of a move have begun, for the cost model."""
        if self.service is not None:
            move.is_reading = True
            self.service.cost.read_began()

    def end_read(self, move: Move, num_read: int, lost: NDArray[np.bool_]) -> None:
        """End a move, of which ``num_read`` blocks were read: ``lost`` blocks ((m,) bool) and altered blocks become
        absent on the tier, except blocks that another read dropped already."""
        if self.service is not None and move.is_reading:
            move.is_reading = False
            self.service.cost.read_ended(num_read)
        self._reads.discard(move)
        if move.read is not None:                      # else the move has ended
            if (altered := self.altered(move)).any():
                self.num_altered += int(altered.sum())
                logger.error("%d blocks of tier %d are not those that were written there", altered.sum(), self.number)
            self.drop(move, lost | altered)
            move.read = None
        self.release(move)

    def drop(self, move: Move, lost: NDArray[np.bool_]) -> None:
        """Make ``lost`` blocks ((m,) bool) of a move from this tier absent on it. Their slots are freed once no planned
        read concerns them."""
        if move.read is None:
            return
        held = np.asarray(move.tree.slots(move.keys, self.number))[move.blocks] == move.src
        freed = self.slots.changed(move.src, move.read)
        lost = lost & held if freed is None else lost & held & ~freed
        if not lost.any():
            return
        move.tree.drop(move.keys, move.by_position(move.src, lost), self.number, failed=True)
        slots = move.src[lost]
        is_read = np.zeros(len(slots), dtype=np.bool_)
        for other in self._reads:
            if (shared := np.isin(slots, other.src)).any():
                self.limbo.hold(slots[shared], [other])
                is_read |= shared
        self.slots.free(slots[~is_read])


def can_be_read(
    lower: list[LowerTier], slots: NDArray[np.int32], tiers: NDArray[np.int8]
) -> NDArray[np.bool_]:
    """(n,) bool: blocks on lower tiers that can be read now. Block i is in ``slots[i]`` ((n,) int32) of tier
    ``tiers[i]`` ((n,) int8; False for HOST)."""
    able = np.zeros(len(slots), dtype=np.bool_)
    for tier in lower:
        if (mine := tiers == tier.number).any():
            able[mine] = tier.in_service(slots[mine])
    return able


def absent_blocks(tree: RadixTree, lower: list[LowerTier], keys: NDArray[np.uint64]) -> NDArray[np.int32]:
    """(k,) int32, ascending: positions of the blocks of a sequence that a put must save to make them available. A block
    that only a tier out of service has is absent: it can be put again."""
    if all(tier.service is None for tier in lower):
        return tree.absent(keys)
    there = np.asarray(tree.slots(keys, HOST) >= 0)
    for tier in lower:
        there |= tier.in_service(tree.slots(keys, tier.number))
    return np.flatnonzero(~there).astype(np.int32)
