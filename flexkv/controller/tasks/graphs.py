"""Graphs of tasks: the ops that move the blocks of one get or put."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import GetPlan, PutPlan
from flexkv.controller.tasks.task import KVTask
from flexkv.protocol.ring import OpKind
from flexkv.transfer.graph import Dependency, TransferGraph, TransferOp


def graph_of(
    task: KVTask, pages: NDArray[np.int32], dp_client_id: int, fence: int, layerwise: bool, counter: int,
    after: Sequence[TransferOp],
) -> TransferGraph:
    """Move the task's blocks between their slots and ``pages`` ((m,) int32), once all of ``after`` have succeeded. The
    last op has a result for every block."""
    ops, needs = [], task.needs
    if task.plan is not None and task.plan.direct is not None:
        where = np.searchsorted(task.blocks, task.plan.direct.blocks)
        ops.append(_direct_op(task.plan, pages[where], fence, after))
        needs = (*needs, Dependency(ops[0], where, np.arange(len(where))))
        if task.loading and task.cache is not None:
            task.cache.begin_direct_get()
    ops.append(TransferOp(
        OpKind.H2D if task.loading else OpKind.D2H,
        src=task.slots if task.loading else pages,
        dst=pages if task.loading else task.slots,
        dp_client_id=dp_client_id,
        fence=fence,
        layerwise=layerwise and task.loading,
        counter=counter if task.loading else 0,
        depends_on=needs,
        after=after,
    ))
    return TransferGraph(task.task_id, ops)


def arrival_of(task: KVTask) -> TransferGraph:
    """Wait until the task's blocks are in host memory."""
    return TransferGraph(task.task_id, [TransferOp(OpKind.ARRIVAL, task.slots, task.slots, depends_on=task.needs)])


def _direct_op(
    plan: GetPlan | PutPlan, pages: NDArray[np.int32], fence: int, after: Sequence[TransferOp]
) -> TransferOp:
    """Moves the blocks of the ``direct`` of a plan, which has one, between SSD and ``pages`` ((m,) int32)."""
    direct = plan.direct
    assert direct is not None                    # narrowing
    keys = direct.keys[direct.blocks]
    if isinstance(plan, GetPlan):
        return TransferOp(OpKind.DISK2D, direct.ssd_slots, pages, fence=fence, after=after, keys=keys)
    return TransferOp(
        OpKind.D2DISK, pages, direct.ssd_slots, fence=fence, after=after, keys=keys, parents=direct.parents
    )
