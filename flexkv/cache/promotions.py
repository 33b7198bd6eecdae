"""Promotions: moves of blocks from lower tiers to host slots, for gets."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.lower_tier import LowerTier
from flexkv.cache.plan import Join, Move
from flexkv.cache.tier import HOST, Tier


class Promotions:
    """Promotions under way, by host slot. The caller must hold the engine's lock.

    Parameters
    ----------
    num_slots : int
        Slots of the host tier.
    """

    def __init__(self, num_slots: int) -> None:
        # 0: no promotion. The last place is always 0, for the index -1 (no slot).
        self._move_of = np.zeros(num_slots + 1, dtype=np.int64)
        self._index_of = np.zeros(num_slots, dtype=np.int32)
        self._ids = itertools.count(1)
        self._num_from: dict[int, int] = {}             # blocks under way from each tier

    def begin(
        self, tree: RadixTree, host: Tier, lower: Sequence[LowerTier], keys: NDArray[np.uint64], match: Match,
        slots: NDArray[np.int32], slow: NDArray[np.intp], tenant: int, now: float,
    ) -> tuple[int, tuple[Move, ...]]:
        """Allocate host slots, entered in ``slots``, for the blocks at positions ``slow`` that have none.

        Returns the position of the first block without a slot (``match.num_ready`` if there is none), and one move for
        each lower tier that has blocks to read.
        """
        wanted = slow[slots[slow] < 0]
        taken = host.take(tree, len(wanted), tenant, now)
        stop = int(wanted[len(taken)]) if len(taken) < len(wanted) else match.num_ready
        wanted = wanted[: len(taken)]
        moves: list[Move] = []
        for tier in lower:
            mine = match.tiers[wanted] == tier.number
            if not mine.any():
                continue
            last = wanted[mine][-1] + 1
            move = Move(
                keys[:last], wanted[mine].astype(np.int32), tree, tier.number, HOST, match.slots[wanted[mine]],
                taken[mine], next(self._ids),
            )
            if _place(move, host, tier, now):
                slots[move.blocks] = move.dst
                self.add(move)
                tier.begin_read(move)
                moves.append(move)
            else:                                  # its blocks, and what follows them, cannot be loaded
                stop = min(stop, int(move.blocks[0]))
        return stop, tuple(moves)

    def add(self, move: Move) -> None:
        """Enter a promotion that begins."""
        self._move_of[move.dst] = move.move_id
        self._index_of[move.dst] = np.arange(len(move))
        self._num_from[move.source] = self.num_blocks_from(move.source) + len(move)

    def remove(self, move: Move) -> None:
        """Remove a promotion that has ended."""
        self._move_of[move.dst] = 0
        self._num_from[move.source] -= len(move)

    def num_blocks_from(self, tier: int) -> int:
        """Number of blocks that promotions are reading from a tier."""
        return self._num_from.get(tier, 0)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that promotions are reading."""
        return sum(self._num_from.values())

    def filling(self, host_slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(n,) bool: whether a promotion fills each of these slots ((n,) int32; -1: no slot)."""
        return np.asarray(self._move_of[host_slots] > 0)

    def joins(self, host_slots: NDArray[np.int32]) -> tuple[Join, ...]:
        """Promotions that a reader of these slots ((n,) int32; -1: no slot) must wait for."""
        moves = self._move_of[host_slots]
        joins = []
        for move_id in np.unique(moves[moves > 0]).tolist():
            mine = np.flatnonzero(moves == move_id)
            joins.append(Join(move_id, mine, self._index_of[host_slots[mine]].astype(np.intp)))
        return tuple(joins)


def _place(move: Move, host: Tier, tier: LowerTier, now: float) -> bool:
    """Enter a promotion into the index and acquire its blocks. False: the index is full, and its slots are free."""
    if not host.place(move, now):
        return False
    try:
        move.tree.acquire(move.keys, int(move.blocks[0]), len(move.keys))
    except MemoryError:                            # CapacityError is one
        host.displace(move)
        return False
    move.read = tier.slots.generations(move.src)
    return True
