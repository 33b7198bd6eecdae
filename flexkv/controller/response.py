"""Results of tasks, as ``Blocks`` and ``KVManager`` return them."""

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class KVResponseStatus(enum.Enum):
    """State of a task, or its outcome."""

    SUCCESS = "success"
    """All blocks were moved."""
    NOTFOUND = "notfound"
    """The task is unknown: it was never made, or its result was returned already."""
    UNREADY = "unready"
    """Not launched yet; or launched before every rank had registered, so that nothing was moved."""
    TIMEOUT = "timeout"
    """The wait, or the transfer itself, took too long."""
    CANCELLED = "cancelled"
    """It was cancelled, or the cache was reset; no block counts as moved."""
    FAILED = "failed"
    """At least one block was not moved; ``return_mask`` marks the tokens that were moved."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class KVResponse:
    """Result of one task.

    Attributes
    ----------
    status : KVResponseStatus
    task_id : int
    return_mask : (num_tokens,) bool ndarray or None
        Tokens whose KV was moved; None for a task that is not known, has not ended, or was made from keys instead of
        tokens.
    reason : str
        Why the task has not succeeded; empty if it has, or was not launched.
    """

    status: KVResponseStatus
    task_id: int
    return_mask: NDArray[np.bool_] | None = None
    reason: str = ""

    def __repr__(self) -> str:
        mask = self.return_mask
        tokens = f", {int(mask.sum())} of {len(mask)} tokens" if mask is not None else ""
        reason = f", reason={self.reason!r}" if self.reason else ""
        return f"KVResponse({self.status.name}, task_id={self.task_id}{tokens}{reason})"


def mask_of_blocks(
    blocks: NDArray[np.integer] | range, tokens_per_block: int, num_tokens: int
) -> NDArray[np.bool_]:
    """(num_tokens,) bool: tokens of the blocks at these positions ((m,) integers, ascending)."""
    mask = np.zeros(num_tokens, dtype=np.bool_)
    if len(blocks) == 0:
        return mask
    first, last = int(blocks[0]), int(blocks[-1])
    if last - first == len(blocks) - 1:
        mask[first * tokens_per_block : (last + 1) * tokens_per_block] = True
        return mask
    whole = np.zeros(num_tokens // tokens_per_block, dtype=np.bool_)
    whole[blocks] = True
    mask[: len(whole) * tokens_per_block] = np.repeat(whole, tokens_per_block)
    return mask
