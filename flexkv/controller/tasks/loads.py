"""Record of the loads that have succeeded, for puts that depend on a load and are launched after its end."""

from collections.abc import Mapping, Sequence

from flexkv.controller.tasks.task import KVTask
from flexkv.transfer.graph import TransferOp

_MAX_LOADS = 16384
"""The oldest loads are forgotten beyond this number: that of many more requests than have saves ahead of them."""


class GoodLoads:
    """Ids of loads of which every block has arrived, each with the epoch in which it was planned. The caller must
    serialize calls."""

    def __init__(self) -> None:
        self._epochs: dict[int, int] = {}         # in the order in which they ended

    def add(self, task_id: int, epoch: int) -> None:
        """Record that a load has succeeded; ``epoch``: epoch of the index in which it was planned."""
        self._epochs[task_id] = epoch
        if len(self._epochs) > _MAX_LOADS:
            del self._epochs[next(iter(self._epochs))]

    def needed(
        self, put: KVTask, after: Sequence[int], tasks: Mapping[int, object]
    ) -> tuple[list[TransferOp], bool]:
        """Ops of those loads in ``after`` that run (in ``tasks``); False if another one is not known to have succeeded,
        in the epoch of ``put``."""
        ops, are_good = [], True
        for task_id in after:
            load = tasks.get(task_id)
            if isinstance(load, KVTask) and load.loading and load.graph is not None and load.epoch == put.epoch:
                ops.append(load.graph.ops[-1])
            elif self._epochs.get(task_id) != put.epoch:
                are_good = False
        return ops, are_good

    def clear(self) -> None:
        """Drop all records."""
        self._epochs.clear()
