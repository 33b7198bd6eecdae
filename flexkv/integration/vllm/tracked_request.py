"""What the scheduler side knows of one vLLM request."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexkv._core.hashing import SequenceHasher
from flexkv.kvmanager import KVManager

if TYPE_CHECKING:
    from vllm.v1.request import Request


def namespace_of(request: "Request") -> list[str]:
    """What separates this request's KV from that of others with the same tokens: LoRA and cache salt."""
    names = []
    if request.lora_request is not None:
        lora = request.lora_request
        names += ["lora", lora.lora_name, str(lora.lora_path)]
    if request.cache_salt:
        names += ["salt", request.cache_salt]
    names += list(getattr(request, "namespace_info", None) or [])
    return names


def is_cacheable(request: "Request") -> bool:
    """Whether tokens and multimodal content say all that the request's KV depends on."""
    return getattr(request, "prompt_embeds", None) is None and request.prompt_token_ids is not None


def block_extras(request: "Request", block_size: int) -> dict[int, bytes]:
    """Multimodal content by block index: which item, and where it starts as seen from the block."""
    extras: dict[int, list[str]] = {}
    for feature in request.mm_features or ():
        start, length = feature.mm_position.offset, feature.mm_position.length
        for block in range(start // block_size, (start + length - 1) // block_size + 1):
            extras.setdefault(block, []).append(f"{feature.identifier}@{start - block * block_size}")
    return {block: "\n".join(items).encode() for block, items in extras.items()}


class TrackedRequest:
    """A request's keys, pages and transfers.

    Attributes
    ----------
    num_computed : int
        Tokens that vLLM had in its own cache when it last asked.
    num_offered : int
        Leading blocks that were saved, loaded, or found to be saved.
    layerwise : bool
        What vLLM was told of the load to come: the request runs behind it, layer by layer.
    group : int
        Whose quota counts.
    counted : bool
        How its match ended.
    prefetched : bool
        What is on SSD was asked for.
    saves : set of int
        Tasks that are not known to have ended.
    """

    def __init__(self, request: "Request", manager: KVManager, block_size: int) -> None:
        self.request = request
        self._block_size = block_size
        namespace = namespace_of(request)
        self.group = manager.group(namespace)
        self._hasher: SequenceHasher = manager.hasher(namespace)
        self._extras = block_extras(request, block_size)
        self._pages = np.empty(64, dtype=np.int32)
        self._num_pages = 0
        self.num_computed = 0
        self.num_offered = 0
        self.layerwise = False
        self.prefetched = self.counted = False
        self.saves: set[int] = set()

    def keys(self) -> NDArray[np.uint64]:
        """(n, 2) uint64: keys of all full blocks of tokens that are known now."""
        known, hashed = self.request.num_tokens, self._hasher.num_tokens
        if known - hashed >= self._block_size or (known // self._block_size) > self._hasher.num_blocks:
            tokens = np.array(self.request.all_token_ids[hashed:known], dtype=np.int64)
            done = self._hasher.num_blocks
            self._hasher.extend(tokens, {block: extra for block, extra in self._extras.items() if block >= done})
        return self._hasher.keys

    @property
    def pages(self) -> NDArray[np.int32]:
        """(n,) int32: vLLM block ids, in order."""
        return self._pages[: self._num_pages]

    def set_pages(self, block_ids: list[int]) -> None:
        """The request has these blocks now, and no others; ``pages`` of before keeps what it was."""
        self._pages, self._num_pages = np.empty(max(64, 2 * len(block_ids)), dtype=np.int32), 0
        self.add_pages(block_ids)

    def add_pages(self, block_ids: list[int]) -> None:
        """The request was given more blocks."""
        end = self._num_pages + len(block_ids)
        if end > len(self._pages):
            pages = np.empty(2 * end, dtype=np.int32)
            pages[: self._num_pages] = self.pages
            self._pages = pages
        self._pages[self._num_pages : end] = block_ids
        self._num_pages = end
