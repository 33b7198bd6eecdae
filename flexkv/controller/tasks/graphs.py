"""Graphs of tasks: the ops that move the blocks of one get or put."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import DEVICE, Move
from flexkv.controller.tasks.task import KVTask, direct_moves
from flexkv.protocol.ring import IN_PLACE, OpKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp


def graph_of(
    task: KVTask, pages: NDArray[np.int32], dp_client_id: int, fence: int, layerwise: bool, counter: int,
    after: Sequence[TransferOp], transfer: TransferEngine,
) -> TransferGraph:
    """Make the graph that moves the blocks of a task between their slots and the engine's pages.

    The direct moves of the task's plan are the first ops, in the order of ``direct_moves``. The last op has a result
    for every block of the task.

    Parameters
    ----------
    task : KVTask
    pages : (m,) int32
        Page of each block of the task.
    dp_client_id, fence, layerwise, counter
        As in ``TransferOp``. ``layerwise`` and ``counter`` have no effect on a save.
    after : sequence of TransferOp
        Loads that must succeed before any block starts.
    transfer : TransferEngine
        Decides whether the ranks load in an exchange: each reads a part of the copies, and then the other parts from
        its peers. Loads layer by layer, and those with blocks straight from a lower tier, are no exchanges.
    """
    ops, needs, slots = [], task.needs, task.slots
    for move in direct_moves(task.plan):
        where = np.searchsorted(task.blocks, move.blocks)
        ops.append(_direct_op(move, pages[where], fence, after))
        needs = (*needs, Dependency(ops[-1], where, np.arange(len(where))))
        slots = slots.copy() if len(ops) == 1 else slots
        slots[where] = IN_PLACE
        if task.loading and task.cache is not None:
            task.cache.begin_read(move)
    kind, exchange = OpKind.H2D if task.loading else OpKind.D2H, 0
    if task.loading and not ops and not layerwise and not counter:
        exchange = transfer.exchange_of(dp_client_id, len(task.blocks))
    if exchange:
        ops.append(TransferOp(
            OpKind.H2D, slots, pages, dp_client_id, fence, depends_on=needs, after=after, exchange=exchange
        ))
        kind, needs = OpKind.P2D, (Dependency.each(ops[-1]),)
    ops.append(TransferOp(
        kind,
        src=slots if task.loading else pages,
        dst=pages if task.loading else slots,
        dp_client_id=dp_client_id,
        fence=fence,
        layerwise=layerwise and task.loading,
        counter=counter if task.loading else 0,
        depends_on=needs,
        after=after,
        exchange=exchange,
    ))
    return TransferGraph(task.task_id, ops)


def arrival_of(task: KVTask) -> TransferGraph:
    """Make the graph of a prefetch: each block completes when the move that brings it to its host slot has ended."""
    return TransferGraph(task.task_id, [TransferOp(OpKind.ARRIVAL, task.slots, task.slots, depends_on=task.needs)])


def _direct_op(move: Move, pages: NDArray[np.int32], fence: int, after: Sequence[TransferOp]) -> TransferOp:
    """Moves blocks between a lower tier and ``pages`` ((m,) int32)."""
    keys = move.keys[move.blocks]
    if move.target == DEVICE:
        return TransferOp(
            OpKind.STORE2D, move.src, pages, fence=fence, after=after, keys=keys, tier=move.source,
            checksums=move.checksums,
        )
    return TransferOp(
        OpKind.D2STORE, pages, move.dst, fence=fence, after=after, keys=keys, parents=move.parents, tier=move.target
    )
