"""Generations of slots as assertions: a result for an earlier use of a slot is refused."""

import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import Generations, GetPlan
from flexkv.errors import InvariantError

logger = logging.getLogger("flexkv.cache")

_LOGGED = 8
"""Refusals of a tier that the log names one by one; the metric counts all."""


class HasGenerations(Protocol):
    """The part of ``Slots`` that is used here."""

    def changed(self, slots: NDArray[np.int32], generations: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
        """(n,) bool: slots that were freed since they had these generations; None if no slot was."""


class StaleResults:
    """Results of a tier that were refused: the slot was freed since its plan was made, or the plan has ended already.

    By design none occurs. One that occurs is a bug, and would otherwise make a block ready whose bytes are another's,
    or free a slot that another block holds. The caller locks.

    Parameters
    ----------
    tier : int

    Attributes
    ----------
    num_blocks : int
    """

    def __init__(self, tier: int) -> None:
        self._tier = tier
        self._num_logged = 0
        self.num_blocks = 0

    def find(
        self, slots: HasGenerations, numbers: NDArray[np.int32], generations: Generations, action: str
    ) -> NDArray[np.bool_] | None:
        """(n,) bool: slots ((n,) int32) whose result must be refused; None if it is good for all.

        ``generations``: when the plan was made; None: the plan has ended. ``action``: for the log.
        """
        if generations is None:
            stale = np.ones(len(numbers), dtype=np.bool_) if len(numbers) else None
        else:
            stale = slots.changed(numbers, generations)
        if stale is not None:
            self.refuse(numbers[stale], action)
        return stale

    def has_ended(self, generations: Generations, numbers: NDArray[np.int32], action: str) -> bool:
        """Whether a plan, of these slots ((n,) int32), has ended already; then this result of it is refused."""
        if generations is not None:
            return False
        self.refuse(numbers, action)
        return True

    def of_read(
        self, slots: HasGenerations, plan: GetPlan, loaded: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_] | None:
        """(n,) bool: blocks that were ``loaded`` ((n,) bool) from slots that were freed meanwhile, which a pinned slot
        never is; None if there are none. The plan ends. A slot whose fetch failed was freed, and is not loaded."""
        if plan.read is None or (stale := slots.changed(plan.slots, plan.read)) is None:
            plan.read = None
            return None
        plan.read = None
        stale = stale & loaded if loaded is not None else np.zeros_like(stale)
        if not stale.any():
            return None
        self.refuse(plan.slots[stale], "read")
        return stale

    def refuse(self, numbers: NDArray[np.int32], action: str) -> None:
        """Count and log results that are refused."""
        self.num_blocks += len(numbers)
        self._num_logged += 1
        if self._num_logged <= _LOGGED:
            error = InvariantError(f"tier {self._tier}: a late {action} of slots {numbers[:4].tolist()}")
            logger.error("%s is refused: they were freed since it was planned", error, stack_info=True)
