"""Record of the loads that have succeeded, for puts that depend on a load and are launched after its end."""

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

    def has(self, task_id: int, epoch: int) -> bool:
        """Whether a load is recorded for this epoch. False does not mean that it failed: old records are dropped."""
        return self._epochs.get(task_id) == epoch

    def clear(self) -> None:
        """Drop all records."""
        self._epochs.clear()
