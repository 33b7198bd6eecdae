"""Promotions: moves of blocks from lower tiers to host slots, for gets."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.radix import Match, RadixTree
from flexkv.cache.lower_tier import LowerTier
from flexkv.cache.plan import GetPlan, Join, Move
from flexkv.cache.tier import HOST, Tier


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A promotion under way, the time when it began, and the gets that wait for it."""

    move: Move
    began: float
    readers: dict[GetPlan, None] = field(default_factory=dict)


class Promotions:
    """Promotions under way, by host slot. The caller must hold the engine's lock.

    Parameters
    ----------
    num_slots : int
        Slots of the host tier.
    host : Tier
    lower : sequence of LowerTier
    """

    def __init__(self, num_slots: int, host: Tier, lower: Sequence[LowerTier]) -> None:
        self._host, self._lower = host, lower
        # 0: no promotion. The last place is always 0, for the index -1 (no slot).
        self._move_of = np.zeros(num_slots + 1, dtype=np.int64)
        self._index_of = np.zeros(num_slots, dtype=np.int32)
        self._ids = itertools.count(1)
        self._num_from: dict[int, int] = {}             # blocks under way from each tier
        self._last_read: dict[int, float] = {}           # time when the last blocks from each tier came
        self._under_way: dict[int, _UnderWay] = {}

    def begin(
        self, tree: RadixTree, keys: NDArray[np.uint64], match: Match, slots: NDArray[np.int32],
        slow: NDArray[np.intp], tenant: int, now: float,
    ) -> tuple[int, tuple[Move, ...]]:
        """Plan promotions of the blocks at positions ``slow`` ((k,) intp) that have no host slot: allocates host slots,
        and enters them in ``slots`` ((num_ready,) int32; -1: no slot).

        Returns the position of the first block without a slot (``match.num_ready`` if there is none), and one move for
        each lower tier that has blocks to read.
        """
        wanted = slow[slots[slow] < 0]
        taken = self._host.take(tree, len(wanted), tenant, now)
        stop = int(wanted[len(taken)]) if len(taken) < len(wanted) else match.num_ready
        wanted = wanted[: len(taken)]
        moves: list[Move] = []
        for tier in self._lower:
            mine = match.tiers[wanted] == tier.number
            if not mine.any():
                continue
            last = wanted[mine][-1] + 1
            move = Move(
                keys[:last], wanted[mine].astype(np.int32), tree, tier.number, HOST, match.slots[wanted[mine]],
                taken[mine], next(self._ids),
            )
            if _place(move, self._host, tier, now):
                slots[move.blocks] = move.dst
                self.add(move, now)
                tier.begin_read(move)
                moves.append(move)
            else:                                  # its blocks, and what follows them, cannot be loaded
                stop = min(stop, int(move.blocks[0]))
        return stop, tuple(moves)

    def add(self, move: Move, now: float) -> None:
        """Record a promotion that begins at ``now`` (seconds on the engine's clock)."""
        self._under_way[move.move_id] = _UnderWay(move, now)
        self._move_of[move.dst] = move.move_id
        self._index_of[move.dst] = np.arange(len(move))
        self._num_from[move.source] = self.num_blocks_from(move.source) + len(move)

    def end(self, move: Move, ok: NDArray[np.bool_], lost: NDArray[np.bool_] | None, now: float) -> None:
        """End a promotion; see ``GlobalCacheEngine.end_move``. A second result is refused."""
        if self._host.stale.has_ended(move.filled, move.dst, "promotion"):
            return
        if move.is_abandoned:
            move.filled = None
            self._host.release(move)
        else:
            self._remove(move, now)
            ok = ok & ~self._lower[move.source - 1].altered(move)
            self._host.end_writing(move, ok)
        self._lower[move.source - 1].end_read(move, int(ok.sum()), ~ok if lost is None else lost)
        move.tree.release(move.keys, int(move.blocks[0]), len(move.keys))

    def abandon_overdue(self, now: float, progressed: Collection[int] = ()) -> None:
        """Evict the blocks of promotions that hang (``TierService.read_deadline_s``) from both tiers, so that they can
        be saved again. The slots stay in limbo until the promotion has ended, and on the host until the gets that have
        joined it have ended too. ``progressed``: tiers from which a block was read since the last call."""
        self._last_read |= dict.fromkeys(progressed, now)
        for move in self._overdue(now):
            move.is_abandoned = True
            readers = self._remove(move, now)
            move.tree.drop(move.keys, move.by_position(move.dst), HOST, failed=True)
            self._host.limbo.hold(move.dst, [move, *readers])
            self._lower[move.source - 1].drop(move, np.ones(len(move), dtype=np.bool_))

    def _remove(self, move: Move, now: float) -> list[GetPlan]:
        """Remove a promotion; returns the gets that have joined it and not ended."""
        self._last_read[move.source] = now
        self._move_of[move.dst] = 0
        self._num_from[move.source] -= len(move)
        return list(self._under_way.pop(move.move_id).readers)

    def _overdue(self, now: float) -> list[Move]:
        late = []
        for each in self._under_way.values():
            service = self._lower[each.move.source - 1].service
            began = max(each.began, self._last_read.get(each.move.source, -math.inf))
            if service is not None and now - began > service.read_deadline_s:
                late.append(each.move)
        return late

    def join(self, plan: GetPlan) -> None:
        """Record that a get reads the slots of the promotions that it joins, until ``leave``."""
        for join in plan.joins:
            self._under_way[join.move_id].readers[plan] = None

    def leave(self, plan: GetPlan) -> None:
        """Record that a get has ended, and reads no slot any more."""
        for join in plan.joins:
            if join.move_id in self._under_way:
                self._under_way[join.move_id].readers.pop(plan, None)
        self._host.release(plan)

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
    tier.plan_read(move)
    return True
