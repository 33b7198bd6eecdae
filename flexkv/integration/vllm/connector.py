"""vLLM's stock connector, extended by two calls that it does not forward.

Select it with ``kv_connector_module_path: flexkv.integration.vllm.connector`` and ``kv_connector: FlexKVConnector``.
"""

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1

if TYPE_CHECKING:
    from vllm.v1.request import Request


class FlexKVConnector(FlexKVConnectorV1):
    """``FlexKVConnectorV1`` that drops cached KV at ``reset_prefix_cache(reset_connector=True)``, and prefetches from
    SSD as soon as a request is queued."""

    def on_new_request(self, request: "Request") -> None:
        """Start the prefetch of a request that was queued."""
        self._flexkv_connector.on_new_request(request)

    def reset_cache(self) -> bool:
        """Drop all cached KV, as after a change of weights."""
        return bool(self._flexkv_connector.reset_cache())
