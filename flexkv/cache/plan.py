"""What one get, put, fetch or write-back will move: made by ``GlobalCacheEngine``, carried out by the data plane.

Plans are not to be changed. They are not frozen, since each request makes some, and that takes four times as long.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree, by_position
from flexkv.cache.reasons import StopReason

IN_PLACE = -2
"""In the place of a host slot, as FLEXKV_IN_PLACE of csrc/agent.h: the block goes straight between SSD and the GPU."""


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Answer to "how much of this sequence is here": ``num_ready`` leading blocks, and why no more.

    Attributes
    ----------
    num_to_fetch : int
        How many of them have to be read from SSD first.
    since : float
        Time at which the block after them was evicted, in seconds of ``time.monotonic``; nan: not evicted, or unknown.
    """

    num_ready: int
    reason: StopReason
    num_to_fetch: int = 0
    since: float = math.nan


Generations = NDArray[np.uint32] | None
"""Of the slots of a plan, when it was made; a result for slots of another generation is refused."""

NOTHING = MatchResult(0, StopReason.NEVER_SEEN)
"""Of an index that is not there yet."""


@dataclass(slots=True, eq=False)
class BlocksOfSequence:
    """Some blocks of a sequence.

    Attributes
    ----------
    keys : (n, 2) uint64
        The sequence up to the last of them.
    blocks : (m,) int32
        Their positions, ascending.
    tree : RadixTree
        The index the plan was made from; a reset replaces the engine's index, not the plan's.
    filled : (m,) uint32 or None
        Generations of the slots that it writes; None: it writes none, or has ended.
    read : (m,) uint32 or None
        Generations of the slots that it reads.
    """

    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    tree: RadixTree
    filled: Generations = field(default=None, init=False)
    read: Generations = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def parents(self) -> NDArray[np.uint64]:
        """(m, 2) uint64: key of the block before each; zero for the first of a sequence."""
        parents: NDArray[np.uint64] = self.keys[self.blocks - 1]
        parents[self.blocks == 0] = 0
        return parents

    def by_position(
        self, slots: NDArray[np.int32], chosen: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int32]:
        """(n,) int32: the slot ((m,) int32) at each chosen block's position, -1 elsewhere, as the index wants it."""
        return by_position(len(self.keys), self.blocks, slots, chosen)


@dataclass(slots=True, eq=False)
class DirectPlan(BlocksOfSequence):
    """Blocks that go straight between SSD and the GPU, and have no host slot. Of a get they are ready on SSD and
    pinned with it, of a put in state writing there; until ``end_direct_get`` or ``end_put``.

    Attributes
    ----------
    ssd_slots : (m,) int32
    """

    ssd_slots: NDArray[np.int32]


@dataclass(slots=True, eq=False)
class PutPlan(BlocksOfSequence):
    """Blocks that have a host slot each, in state writing, until ``end_put``. If there are none, ``keys`` are those of
    the blocks that were there already.

    Attributes
    ----------
    slots : (m,) int32
        Their host slots.
    num_known : int
        Leading blocks of what was put that were there already: the sequence goes on from an earlier one.
    came_back : bool
        The first of the blocks was there before, and had to go.
    direct : DirectPlan or None
        Other blocks, since there were not enough host slots for all.
    """

    slots: NDArray[np.int32]
    num_known: int = 0
    came_back: bool = False
    direct: DirectPlan | None = None

    @property
    def all_keys(self) -> NDArray[np.uint64]:
        """The sequence up to the last of ``all_blocks``."""
        return self.keys if self.direct is None else max(self.keys, self.direct.keys, key=len)

    @property
    def all_blocks(self) -> NDArray[np.int32]:
        """Positions of the blocks, and of those of ``direct``, ascending."""
        return self.blocks if self.direct is None else np.union1d(self.blocks, self.direct.blocks)

    def where(self, part: BlocksOfSequence) -> NDArray[np.intp] | slice:
        """Which of ``all_blocks`` are this plan's own, or those of its ``direct``."""
        return slice(None) if self.direct is None else np.searchsorted(self.all_blocks, part.blocks)

    @property
    def all_slots(self) -> NDArray[np.int32]:
        """Host slot of each of ``all_blocks``; IN_PLACE for those of ``direct``."""
        if self.direct is None:
            return self.slots
        slots = np.full(len(self.all_blocks), IN_PLACE, dtype=np.int32)
        slots[self.where(self)] = self.slots
        return slots


@dataclass(slots=True, eq=False)
class FetchPlan(BlocksOfSequence):
    """Blocks that are ready on SSD and on their way to host slots, in state writing there, until ``end_fetch``. The
    SSD slots are pinned.

    Attributes
    ----------
    ssd_slots, host_slots : (m,) int32
    fetch_id : int
    """

    ssd_slots: NDArray[np.int32]
    host_slots: NDArray[np.int32]
    fetch_id: int


@dataclass(slots=True, eq=False)
class WritePlan(BlocksOfSequence):
    """Blocks that are ready in host slots and on their way to SSD slots, in state writing there, until ``end_write``.
    The host slots are pinned.

    Attributes
    ----------
    host_slots, ssd_slots : (m,) int32
    """

    host_slots: NDArray[np.int32]
    ssd_slots: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Blocks of a get that a fetch brings.

    Attributes
    ----------
    fetch_id : int
    mine : (k,) intp
        Which blocks of the get, counted from its ``start``.
    theirs : (k,) intp
        Which blocks of the fetch.
    """

    fetch_id: int
    mine: NDArray[np.intp]
    theirs: NDArray[np.intp]


@dataclass(slots=True, eq=False)
class GetPlan:
    """Blocks ``[start, stop)`` of a sequence, pinned until ``end_get``.

    Attributes
    ----------
    keys : (stop, 2) uint64
    slots : (stop - start,) int32
        Host slot of each block; IN_PLACE for those of ``direct``.
    reason : StopReason
        Why the plan ends at ``stop``.
    tree : RadixTree
        As in ``BlocksOfSequence``.
    fetch : FetchPlan or None
        What has to be read from SSD for it, and nobody reads yet: whoever made the plan starts it.
    joins : tuple of Join
        Blocks whose host slot is filled by a fetch, this one's or another's.
    since : float
        As in ``MatchResult``.
    direct : DirectPlan or None
        Blocks that go straight from SSD to the GPU.
    read : (stop - start,) uint32 or None
        Generations of ``slots``; None: it has ended.
    """

    keys: NDArray[np.uint64]
    start: int
    stop: int
    slots: NDArray[np.int32]
    reason: StopReason
    tree: RadixTree
    fetch: FetchPlan | None = None
    joins: tuple[Join, ...] = ()
    since: float = math.nan
    direct: DirectPlan | None = None
    read: Generations = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def match(self) -> MatchResult:
        """What was found."""
        num_to_fetch = len(self.fetch) if self.fetch is not None else 0
        num_to_fetch += len(self.direct) if self.direct is not None else 0
        return MatchResult(self.stop, self.reason, num_to_fetch, self.since)
