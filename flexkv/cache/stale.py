"""Generations of slots as assertions: a result for an earlier use of a slot is refused."""

import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.cache.plan import Generations, GetPlan
from flexkv.errors import InvariantError

logger = logging.getLogger("flexkv.cache")

_LOGGED = 8
"""Maximum number of refusals of a tier that are logged, each with a stack trace. The metric counts all."""


class HasGenerations(Protocol):
    """The part of ``Slots`` that this module uses."""

    def changed(self, slots: NDArray[np.int32], generations: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
        """(n,) bool: slots that were freed since they had these generations; None if no slot was."""


class StaleResults:
    """Refuses results of a tier whose slots were freed after their plan was made, or whose plan has ended already.

    No such result occurs unless FlexKV has a bug. Accepting it would make a block ready with the bytes of another
    block, or free a slot that another block uses. The caller must hold the engine's lock.

    Parameters
    ----------
    tier : int

    Attributes
    ----------
    num_blocks : int
        Number of blocks whose results were refused.
    """

    def __init__(self, tier: int) -> None:
        self._tier = tier
        self._num_logged = 0
        self.num_blocks = 0

    def find(
        self, slots: HasGenerations, numbers: NDArray[np.int32], generations: Generations, action: str
    ) -> NDArray[np.bool_] | None:
        """(n,) bool: slots ((n,) int32) whose result must be refused; None if all results are valid.

        ``generations``: generations of the slots when the plan was made; None: the plan has ended. ``action``: name of
        the transfer in the log.
        """
        if generations is None:
            stale = np.ones(len(numbers), dtype=np.bool_) if len(numbers) else None
        else:
            stale = slots.changed(numbers, generations)
        if stale is not None:
            self.refuse(numbers[stale], action)
        return stale

    def has_ended(self, generations: Generations, numbers: NDArray[np.int32], action: str) -> bool:
        """Whether a plan of these slots ((n,) int32) has ended already; if so, refuse this second result."""
        if generations is not None:
            return False
        self.refuse(numbers, action)
        return True

    def end_read(
        self, slots: HasGenerations, plan: GetPlan, loaded: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_] | None:
        """End a plan. Returns a mask ((n,) bool) of the ``loaded`` blocks ((n,) bool) whose slots were freed meanwhile;
        None if there are none. A slot whose fetch failed was freed as well, but its block is not ``loaded``."""
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
            logger.error("%s is refused: the plan has ended, or the slots were freed after it was made", error,
                         stack_info=True)
