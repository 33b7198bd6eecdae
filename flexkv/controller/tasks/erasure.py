"""Erasure of slots on lower tiers after a put that did not succeed, before the slots are freed."""

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.protocol.ring import OpKind
from flexkv.transfer.engine import TransferEngine
from flexkv.transfer.graph import TransferGraph, TransferOp

logger = logging.getLogger("flexkv.controller")


def erase(
    transfer: TransferEngine, task_id: int, tier: int, slots: NDArray[np.int32], then: Callable[[], None]
) -> None:
    """Erase slots of a lower tier, so that a restart does not offer their blocks. Returns at once; never raises.

    Parameters
    ----------
    transfer : TransferEngine
    task_id : int
        Task or write-back that wrote to the slots, for the log.
    tier : int
        Number of the lower tier.
    slots : (n,) int32
    then : callable
        Called once after the erasure, also if it failed; a failure is logged.
    """

    def erased(graph: TransferGraph) -> None:
        if failed := int((~graph.ops[0].ok).sum()):
            logger.error(
                "task %d did not succeed, and %d of its blocks could not be erased: a restart may offer them",
                task_id, failed,
            )
        then()

    graph = TransferGraph(next(transfer.task_ids), [TransferOp(OpKind.ERASE, slots, slots, tier=tier)])
    try:
        transfer.submit(graph, erased)
    except Exception:
        logger.exception("task %d: %d blocks cannot be erased on a lower tier", task_id, len(slots))
        then()
