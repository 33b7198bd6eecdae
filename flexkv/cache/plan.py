"""Plans: the blocks that one get or put moves, as a list of moves. ``GlobalCacheEngine`` makes them, the data plane
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

DEVICE = -1
"""Place of a move: the pages of the engine. Places from 0 on are tiers; 0 is host memory."""

NO_SLOTS = np.zeros(0, dtype=np.int32)
NO_CHECKSUMS = np.zeros(0, dtype=np.uint64)


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
        Number of these blocks, from ``start`` on, that must be read from a lower tier.
    evicted_at : float
        Time at which the first missing block was evicted, in seconds of ``time.monotonic``; nan: not evicted, or
        unknown.
    """

    num_ready: int
    reason: MissReason
    num_to_fetch: int = 0
    evicted_at: float = math.nan


Generations = NDArray[np.uint32] | None
"""Generations of slots at the time of the plan. A result for slots of another generation is refused."""

NO_MATCH = MatchResult(0, MissReason.NEVER_SEEN)
"""The result of a match before the index exists."""


@dataclass(slots=True, eq=False)
class Move:
    """Blocks of a sequence that are moved from one place to another. A place is the number of a tier, or DEVICE.

    Until the move has ended, its blocks are in state writing on the tier ``target``, and acquired on the tier
    ``source``, so that they keep their slots.

    Attributes
    ----------
    keys : (n, 2) uint64
        Keys of the sequence up to the last of these blocks.
    blocks : (m,) int32
        Positions of the blocks in the sequence, ascending.
    tree : RadixTree
        Index from which the move was planned; a reset replaces the engine's index, not the plan's.
    source, target : int
        Places.
    src, dst : (m,) int32
        Slots on the source and on the target; empty for DEVICE, whose pages the engine gives later.
    checksums : (m,) uint64
        XXH3-64 of each block's bytes on the source, 0 where it is unknown; empty if the source is DEVICE.
    move_id : int
        Number of a move between two tiers; 0 for others.
    is_abandoned : bool
        Its blocks were evicted because it took too long; its slots are in limbo until it has ended.
    is_reading : bool
        The cost model of the source was informed that this read has begun.
    to_erase : (k,) int32
        Slots on the target that must be erased and then reported to ``erased``: they hold altered bytes.
    filled : (m,) uint32 or None
        Generations of ``dst``; None: there are none, or the move has ended.
    read : (m,) uint32 or None
        Generations of ``src``; None: there are none, or the move has ended.
    """

    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    tree: RadixTree
    source: int
    target: int
    src: NDArray[np.int32] = field(default_factory=lambda: NO_SLOTS)
    dst: NDArray[np.int32] = field(default_factory=lambda: NO_SLOTS)
    move_id: int = 0
    is_reading: bool = False
    is_abandoned: bool = False
    checksums: NDArray[np.uint64] = field(default_factory=lambda: NO_CHECKSUMS)
    to_erase: NDArray[np.int32] = field(default_factory=lambda: NO_SLOTS)
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
class PutPlan:
    """A put: moves from DEVICE to tiers, of different blocks.

    Attributes
    ----------
    keys : (n, 2) uint64
        Keys of the sequence up to the last block that is moved; without moves, up to the last that was cached already.
    moves : tuple of Move
        At most one to each tier.
    num_known : int
        Leading blocks of the put that were cached already: the sequence continues an earlier one.
    came_back : bool
        The first absent block was seen earlier and is absent for a reason in ``CAME_BACK``, such as eviction.
    blocks : (m,) int32
        Positions of all blocks that are moved, ascending.
    """

    keys: NDArray[np.uint64]
    moves: tuple[Move, ...]
    num_known: int = 0
    came_back: bool = False
    blocks: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.moves) == 1:
            self.blocks = self.moves[0].blocks
        else:
            self.blocks = np.sort(np.concatenate([NO_SLOTS, *(move.blocks for move in self.moves)]))

    def __len__(self) -> int:
        return len(self.blocks)

    def to(self, tier: int) -> Move | None:
        """The plan's move to a tier; None if there is none."""
        return next((move for move in self.moves if move.target == tier), None)

    def where(self, move: Move) -> NDArray[np.intp] | slice:
        """Indices in ``blocks`` of the blocks of a move, which must be one of ``moves``."""
        return slice(None) if len(self.moves) == 1 else np.searchsorted(self.blocks, move.blocks)

    def slots_on(self, tier: int) -> NDArray[np.int32]:
        """(m,) int32: slot of each block on a tier; -1: it is moved to another tier."""
        if len(self.moves) == 1 and self.moves[0].target == tier:
            return self.moves[0].dst
        slots = np.full(len(self.blocks), -1, dtype=np.int32)
        if (move := self.to(tier)) is not None:
            slots[self.where(move)] = move.dst
        return slots


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Blocks of a get that a move brings to the host.

    Attributes
    ----------
    move_id : int
        ``move_id`` of the move.
    mine : (k,) intp
        Indices of these blocks in the get, counted from its ``start``.
    theirs : (k,) intp
        Indices of these blocks in the move.
    """

    move_id: int
    mine: NDArray[np.intp]
    theirs: NDArray[np.intp]


@dataclass(slots=True, eq=False)
class GetPlan:
    """Blocks ``[start, stop)`` of a sequence, acquired until ``end_get``.

    Attributes
    ----------
    keys : (stop, 2) uint64
    start, stop : int
        Positions in the sequence. The plan is empty if they are equal; ``start`` is then at most the requested start.
    slots : (stop - start,) int32
        Host slot of each block; -1 for blocks that are moved from a lower tier straight to DEVICE.
    reason : MissReason
        Why the plan ends at ``stop``.
    tree : RadixTree
        As in ``Move``.
    moves : tuple of Move
        From lower tiers to the host, which the caller must start, and to DEVICE. Blocks that an earlier plan brings to
        the host are not among them.
    joins : tuple of Join
        Blocks whose host slot is filled by a move: one of ``moves``, or of an earlier plan.
    evicted_at : float
        As in ``MatchResult``.
    read : (stop - start,) uint32 or None
        Generations of ``slots``; None: the plan has ended.
    """

    keys: NDArray[np.uint64]
    start: int
    stop: int
    slots: NDArray[np.int32]
    reason: MissReason
    tree: RadixTree
    moves: tuple[Move, ...] = ()
    joins: tuple[Join, ...] = ()
    evicted_at: float = math.nan
    read: Generations = None

    def __len__(self) -> int:
        return self.stop - self.start

    def to(self, place: int) -> list[Move]:
        """The plan's moves to a place: HOST or DEVICE."""
        return [move for move in self.moves if move.target == place]

    @property
    def match(self) -> MatchResult:
        """The plan's range and reason as the result of a match."""
        return MatchResult(self.stop, self.reason, sum(map(len, self.moves)), self.evicted_at)
