"""Arguments of calls, checked before anything is reserved."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv.errors import ArgumentError, SlotMappingError


def integer_of(value: object, name: str, low: int, high: int) -> int:
    """A Python or numpy integer in ``[low, high]``, as ``int``; else ArgumentError."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ArgumentError(f"{name} is {value!r}: give an integer from {low} to {high}")
    return int(value)


def block_of(value: object, name: str) -> int:
    """A position in a sequence, in blocks; else ArgumentError."""
    return integer_of(value, name, 0, (1 << 31) - 1)


def task_ids_of(task_ids: int | Iterable[int]) -> list[int]:
    """Ids of tasks, of which one may be given alone; else ArgumentError."""
    ids: Iterable[object] = task_ids if isinstance(task_ids, Iterable) else [task_ids]
    return [integer_of(task_id, "task id", 0, (1 << 63) - 1) for task_id in ids]


def tokens_and_start(
    token_ids: ArrayLike, token_mask: NDArray[np.bool_] | None, tokens_per_block: int
) -> tuple[NDArray[np.integer], int]:
    """The tokens, and the first block that lies wholly where the mask is True.

    Raises
    ------
    ArgumentError
        The mask is not one of leading False and then True, one for each token.
    """
    tokens = np.asarray(token_ids)
    if token_mask is None:
        return tokens, 0
    mask = np.asarray(token_mask)
    if mask.dtype != np.bool_ or mask.shape != tokens.shape:
        raise ArgumentError(f"token_mask is {mask.dtype} {mask.shape}; give bool {tokens.shape}, one for each token")
    first = int(mask.argmax()) if mask.any() else len(mask)
    if not mask[first:].all():
        raise ArgumentError("token_mask has False after True: only leading tokens can be left out")
    return tokens, -(-first // tokens_per_block)


def part_of_mapping(
    slot_mapping: ArrayLike, mask: NDArray[np.bool_], token_mask: NDArray[np.bool_] | None
) -> NDArray[np.integer]:
    """Of a slot mapping for all tokens, or for those in ``token_mask``, the part for those in ``mask``.

    Raises
    ------
    SlotMappingError
        It is for neither.
    """
    mapping = np.asarray(slot_mapping)
    if mapping.shape == mask.shape:
        return mapping[mask]
    if token_mask is not None and mapping.shape == (int(token_mask.sum()),):
        return mapping[mask[token_mask]]
    raise SlotMappingError(
        f"slot_mapping has shape {mapping.shape}; give a slot for each of the {len(mask)} tokens"
    )
