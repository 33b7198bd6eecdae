"""The stock connector, and what it does not pass on.

For ``kv_connector_module_path: flexkv.integration.vllm.connector`` with ``kv_connector: FlexKVConnector``.
"""

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1

if TYPE_CHECKING:
    from vllm.v1.request import Request


class FlexKVConnector(FlexKVConnectorV1):
    """``FlexKVConnectorV1`` whose cached KV is forgotten by ``reset_prefix_cache(reset_connector=True)``, and that
    reads from SSD as soon as a request is queued."""

    def on_new_request(self, request: "Request") -> None:
        """A request was queued."""
        self._flexkv_connector.on_new_request(request)

    def reset_cache(self) -> bool:
        """Forget all KV that was saved, as after a change of weights."""
        return bool(self._flexkv_connector.reset_cache())
