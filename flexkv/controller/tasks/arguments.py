"""Checks of the arguments of calls. Each function returns the checked value in one type, or raises.

A call checks its arguments before it reserves anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv.config.namespace_entry import NamespaceEntry, namespace_entries
from flexkv.errors import ArgumentError, SlotMappingError
from flexkv.protocol.layer_signals import MAX_COUNTERS
from flexkv.protocol.numbers import MAX_STEP, fence_of, integer_of, shortened

_UINT64, _INT32 = np.dtype(np.uint64), np.dtype(np.int32)

_TOKEN_DTYPES = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint32))

MAX_POSITION = (1 << 31) - 1
"""Largest position in a sequence, and largest page."""

_MAX_SECONDS = 1e9


def number_of(value: object, name: str, low: float, high: float) -> float:
    """Convert a Python or NumPy number in ``[low, high]`` to ``float``; ArgumentError for any other value."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)) or not (
            low <= value <= high):
        raise ArgumentError(f"{name} is {shortened(value)}: give a number from {low:g} to {high:g}")
    return float(value)


def seconds_of(value: object, name: str) -> float:
    """Convert a timeout in seconds to ``float``; ArgumentError if it is negative or above 1e9. No wait is unbounded."""
    return number_of(value, name, 0.0, _MAX_SECONDS)


def block_of(value: object, name: str) -> int:
    """Convert the position of a block in a sequence to ``int``; ArgumentError if it is not in ``[0, MAX_POSITION]``."""
    return integer_of(value, name, 0, MAX_POSITION)


def task_id_of(value: object) -> int:
    """Convert a task id to ``int``; ArgumentError if it is not in ``[0, MAX_STEP]``."""
    return integer_of(value, "task id", 0, MAX_STEP)


def task_ids_of(task_ids: int | Iterable[int]) -> list[int]:
    """Convert one task id, or an iterable of them, to a list of ``int``; ArgumentError if one is not a task id."""
    return [task_id_of(task_id) for task_id in task_ids] if isinstance(task_ids, Iterable) else [task_id_of(task_ids)]


def unique_task_ids_of(task_ids: int | Iterable[int]) -> list[int]:
    """Like ``task_ids_of``, without repetitions, in the order of first occurrence."""
    return list(dict.fromkeys(task_ids_of(task_ids)))


def keys_of(keys: object) -> NDArray[np.uint64]:
    """Check keys of blocks; returns them C-contiguous. ArgumentError if they are not an (n, 2) uint64 array."""
    if not isinstance(keys, np.ndarray) or keys.dtype != _UINT64 or keys.ndim != 2 or keys.shape[1] != 2:
        raise ArgumentError(f"keys are {_shape_of(keys)}: give the uint64 (n, 2) array of a hasher")
    return keys if keys.flags.c_contiguous else np.ascontiguousarray(keys)


def pages_of(pages: object) -> NDArray[np.int32]:
    """Copy page numbers to a new (m,) int32 array; ArgumentError if they are not integers in ``[0, MAX_POSITION]``."""
    if isinstance(pages, np.ndarray) and pages.dtype == _INT32 and pages.ndim == 1 and len(pages) and pages.min() >= 0:
        return pages.copy()
    array = _array_of(pages, "pages")
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=_INT32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError(f"pages are {_shape_of(pages)}: give integers of shape (number of blocks,)")
    if array.min() < 0 or array.max() > MAX_POSITION:
        raise ArgumentError(f"pages are from {array.min()} to {array.max()}: give pages from 0 to {MAX_POSITION}")
    return array.astype(_INT32)


def span_of(keys: object, start_block: object, pages: object) -> tuple[NDArray[np.uint64], int, NDArray[np.int32]]:
    """Check the arguments of a get or put by blocks.

    Returns
    -------
    keys : (n, 2) uint64
    start : int
        Position of the first block.
    pages : (m,) int32
        Page of each block from ``start`` on; a copy.

    Raises
    ------
    ArgumentError
        An argument is invalid, or there are fewer keys than ``start + m``.
    """
    keys, start, pages = keys_of(keys), block_of(start_block, "start_block"), pages_of(pages)
    if len(pages) and start + len(pages) > len(keys):
        raise ArgumentError(
            f"{len(pages)} pages from block {start} on, but there are keys of {len(keys)} blocks: give a key for each"
        )
    return keys, start, pages


def launch_of(
    task_ids: int | Iterable[int], pages: Sequence[ArrayLike], fence: object, layerwise: object, counter: object
) -> tuple[list[int], list[NDArray[np.int32]], int, bool, int]:
    """Check the arguments of ``Blocks.launch``, which knows the tasks and the number of their blocks.

    Returns
    -------
    task_ids : list of int
    pages : list of (m,) int32
        Copies; one for each task.
    fence : int
    layerwise : bool
    counter : int

    Raises
    ------
    ArgumentError, SlotMappingError
        As ``Blocks.launch``.
    """
    ids, fence, counter = task_ids_of(task_ids), fence_of(fence), integer_of(counter, "counter", 0, MAX_COUNTERS)
    if layerwise and len(ids) != 1:
        raise ArgumentError(f"a launch layer by layer of {len(ids)} tasks: launch one task at a time")
    if len(ids) != len(pages):
        raise SlotMappingError(f"{len(pages)} slot mappings for {len(ids)} tasks: give one for each")
    return ids, [pages_of(part) for part in pages], fence, bool(layerwise), counter


def check_pages_of_task(task_id: int, num_blocks: int, num_pages: int, tokens_per_block: int) -> None:
    """Raise SlotMappingError unless a task of ``num_blocks`` blocks is launched with as many pages."""
    if num_blocks != num_pages:
        raise SlotMappingError(
            f"task {task_id} moves {num_blocks} blocks of {tokens_per_block} tokens; its slot mapping has {num_pages}: "
            "give one slot for each True of the mask"
        )


def namespace_of(namespace: Sequence[str] | None) -> tuple[NamespaceEntry, ...]:
    """Parse the entries of a namespace (None: no entry); ArgumentError if it is not a sequence of valid str."""
    if namespace is None:
        return ()
    if isinstance(namespace, (str, bytes)) or not isinstance(namespace, Iterable):
        text = shortened(namespace)
        raise ArgumentError(f"namespace is {text}: give a sequence of str, such as [{text}]")
    parts = tuple(namespace)
    for part in parts:
        if not isinstance(part, str):
            raise ArgumentError(f"namespace has {shortened(part)} in it: give a sequence of str")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"namespace has {shortened(part)} in it: {error.reason}; give valid text") from error
    return namespace_entries(parts)


def tokens_of(token_ids: object) -> NDArray[np.integer]:
    """Convert token ids to a (num_tokens,) array of int32, int64 or uint32; does not copy an array of these dtypes.
    ArgumentError if they are not integers of one dimension, or a uint64 id is above 2**32 - 1."""
    if type(token_ids) is np.ndarray and token_ids.ndim == 1 and token_ids.dtype in _TOKEN_DTYPES:
        return token_ids
    tokens = _array_of(token_ids, "token_ids")
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ArgumentError(f"token_ids are {_shape_of(token_ids)}: give integers of shape (num_tokens,)")
    if tokens.size and tokens.dtype.itemsize < 4:
        return tokens.astype(np.int32)
    if tokens.dtype == _UINT64 and tokens.size and tokens.max() >= 1 << 32:
        raise ArgumentError(f"token_ids has {tokens.max()} in it: give ids from 0 to {(1 << 32) - 1}")
    return tokens.astype(np.int64) if tokens.dtype == _UINT64 else tokens


def extras_of(extras: Mapping[int, bytes] | None) -> dict[int, bytes]:
    """Check ``block_extras``: content other than tokens that blocks depend on, by position of the block. Returns a copy
    (None: empty); ArgumentError if it is not a mapping from positions to bytes."""
    if extras is None:
        return {}
    if not isinstance(extras, Mapping):
        raise ArgumentError(f"block_extras is {shortened(extras)}: give a mapping from block index to bytes")
    for extra in extras.values():
        if not isinstance(extra, (bytes, bytearray, memoryview)):
            raise ArgumentError(f"block_extras has {shortened(extra)} in it: give bytes")
    return {block_of(block, "a block of block_extras"): bytes(extra) for block, extra in extras.items()}


def _array_of(value: object, name: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:      # ragged lists, tensors of a GPU
        raise ArgumentError(f"{name} is no array: {error}") from error


def _shape_of(value: object) -> str:
    array = _array_of(value, "the argument")
    return f"{array.dtype} {array.shape}"


def tokens_and_start(
    token_ids: ArrayLike, token_mask: ArrayLike | None, tokens_per_block: int
) -> tuple[NDArray[np.integer], int]:
    """Check the tokens and the mask of a get or put.

    Parameters
    ----------
    token_ids : (num_tokens,) integers
    token_mask : (num_tokens,) bool, optional
        False for leading tokens that are not moved, then True. None: all True.
    tokens_per_block : int

    Returns
    -------
    tokens : (num_tokens,) int32, int64 or uint32
    start_block : int
        Position of the first block of which the mask is True for every token.

    Raises
    ------
    ArgumentError
        The token ids are invalid, or the mask has another shape or dtype, or False after True.
    """
    tokens = tokens_of(token_ids)
    if token_mask is None:
        return tokens, 0
    mask = _array_of(token_mask, "token_mask")
    if mask.shape != tokens.shape or (mask.dtype != np.bool_ and mask.size):
        raise ArgumentError(f"token_mask is {mask.dtype} {mask.shape}; give bool {tokens.shape}, one for each token")
    first = int(mask.argmax()) if mask.any() else len(mask)
    if not mask[first:].all():
        raise ArgumentError("token_mask has False after True: only leading tokens can be left out")
    return tokens, -(-first // tokens_per_block)


def mapping_of(slot_mapping: object) -> NDArray[Any]:
    """Convert a slot mapping to an array of any shape and dtype; SlotMappingError if NumPy cannot convert it."""
    try:
        return np.asarray(slot_mapping)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise SlotMappingError(f"slot_mapping is no array: {error}; give int32 or int64 (num_tokens,)") from error


def part_of_mapping(
    slot_mapping: ArrayLike, mask: NDArray[np.bool_], token_mask: ArrayLike | None
) -> NDArray[np.integer]:
    """Select the slots of the tokens to move from a slot mapping.

    Parameters
    ----------
    slot_mapping : (num_tokens,) integers, or as many as ``token_mask`` has True
        Token slot of each token, or of each token where ``token_mask`` is True.
    mask : (num_tokens,) bool
        Tokens to move. Where it is True, ``token_mask`` must be True.
    token_mask : (num_tokens,) bool, optional

    Returns
    -------
    (k,) integers
        Token slot of each token where ``mask`` is True.

    Raises
    ------
    SlotMappingError
        The slot mapping has neither of these shapes.
    """
    mapping = mapping_of(slot_mapping)
    if mapping.shape == mask.shape:
        return mapping[mask]
    wanted = None if token_mask is None else np.asarray(token_mask, dtype=np.bool_)
    if wanted is not None and mapping.shape == (int(wanted.sum()),):
        return mapping[mask[wanted]]
    raise SlotMappingError(
        f"slot_mapping has shape {mapping.shape}; give a slot for each of the {len(mask)} tokens"
    )
