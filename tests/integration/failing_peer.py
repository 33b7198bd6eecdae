"""Another connector beside FlexKV, whose loads all fail: the pages keep what was in them."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

BLOCKS = 3


@dataclass
class PeerMetadata(KVConnectorMetadata):
    pages: list[int] = field(default_factory=list)


class FailingPeer(KVConnectorBase_V1):
    """Offers the first blocks of each fourth request once, to be loaded by its step, and reports them as invalid."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._offered: set[str] = set()
        self._pages: list[int] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        wanted = BLOCKS * self._block_size - num_computed_tokens
        if int(request.request_id.removeprefix("r")) % 4:
            return 0, False
        if request.request_id in self._offered or wanted <= 0 or request.num_tokens <= BLOCKS * self._block_size:
            return 0, False
        return wanted, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._offered.add(request.request_id)
            last = BLOCKS
            first = last - num_external_tokens // self._block_size
            self._pages += blocks.get_block_ids()[0][first:last]

    def build_connector_meta(self, scheduler_output: Any) -> PeerMetadata:
        pages, self._pages = self._pages, []
        return PeerMetadata(pages)

    def register_kv_caches(self, kv_caches: Any) -> None:
        pass

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_block_ids_with_load_errors(self) -> set[int]:
        meta = self._get_connector_metadata()
        assert isinstance(meta, PeerMetadata)
        return set(meta.pages)
