"""State of one vLLM request on the scheduler side: keys, pages and transfers."""

import logging
import struct
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexkv._core.index.block_keys import SequenceHasher
from flexkv.config.namespace_entry import NamespaceEntry
from flexkv.controller.blocks import Blocks
from flexkv.integration.vllm.lora_versions import LoraVersions

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

_LORAS = LoraVersions()
_NO_KEYS = np.empty((0, 2), dtype=np.uint64)
_NO_KEYS.flags.writeable = False

NEVER_SAVED = int(np.iinfo(np.int32).max)
"""Value of ``num_offered`` for a request whose blocks must not be saved, because its weights were replaced or its keys
cannot be computed."""


def namespace_of(request: "Request", loras: LoraVersions = _LORAS) -> list[NamespaceEntry] | None:
    """Entries of the request's namespace: its LoRA, its cache salt, and the engine's ``namespace_info``.

    Returns
    -------
    list of NamespaceEntry or None
        None: the content of the request's LoRA is unknown, so its KV is neither used nor saved.
    """
    entries = []
    if (lora := request.lora_request) is not None:
        version = loras.version(lora)
        if version is None:
            return None
        entries.append(NamespaceEntry("lora", lora.lora_name, version))
    if request.cache_salt:
        entries.append(NamespaceEntry("salt", request.cache_salt))
    entries += [NamespaceEntry("info", str(entry)) for entry in getattr(request, "namespace_info", None) or ()]
    return entries


def is_cacheable(request: "Request") -> bool:
    """Whether the request's KV depends on its tokens and multimodal items only. Prompts with embeddings, with or
    without tokens, are not cached."""
    if getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None:
        return False
    return all(feature.identifier is not None for feature in request.mm_features or ())


def _media_before(request: "Request", num_tokens: int) -> list[tuple[int, int, str]]:
    """Offset, length and identifier of the multimodal items that start before a position, in order."""
    items = (
        (feature.mm_position.offset, feature.mm_position.length, feature.identifier)
        for feature in request.mm_features or ()
    )
    return sorted(item for item in items if item[0] < num_tokens)


def block_extras(request: "Request", block_size: int, first: int, stop: int) -> dict[int, bytes]:
    """Multimodal content of the blocks ``[first, stop)`` in the current state of the request, for their keys.

    An item enters the key of each block that it overlaps. Its bytes are: its start relative to the block (8 bytes,
    signed), its length, the length of its identifier (8 bytes each), and the identifier. Integers are little-endian.
    """
    extras: dict[int, bytes] = {}
    for offset, length, identifier in _media_before(request, stop * block_size):
        name = identifier.encode(errors="surrogatepass")
        for block in range(max(first, offset // block_size), min(stop, -(-(offset + length) // block_size))):
            extras[block] = extras.get(block, b"") + struct.pack(
                "<qQQ", offset - block * block_size, length, len(name)
            ) + name
    return extras


class TrackedRequest:
    """A request's keys, pages and transfers.

    Attributes
    ----------
    num_computed : int
        Number of tokens in vLLM's own cache at its last query.
    num_offered : int
        Number of leading blocks that were saved, loaded, or found cached; ``NEVER_SAVED``: no block may be saved.
    layerwise : bool
        Whether the load offered to vLLM is layerwise: the request runs behind it, layer by layer.
    tenant : int
        Tenant whose quota is charged.
    counted : bool
        Whether the metrics count the request's match.
    prefetched : bool
        Whether a prefetch was started for the request.
    saves : set of int
        Put tasks that may still run.
    lookup_keys : (n, 2) uint64
        Keys of the last lookup. A load is of these blocks, even if the request changes afterwards.
    """

    def __init__(
        self, request: "Request", controller: Blocks, block_size: int, loras: LoraVersions = _LORAS
    ) -> None:
        self.request = request
        self._controller = controller
        self._block_size = block_size
        self._loras = loras
        self._pages = np.empty(64, dtype=np.int32)
        self._num_pages = 0
        self.num_computed = self.num_offered = 0
        self.layerwise = False
        self.prefetched = self.counted = False
        self.saves: set[int] = set()
        self.lookup_keys = _NO_KEYS
        self._num_preemptions = self._count_preemptions()
        self._has_keys = True
        self.tenant = 0
        try:
            self._start(namespace_of(request, loras))
        except Exception as error:      # no content of a request may end caching for others  # noqa: BLE001
            self._abandon(error)

    def _start(self, namespace: list[NamespaceEntry] | None) -> None:
        """Start computing keys from the first token."""
        self._namespace = namespace
        self.tenant = self._controller.tenant(namespace or [])
        self._hasher: SequenceHasher = self._controller.hasher(namespace or [])
        self._last_block: list[int] = []
        self._media: list[tuple[int, int, str]] = []
        self._num_prompt_tokens = len(self.request.prompt_token_ids or ())
        if self.num_offered < NEVER_SAVED:
            self.num_offered = 0

    def _has_changed(self, num_hashed: int) -> bool:
        """Whether the first ``num_hashed`` tokens or their multimodal items differ from those that were hashed. vLLM
        changes tokens only when it continues a session, which also makes the prompt longer."""
        request = self.request
        if len(request.prompt_token_ids or ()) != self._num_prompt_tokens or request.num_tokens < num_hashed:
            return True
        last_block = request.all_token_ids[num_hashed - self._block_size : num_hashed]
        return list(last_block) != self._last_block or _media_before(request, num_hashed) != self._media

    def keys(self) -> NDArray[np.uint64]:
        """Keys of all full blocks of the tokens known now, (n, 2) uint64.

        The array is empty if the content of the LoRA is unknown or has changed while the request was computed. It stays
        empty if keys cannot be computed, for example because of a negative token.
        """
        if not self._has_keys:
            return _NO_KEYS
        try:
            return self._extend()
        except Exception as error:      # no content of a request may end caching for others  # noqa: BLE001
            self._abandon(error)
            return _NO_KEYS

    def _abandon(self, error: Exception) -> None:
        self._has_keys, self.num_offered = False, NEVER_SAVED
        logger.warning(
            "request %s is computed without cached KV, and its KV is not saved: its keys cannot be computed (%s: %s)",
            self.request.request_id, type(error).__name__, error,
        )

    def _extend(self) -> NDArray[np.uint64]:
        request, size = self.request, self._block_size
        namespace = self._namespace
        if request.lora_request is not None:
            namespace = namespace_of(request, self._loras)
            if namespace != self._namespace and request.num_computed_tokens > 0:
                namespace = None
        done = self._hasher.num_blocks
        if namespace != self._namespace or (done and self._has_changed(done * size)):
            self._start(namespace)
            done = 0
        stop = request.num_tokens // size
        if stop > done and namespace is not None:
            tokens = list(request.all_token_ids[done * size : stop * size])
            self._hasher.extend(np.array(tokens, dtype=np.int64), block_extras(request, size, done, stop))
            self._last_block = tokens[-size:]
            self._media = _media_before(request, stop * size)
        return self._hasher.keys

    def _count_preemptions(self) -> int:
        return int(getattr(self.request, "num_preemptions", 0))

    def was_preempted(self) -> bool:
        """Whether vLLM has preempted the request since the last call of ``forget_pages``, or since its creation."""
        return self._count_preemptions() != self._num_preemptions

    def forget_pages(self) -> None:
        """Reset the pages of a preempted request. vLLM computes it again from the start."""
        self._num_preemptions = self._count_preemptions()
        self.set_pages([])
        if self.num_offered != NEVER_SAVED:
            self.num_offered = 0

    @property
    def pages(self) -> NDArray[np.int32]:
        """vLLM block ids of the request in order, (n,) int32."""
        return self._pages[: self._num_pages]

    def set_pages(self, block_ids: list[int]) -> None:
        """Replace the request's pages. Arrays returned by ``pages`` before keep their content."""
        self._pages, self._num_pages = np.empty(max(64, 2 * len(block_ids)), dtype=np.int32), 0
        self.add_pages(block_ids)

    def add_pages(self, block_ids: list[int]) -> None:
        """Append pages to the request."""
        end = self._num_pages + len(block_ids)
        if end > len(self._pages):
            pages = np.empty(2 * end, dtype=np.int32)
            pages[: self._num_pages] = self.pages
            self._pages = pages
        self._pages[self._num_pages : end] = block_ids
        self._num_pages = end
