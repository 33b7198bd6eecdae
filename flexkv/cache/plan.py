"""Plans: the blocks that one get, put, fetch or write-back moves. ``GlobalCacheEngine`` makes them, the data plane
executes them.

Users of a plan must not change it. The dataclasses are not frozen, because each request makes several plans and a
frozen one takes four times as long to make.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import RadixTree, by_position
from flexkv.cache.reasons import MissReason

IN_PLACE = -2
"""Number in place of a host slot for a block that is moved directly between SSD and GPU (FLEXKV_IN_PLACE of
csrc/agent.h)."""


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Result of a match.

    Attributes
    ----------
    num_ready : int
        Leading blocks that are available.
    reason : MissReason
        Why the match ends after these blocks.
    num_to_fetch : int
        Number of these blocks that must be read from SSD first.
    evicted_at : float
        Time at which the first missing block was evicted, in seconds of ``time.monotonic``; nan: not evicted, or
        unknown.
    """

    num_ready: int
    reason: MissReason
    num_to_fetch: int = 0
    evicted_at: float = math.nan


Generations = NDArray[np.uint32] | None
"""Generations of a plan's slots at the time of the plan. A result for slots of another generation is refused."""

NO_MATCH = MatchResult(0, MissReason.NEVER_SEEN)
"""The result of a match before the index exists."""


@dataclass(slots=True, eq=False)
class BlocksOfSequence:
    """Some blocks of a sequence.

    Attributes
    ----------
    keys : (n, 2) uint64
        Keys of the sequence up to the last of these blocks.
    blocks : (m,) int32
        Positions of the blocks in the sequence, ascending.
    tree : RadixTree
        Index from which the plan was made; a reset replaces the engine's index, not the plan's.
    filled : (m,) uint32 or None
        Generations of the slots that the plan writes; None: it writes none, or has ended.
    read : (m,) uint32 or None
        Generations of the slots that the plan reads; None: it reads none, or has ended.
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
        """(m, 2) uint64: key of the block before each block; zeros for the first block of a sequence."""
        parents: NDArray[np.uint64] = self.keys[self.blocks - 1]
        parents[self.blocks == 0] = 0
        return parents

    def by_position(
        self, slots: NDArray[np.int32], chosen: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int32]:
        """(n,) int32: the slots ((m,) int32) of the ``chosen`` blocks at their positions, -1 elsewhere, as the index
        expects them."""
        return by_position(len(self.keys), self.blocks, slots, chosen)


@dataclass(slots=True, eq=False)
class DirectPlan(BlocksOfSequence):
    """Blocks that are moved directly between SSD and GPU, and have no host slot.

    Until ``end_direct_get``, the blocks of a get are ready on SSD; the get has acquired them. Until ``end_put``, the
    blocks of a put are in state writing there.

    Attributes
    ----------
    ssd_slots : (m,) int32
    """

    ssd_slots: NDArray[np.int32]


@dataclass(slots=True, eq=False)
class PutPlan(BlocksOfSequence):
    """Blocks that have a host slot each, in state writing, until ``end_put``. If there are no such blocks, ``keys`` are
    the keys up to the last block that was cached already.

    Attributes
    ----------
    slots : (m,) int32
        Host slots of the blocks.
    num_known : int
        Leading blocks of the put that were cached already: the sequence continues an earlier one.
    came_back : bool
        The first absent block was seen earlier and is absent for a reason in ``CAME_BACK``, such as eviction.
    direct : DirectPlan or None
        Further blocks, which got SSD slots because there were too few host slots.
    """

    slots: NDArray[np.int32]
    num_known: int = 0
    came_back: bool = False
    direct: DirectPlan | None = None

    @property
    def all_keys(self) -> NDArray[np.uint64]:
        """Keys of the sequence up to the last of ``all_blocks``."""
        return self.keys if self.direct is None else max(self.keys, self.direct.keys, key=len)

    @property
    def all_blocks(self) -> NDArray[np.int32]:
        """Positions of the blocks of this plan and of ``direct``, ascending."""
        return self.blocks if self.direct is None else np.union1d(self.blocks, self.direct.blocks)

    def where(self, part: BlocksOfSequence) -> NDArray[np.intp] | slice:
        """Indices in ``all_blocks`` of the blocks of ``part``: this plan, or its ``direct``."""
        return slice(None) if self.direct is None else np.searchsorted(self.all_blocks, part.blocks)

    @property
    def all_slots(self) -> NDArray[np.int32]:
        """Host slot of each of ``all_blocks``; IN_PLACE for blocks of ``direct``."""
        if self.direct is None:
            return self.slots
        slots = np.full(len(self.all_blocks), IN_PLACE, dtype=np.int32)
        slots[self.where(self)] = self.slots
        return slots


@dataclass(slots=True, eq=False)
class FetchPlan(BlocksOfSequence):
    """Blocks that are read from SSD into host slots, where they are in state writing until ``end_fetch``. The plan has
    acquired them, so that they keep their SSD slots.

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
    """Blocks that are written from host slots to SSD slots, where they are in state writing until ``end_write``. The
    plan has acquired them, so that they keep their host slots.

    Attributes
    ----------
    host_slots, ssd_slots : (m,) int32
    """

    host_slots: NDArray[np.int32]
    ssd_slots: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Blocks of a get that a fetch reads from SSD.

    Attributes
    ----------
    fetch_id : int
    mine : (k,) intp
        Indices of these blocks in the get, counted from its ``start``.
    theirs : (k,) intp
        Indices of these blocks in the fetch.
    """

    fetch_id: int
    mine: NDArray[np.intp]
    theirs: NDArray[np.intp]


@dataclass(slots=True, eq=False)
class GetPlan:
    """Blocks ``[start, stop)`` of a sequence, acquired until ``end_get``.

    Attributes
    ----------
    keys : (stop, 2) uint64
    slots : (stop - start,) int32
        Host slot of each block; IN_PLACE for blocks of ``direct``.
    reason : MissReason
        Why the plan ends at ``stop``.
    tree : RadixTree
        As in ``BlocksOfSequence``.
    fetch : FetchPlan or None
        Blocks that must be read from SSD for this plan and that no earlier fetch reads. The caller must start it.
    joins : tuple of Join
        Blocks whose host slot is filled by a fetch: ``fetch``, or one of an earlier plan.
    evicted_at : float
        As in ``MatchResult``.
    direct : DirectPlan or None
        Blocks that are read directly from SSD into the GPU.
    read : (stop - start,) uint32 or None
        Generations of ``slots``; None: the plan has ended.
    """

    keys: NDArray[np.uint64]
    start: int
    stop: int
    slots: NDArray[np.int32]
    reason: MissReason
    tree: RadixTree
    fetch: FetchPlan | None = None
    joins: tuple[Join, ...] = ()
    evicted_at: float = math.nan
    direct: DirectPlan | None = None
    read: Generations = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def match(self) -> MatchResult:
        """The plan's range and reason as the result of a match."""
        num_to_fetch = len(self.fetch) if self.fetch is not None else 0
        num_to_fetch += len(self.direct) if self.direct is not None else 0
        return MatchResult(self.stop, self.reason, num_to_fetch, self.evicted_at)
