"""Arguments of calls, checked before anything is reserved."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexkv.config.namespace_entry import NamespaceEntry, namespace_entries
from flexkv.errors import ArgumentError, SlotMappingError
from flexkv.protocol.numbers import MAX_STEP, integer_of, shortened

_UINT64, _INT32 = np.dtype(np.uint64), np.dtype(np.int32)

_TOKEN_DTYPES = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint32))

MAX_POSITION = (1 << 31) - 1
"""Largest position in a sequence, and largest page."""

_MAX_SECONDS = 1e9


def number_of(value: object, name: str, low: float, high: float) -> float:
    """A Python or numpy number in ``[low, high]``, as ``float``; else ArgumentError."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)) or not (
            low <= value <= high):
        raise ArgumentError(f"{name} is {shortened(value)}: give a number from {low:g} to {high:g}")
    return float(value)


def seconds_of(value: object, name: str) -> float:
    """A time to wait; else ArgumentError. No wait is unbounded."""
    return number_of(value, name, 0.0, _MAX_SECONDS)


def block_of(value: object, name: str) -> int:
    """A position in a sequence, in blocks; else ArgumentError."""
    return integer_of(value, name, 0, MAX_POSITION)


def task_id_of(value: object) -> int:
    """The id of a task; else ArgumentError."""
    return integer_of(value, "task id", 0, MAX_STEP)


def task_ids_of(task_ids: int | Iterable[int]) -> list[int]:
    """Ids of tasks, of which one may be given alone; else ArgumentError."""
    return [task_id_of(task_id) for task_id in task_ids] if isinstance(task_ids, Iterable) else [task_id_of(task_ids)]


def unique_task_ids_of(task_ids: int | Iterable[int]) -> list[int]:
    """As ``task_ids_of``, each once."""
    return list(dict.fromkeys(task_ids_of(task_ids)))


def keys_of(keys: object) -> NDArray[np.uint64]:
    """Keys of blocks ((n, 2) uint64, C-contiguous); else ArgumentError."""
    if not isinstance(keys, np.ndarray) or keys.dtype != _UINT64 or keys.ndim != 2 or keys.shape[1] != 2:
        raise ArgumentError(f"keys are {_shape_of(keys)}: give the uint64 (n, 2) array of a hasher")
    return keys if keys.flags.c_contiguous else np.ascontiguousarray(keys)


def pages_of(pages: object) -> NDArray[np.int32]:
    """A copy of pages, as (m,) int32; else ArgumentError."""
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
    """Keys, first block and pages of a get or put by blocks; else ArgumentError."""
    keys, start, pages = keys_of(keys), block_of(start_block, "start_block"), pages_of(pages)
    if len(pages) and start + len(pages) > len(keys):
        raise ArgumentError(
            f"{len(pages)} pages from block {start} on, but there are keys of {len(keys)} blocks: give a key for each"
        )
    return keys, start, pages


def namespace_of(namespace: Sequence[str] | None) -> tuple[NamespaceEntry, ...]:
    """The entries of a namespace; else ArgumentError."""
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
    """Token ids, as a (num_tokens,) array of int32, int64 or uint32; else ArgumentError."""
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
    """What blocks depend on besides tokens, by position; else ArgumentError."""
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
    """The tokens, and the first block that lies wholly where the mask is True.

    Raises
    ------
    ArgumentError
        They are no tokens, or the mask is not one of leading False and then True, one for each token.
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
    """A slot mapping as an array; else SlotMappingError."""
    try:
        return np.asarray(slot_mapping)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise SlotMappingError(f"slot_mapping is no array: {error}; give int32 or int64 (num_tokens,)") from error


def part_of_mapping(
    slot_mapping: ArrayLike, mask: NDArray[np.bool_], token_mask: ArrayLike | None
) -> NDArray[np.integer]:
    """Select the part for the tokens in ``mask`` from a slot mapping for all tokens, or for those in ``token_mask``.

    Raises
    ------
    SlotMappingError
        It is for neither.
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
